"""Gated linear attention (GLA): one decay for each key channel, `G_t = σ(k_t)^(1/temperature)ᵀ 1` (Liger, table 1)."""

import torch.nn.functional as F
from torch import Tensor

from linearize.ops.gated_linear import gated_linear
from linearize.structures.base import Structure


def gate(k: Tensor, temperature: float) -> Tensor:
    """The log decay of each key channel, `[B, T, KV, K]` in fp32; pooling is the identity (Liger, section 3.2)."""
    return F.logsigmoid(k.float()) / temperature


GLA = Structure(gate=gate, operator=gated_linear, state_shape=lambda key_size, value_size: (key_size, value_size))
