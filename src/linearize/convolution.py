"""A short causal convolution over what the recurrence reads and writes, one filter for each channel."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import initialization


class ShortConvolution(nn.Module):
    """`y_t = Σ_i w_i x_{t-i}`, i < size, of tokens of the same document; the identity at the start.

    With `silu`, SiLU of that, and random filters at the start, as for layers that are trained from nothing (DeltaNet,
    arXiv 2406.06484): no filter makes SiLU the identity.
    """

    def __init__(self, size: int, heads: int, head_dim: int, silu: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.silu, self.seed = silu, seed
        self.weight = nn.Parameter(torch.empty(size, heads, head_dim))

    def reset_parameters(self) -> None:
        """The token itself; with `silu` values that depend on the seed alone, uniform as those of `nn.Conv1d`."""
        if self.silu:
            random = torch.rand(self.weight.shape, generator=torch.Generator().manual_seed(self.seed), device="cpu")
            initialization.copy_(self.weight, (2 * random - 1) / len(self.weight) ** 0.5)
            return
        itself = torch.zeros(self.weight.shape)
        itself[0] = 1
        initialization.copy_(self.weight, itself)

    def forward(
        self,
        x: Float[Tensor, "B T H D"],
        past: Float[Tensor, "B P H D"] | None,
        valid: Bool[Tensor, "B T"] | None,
        document: Int[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T H D"], Float[Tensor, "B P H D"]]:
        """The output, and the P = size - 1 tokens that the next call needs as `past`; padding counts as 0."""
        size, T = len(self.weight), x.shape[1]
        if valid is not None:
            x = x * valid[:, :, None, None]
        x = F.pad(x, (0, 0, 0, 0, size - 1, 0)) if past is None else torch.cat([past.to(x.dtype), x], dim=1)
        output = torch.zeros_like(x[:, size - 1 :])
        for i in range(size):
            shifted = x[:, size - 1 - i : size - 1 - i + T]
            if document is not None:
                shifted = shifted * (F.pad(document, (i, 0), value=-1)[:, :T] == document)[:, :, None, None]
            output = output + self.weight[i].to(x.dtype) * shifted
        return F.silu(output) if self.silu else output, x[:, T:].clone()
