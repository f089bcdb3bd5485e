"""Gated linear attention (GLA): one decay for each key channel, `G_t = σ(P_t)^(1/temperature)ᵀ 1` (Liger, table 1)."""

import torch.nn.functional as F
from torch import Tensor

from linearize.ops.gated_linear import gated_linear
from linearize.structures.base import Inputs, Layer, Structure


def inputs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layer: Layer) -> Inputs:
    """A channel of the gate gives the decay of that channel."""
    return Inputs(q, k, v, F.logsigmoid(gate) / layer.config.gate_temperature)


GLA = Structure(inputs, gated_linear)
