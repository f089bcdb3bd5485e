"""The matrix products of a decoding step, with the norms before them and the SwiGLU and residuals after them.

For few rows, in half precision on a GPU, each is one kernel, which reads the weight once; else they are PyTorch's, in
fp32 on a CPU shared out among its cores.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops import dispatch
from linearize.ops.dispatch import HALF, why_no_kernel

MOST = 16  # rows; with more, cuBLAS's products are as fast, and MKL's use all cores

Linear = tuple[Tensor, Tensor | None]  # weight [N, K] and bias [N]


class Norm(NamedTuple):
    """Root mean square norm."""

    weight: Tensor  # [K]
    epsilon: float


def why_not_fused(x: Tensor, weight: Tensor, normed: bool = False) -> str | None:
    """What the kernels lack for these inputs, of which x is `normed` inside; None if nothing."""
    if (reason := dispatch.no_device(x)) is not None:
        return reason  # before the names of all else are made, five times a layer
    unsupported = {
        f"a norm in {x.dtype}": normed and x.dtype == torch.float16,  # has no room for what is not divided yet
        f"{len(x)} rows": len(x) > MOST,
        f"{x.shape[1]} columns": x.shape[1] % 16 > 0,  # loads would be of single numbers
        f"{x.dtype} by {weight.dtype}": x.dtype not in HALF or x.dtype != weight.dtype,
        "tensors that are not contiguous": not (x.is_contiguous() and weight.is_contiguous()),
    }
    return why_no_kernel(x, unsupported)


def normed(x: Tensor, norm: Norm) -> Tensor:
    """x `[B, K]` after the norm."""
    if dispatch.no_device(x) is None and x.is_contiguous():
        from linearize.ops.products_triton import normed as kernel

        with torch.cuda.device_of(x):
            return kernel(x, norm)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.epsilon)


def normed_product(x: Tensor, norm: Norm, linear: Linear) -> Tensor:
    """`[B, N]`, linear(norm(x)) of x `[B, K]`."""
    if why_not_fused(x, linear[0], normed=True) is None:
        from linearize.ops.products_triton import normed_product as kernel

        with torch.cuda.device_of(x):  # kernels run on the current device
            return kernel(x, norm, linear)
    return product(normed(x, norm), linear)


def normed_swiglu(x: Tensor, norm: Norm, linear: Linear, size: int) -> Tensor:
    """`[B, size]`, silu(gate) · up, where linear(norm(x)) of x `[B, K]` begins with gate and up, of that size each."""
    if why_not_fused(x, linear[0], normed=True) is None:
        from linearize.ops.products_triton import normed_swiglu as kernel

        with torch.cuda.device_of(x):
            return kernel(x, norm, linear, size)
    return swiglu(product(normed(x, norm), linear), size)


def add_product(hidden: Tensor, x: Tensor, linear: Linear) -> None:
    """hidden `[B, N]` += linear(x), of x `[B, K]`."""
    weight, bias = linear
    if why_not_fused(x, weight) is None and hidden.is_contiguous():
        from linearize.ops.products_triton import add_product as kernel

        with torch.cuda.device_of(x):
            return kernel(hidden, x, linear)
    if x.device.type == "cpu" and x.dtype == torch.float32:
        hidden.add_(product(x, linear))
        return
    hidden.addmm_(x, weight.t())
    if bias is not None:
        hidden.add_(bias)


def product(x: Tensor, linear: Linear) -> Tensor:
    """`[B, N]`, linear(x) of x `[B, K]`, by PyTorch."""
    weight, bias = linear
    if (blocks := blocks_of(x, weight)) == 1:
        return F.linear(x, weight, bias)
    made = torch.bmm(x.expand(blocks, *x.shape), weight.view(blocks, -1, x.shape[1]).mT)
    made = made.transpose(0, 1).reshape(x.shape[0], -1)
    return made if bias is None else made + bias


def blocks_of(x: Tensor, weight: Tensor) -> int:
    """Into how many blocks of rows the weight is cut: on a CPU, MKL leaves the product of a few rows to one core, which
    reads half or less of what memory gives; of several products in a batch each core takes its share."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape[0] > MOST or not weight.is_contiguous():
        return 1
    return cores_share(weight.shape[0], torch.get_num_threads())


@cache
def cores_share(rows: int, cores: int) -> int:
    """The least number of equal blocks, of 16 rows at least, that gives every core one; else the most that there are
    for some of them."""
    most = max(rows // 16, 1)
    enough = (n for n in range(cores, min(most, 4 * cores) + 1) if rows % n == 0)
    return next(enough, None) or next(n for n in range(min(cores, most), 0, -1) if rows % n == 0)


def swiglu(gate_up: Tensor, size: int) -> Tensor:
    """`[B, size]`, silu(gate) · up, of rows that begin with gate and up."""
    if dispatch.no_device(gate_up) is None:
        from linearize.ops.products_triton import swiglu as kernel

        with torch.cuda.device_of(gate_up):
            return kernel(gate_up, size)
    gate, up = gate_up[:, : 2 * size].chunk(2, dim=1)
    return F.silu(gate).mul_(up)
