"""The gated recurrences, one file each: how the key projection becomes a gate, and which operator runs it."""

from linearize.structures import gla
from linearize.structures.base import Structure

__all__ = ["STRUCTURES", "Structure"]

STRUCTURES: dict[str, Structure] = {
    "gla": gla.GLA,
}
