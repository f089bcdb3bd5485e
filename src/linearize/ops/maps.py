"""Learned maps of the recurrence's queries and keys that are then divided by their length."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from linearize.ops.dispatch import kernel_dtype, why_no_kernel


def mapped(
    x: Float[Tensor, "B T H D"], down: Float[Tensor, "H D R"], up: Float[Tensor, "H R D"]
) -> Float[Tensor, "B T H D"]:
    """x + U V x of each head, divided by its length, in fp32; 0 stays 0. By the fastest code there is for these
    inputs, products in the dtype of x or, within autocast, in its."""
    if (dtype := kernel_dtype(x)) is not None and why_not_fused(x) is None:
        from linearize.ops.maps_triton import mapped as kernel

        with torch.autocast(x.device.type, enabled=False):
            return kernel(x.to(dtype).contiguous(), down.to(dtype).contiguous(), up.to(dtype).contiguous())
    return plain(x, down, up)


def why_not_fused(x: Float[Tensor, "B T H D"]) -> str | None:
    """What the kernel lacks for these inputs; None if nothing."""
    return why_no_kernel(x, {f"head size {x.shape[-1]}": x.shape[-1] > 128, "one token": x.shape[1] == 1})


def plain(
    x: Float[Tensor, "B T H D"], down: Float[Tensor, "H D R"], up: Float[Tensor, "H R D"]
) -> Float[Tensor, "B T H D"]:
    """In PyTorch; in float64 what every other form is tested against."""
    return F.normalize(added(x, down, up), dim=-1)


def added(
    x: Float[Tensor, "B T H D"], down: Float[Tensor, "H D R"], up: Float[Tensor, "H R D"]
) -> Float[Tensor, "B T H D"]:
    """x + U V x, in fp32 at least."""
    x, down, up = (t if t.dtype == torch.float64 else t.float() for t in (x, down, up))
    return x + torch.einsum("bthr,hre->bthe", torch.einsum("bthd,hdr->bthr", x, down), up)
