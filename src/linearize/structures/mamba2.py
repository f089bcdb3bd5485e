"""Mamba2 (arXiv 2405.21060): one step size for each head, which both decays the state and scales what is written."""

import torch.nn.functional as F
from torch import Tensor

from linearize.ops.gated_linear import gated_linear
from linearize.structures.base import Inputs, Layer, Structure


def inputs(q: Tensor, k: Tensor, v: Tensor, layer: Layer) -> Inputs:
    """`Δ = softplus(mean of k)`; the decay is `exp(-Δ / temperature)`, the key `Δ φ(k)`."""
    step = F.softplus(k.float().mean(-1, keepdim=True))
    return Inputs(layer.feature_map(q), step * layer.feature_map(k), v, -step / layer.config.gate_temperature)


MAMBA2 = Structure(inputs, gated_linear)
