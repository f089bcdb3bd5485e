"""RWKV6 (arXiv 2404.05892): one decay for each key channel, `exp(-exp(P))` (Liger, table 1)."""

from torch import Tensor

from linearize.ops.gated_linear import gated_linear
from linearize.structures.base import Inputs, Layer, Structure

LARGEST = 10.0  # exp(-exp(10)) is 0 in fp32, and its gradient too; above, exp(P) would overflow


def inputs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layer: Layer) -> Inputs:
    """The current token is read with its own write, as in the other structures, unless `bonus` weighs it."""
    return Inputs(q, k, v, -gate.clamp(max=LARGEST).exp() / layer.config.gate_temperature)


RWKV6 = Structure(inputs, gated_linear)
