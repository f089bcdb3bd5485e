"""The gate before its non-linearity, P in Liger's table 1."""

import torch.nn.functional as F
from torch import Tensor


def pooled(x: Tensor, size: int) -> Tensor:
    """`[..., D]` to `[..., size]` in fp32: the mean for one value, averages of neighbours for fewer than D, the
    channels as they are for D, and again from the first for more."""
    x = x.float()
    if size % x.shape[-1] == 0:
        return x.repeat(*[1] * (x.dim() - 1), size // x.shape[-1])
    return F.adaptive_avg_pool1d(x.flatten(0, -2), size).unflatten(0, x.shape[:-1])
