"""mLSTM and Gated Retention: one decay for each head, `σ(P)^(1/temperature)`, P the key's mean (Liger, table 1)."""

from torch import Tensor

from linearize.ops.gated_linear import gated_linear
from linearize.structures import gla
from linearize.structures.base import Inputs, Layer, Structure, per_head


def inputs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layer: Layer) -> Inputs:
    """As GLA, with a gate for each head."""
    return gla.inputs(q, k, v, gate, layer)


MLSTM = Structure(inputs, gated_linear, per_head)
