"""Gated linear attention (GLA): one decay for each key channel, `G_t = σ(k_t)^(1/temperature)ᵀ 1` (Liger, table 1)."""

import torch.nn.functional as F
from torch import Tensor

from linearize.ops.gated_linear import gated_linear
from linearize.structures.base import Inputs, Layer, Structure


def inputs(q: Tensor, k: Tensor, v: Tensor, layer: Layer) -> Inputs:
    """The paper's pooling is the identity here: a channel of the key gives the decay of that channel."""
    log_g = F.logsigmoid(k.float()) / layer.config.gate_temperature
    return Inputs(layer.feature_map(q), layer.feature_map(k), v, log_g)


GLA = Structure(inputs, gated_linear)
