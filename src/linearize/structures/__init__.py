"""The gated recurrences, one file each: how the key projection becomes a gate, and which operator runs it."""

from linearize.structures.base import Structure
from linearize.structures.delta import DELTANET, GATED_DELTANET
from linearize.structures.gla import GLA
from linearize.structures.gsa import GSA
from linearize.structures.hgrn2 import HGRN2
from linearize.structures.kronecker import KRONECKER
from linearize.structures.lightning import LIGHTNING
from linearize.structures.mamba2 import MAMBA2
from linearize.structures.mlstm import MLSTM
from linearize.structures.rwkv6 import RWKV6

__all__ = ["STRUCTURES", "Structure"]

STRUCTURES: dict[str, Structure] = {
    "gla": GLA,
    "hgrn2": HGRN2,
    "rwkv6": RWKV6,
    "mamba2": MAMBA2,
    "mlstm": MLSTM,
    "gated_retention": MLSTM,  # the same gate
    "lightning": LIGHTNING,
    "deltanet": DELTANET,
    "gated_deltanet": GATED_DELTANET,
    "gsa": GSA,
    "kronecker": KRONECKER,
}
