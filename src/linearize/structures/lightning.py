"""Lightning Attention-2 / TransNormerLLM (arXiv 2401.04658, 2307.14995): a fixed decay for each head."""

import torch
from jaxtyping import Float
from torch import Tensor

from linearize.ops.gated_linear import gated_linear
from linearize.structures.base import Inputs, Layer, Structure, absent


def rates(layer: Layer, device: torch.device | None = None) -> Float[Tensor, "KV"]:
    """The decay rates of the heads h = 1..H in layer l of L, decay = exp(-rate), by `decay_schedule`, in float64.

    "paper": `(8h/H)(1 - l/L)`; "alibi", the published code's: `2^(-8h/H) (1 - l/(L-1) + 1e-5)`.
    """
    heads = layer.num_key_value_heads
    slope = 8 / heads * torch.arange(1, heads + 1, dtype=torch.float64, device=device)
    if layer.config.decay_schedule == "paper":
        return slope * (1 - layer.layer_idx / layer.num_layers)
    return torch.exp2(-slope) * (1 - layer.layer_idx / max(layer.num_layers - 1, 1) + 1e-5)


def inputs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layer: Layer) -> Inputs:
    """No gate: nothing of the text decides what is forgotten."""
    log_g = -rates(layer, k.device).float()
    return Inputs(q, k, v, log_g[:, None].expand(*k.shape[:3], 1))


LIGHTNING = Structure(inputs, gated_linear, absent, by_depth=True)
