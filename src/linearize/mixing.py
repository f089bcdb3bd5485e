"""How the recurrence and the local branch become one output, by name (Liger, arXiv 2503.01496)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from linearize.gates import few_outputs
from linearize.structures.base import Layer

CLOSED = 1e-4  # how near to 0 and 1 a learned weight may start


class Fixed(nn.Module):
    """output = w · recurrent + (1 - w) · local, with one constant w (the paper's is 0.5)."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.initial, self.heads = layer.config.initial_mixing_weight, layer.num_heads

    def weights(self) -> Tensor:
        """`[H]`."""
        return torch.full((self.heads,), self.initial)

    def shares(self, hidden: Tensor, log_ratio: Tensor | None) -> Any:
        """w, broadcast over `[B, T, H]`."""
        return self.initial

    def forward(self, recurrent: Tensor, local: Tensor, hidden: Tensor, log_ratio: Tensor | None) -> Tensor:
        """recurrent and local `[B, T, H, D]`; hidden, the layer's input, `[B, T, hidden]`; log_ratio `[B, T, H]`: the
        logarithm of the recurrence's sum of weights over the window's, where there are such sums."""
        w = self.shares(hidden, log_ratio)
        w = w[..., None].to(local.dtype) if isinstance(w, Tensor) else w
        return w * recurrent + (1 - w) * local


class PerHead(Fixed):
    """As `Fixed`, with a learned w for each head."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.weight = nn.Parameter(torch.empty(self.heads))

    def reset_parameters(self) -> None:
        """Every head at the configured weight."""
        initialization.constant_(self.weight, self.initial)

    def weights(self) -> Tensor:
        """`[H]`."""
        return self.weight.detach().float().cpu()

    def shares(self, hidden: Tensor, log_ratio: Tensor | None) -> Tensor:
        """As `Fixed`."""
        return self.weight


class DataDependent(Fixed):
    """As `Fixed`, with `w = σ(W x + b)` for each head, x the layer's input; W is 0 at the start."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.weight = nn.Parameter(torch.empty(self.heads, layer.hidden_size))
        self.bias = nn.Parameter(torch.empty(self.heads))

    def reset_parameters(self) -> None:
        """Every token at the configured weight."""
        start = min(max(self.initial, CLOSED), 1 - CLOSED)
        initialization.zeros_(self.weight)
        initialization.constant_(self.bias, math.log(start / (1 - start)))

    def weights(self) -> Tensor:
        """`[H]`: of an input of 0."""
        return self.bias.detach().float().sigmoid().cpu()

    def shares(self, hidden: Tensor, log_ratio: Tensor | None) -> Tensor:
        """As `Fixed`."""
        return (few_outputs(hidden, self.weight) + self.bias).sigmoid()


class SharedNormalizer(Fixed):
    """One softmax over the window and the recurrence's tokens, which are those beyond it (LoLCATs, arXiv 2410.10254;
    Lizard): both outputs are weighted means, so the whole one is theirs by their sums of weights.

    The recurrence's sum counts c-fold, c > 0 learned for each head.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.log_weight = nn.Parameter(torch.empty(self.heads))

    def reset_parameters(self) -> None:
        """c is the configured weight."""
        initialization.constant_(self.log_weight, math.log(max(self.initial, CLOSED)))

    def weights(self) -> Tensor:
        """`[H]`: c."""
        return self.log_weight.detach().float().exp().cpu()

    def shares(self, hidden: Tensor, log_ratio: Tensor | None) -> Tensor:
        """As `Fixed`."""
        assert log_ratio is not None
        return (self.log_weight.float() + log_ratio).sigmoid()

    def forward(self, recurrent: Tensor, local: Tensor, hidden: Tensor, log_ratio: Tensor | None) -> Tensor:
        """As `Fixed`."""
        w = self.shares(hidden, log_ratio)[..., None]
        return (w * recurrent + (1 - w) * local).to(local.dtype)


MIXINGS: dict[str, Any] = {
    "fixed": Fixed,
    "per_head": PerHead,
    "data_dependent": DataDependent,
    "shared_normalizer": SharedNormalizer,
}
