"""Mamba2 (arXiv 2405.21060): one step size for each head, which both decays the state and scales what is written."""

import torch.nn.functional as F
from torch import Tensor

from linearize.ops.gated_linear import gated_linear
from linearize.structures.base import Inputs, Layer, Structure, per_head


def inputs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layer: Layer) -> Inputs:
    """`Δ = softplus(P)`; the decay is `exp(-Δ / temperature)`, the key `Δ φ(k)`."""
    step = F.softplus(gate)
    return Inputs(q, step * k, v, -step / layer.config.gate_temperature)


MAMBA2 = Structure(inputs, gated_linear, per_head)
