"""HGRN2 (arXiv 2404.07904): a decay with a lower bound that rises with depth, and what it forgets as the key."""

import torch
from torch import Tensor

from linearize.ops.gated_linear import gated_linear
from linearize.structures.base import Inputs, Layer, Structure


def inputs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layer: Layer) -> Inputs:
    """`α = γ + (1 - γ) σ(P)^(1/temperature)`, γ = layer_idx / num_layers, 0 in the first; the key is `1 - α`."""
    lower = layer.layer_idx / layer.num_layers
    log_kept = torch.nn.functional.logsigmoid(gate) / layer.config.gate_temperature
    key = (1 - lower) * -torch.expm1(log_kept)  # 1 - α, without the cancellation near 1
    return Inputs(q, key, v, torch.log1p(-key) if lower else log_kept)  # without a bound, the key may round to 1


HGRN2 = Structure(inputs, gated_linear, own_keys=True, by_depth=True)
