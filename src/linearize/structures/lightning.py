"""Lightning Attention-2 / TransNormerLLM (arXiv 2401.04658, 2307.14995): a fixed decay for each head."""

import torch
from torch import Tensor

from linearize.ops.gated_linear import gated_linear
from linearize.structures.base import Inputs, Layer, Structure, absent


def rates(layer: Layer) -> list[float]:
    """The decay rates of the heads h = 1..H in layer l of L, decay = exp(-rate), by `decay_schedule`.

    "paper": `(8h/H)(1 - l/L)`; "alibi", the published code's: `2^(-8h/H) (1 - l/(L-1) + 1e-5)`.
    """
    heads = range(1, layer.num_key_value_heads + 1)
    if layer.config.decay_schedule == "paper":
        return [8 * h / layer.num_key_value_heads * (1 - layer.layer_idx / layer.num_layers) for h in heads]
    depth = 1 - layer.layer_idx / max(layer.num_layers - 1, 1) + 1e-5
    return [2 ** (-8 * h / layer.num_key_value_heads) * depth for h in heads]


def inputs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layer: Layer) -> Inputs:
    """No gate: nothing of the text decides what is forgotten."""
    log_g = -torch.tensor(rates(layer), device=k.device)
    return Inputs(q, k, v, log_g[:, None].expand(*k.shape[:3], 1))


LIGHTNING = Structure(inputs, gated_linear, absent)
