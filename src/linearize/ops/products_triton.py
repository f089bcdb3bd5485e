"""The matrix products of a decoding step, for few rows: with the norm before them and what follows them in one kernel.

A program has some rows of the weight and all rows of x, and goes over their columns; each of its SLICES takes columns
of its own, so that warps need not wait for each other's sums, which are added up at the end, in one order. What
divides by the root mean square, a number for each row, is taken out of the product: squares are summed on the way, and
the sums divided. Operands are rounded once, x times the norm's weight, and results once; everything else is in fp32.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from linearize.ops.dispatch import can_overlap
from linearize.ops.products import Linear, Norm

LEAST = 16  # the smallest side of a matrix product
LINE = tl.constexpr(64)  # columns of 16 bits in a line of the cache


class Launch(NamedTuple):
    """How a product runs."""

    rows: int  # of the weight, that a program has: of 3,072 by 24 none of 132 multiprocessors has two
    columns: int  # of a slice, at a time
    slices: int
    num_warps: int
    num_stages: int
    ahead: int = 0  # lines of each row, a power of two, fetched while the kernel ahead works; 0: it is waited for first


# by kernel, and rows and columns of the weight; measured on an H100 by `benchmarks.products`, those of 2,048 columns or
# rows on an H200, those that begin ahead so; rows of 24 and 48, and who begins ahead, in whole steps. That pays where
# kernels are over soon, or, in larger models, do not take bandwidth from the one that is waited for
LAUNCHES: dict[str, dict[tuple[int, int], Launch]] = {
    "product": {
        (960, 576): Launch(8, 64, 4, 4, 4, 16),
        (3072, 2048): Launch(24, 64, 4, 4, 4),
        (6144, 4096): Launch(48, 64, 4, 4, 4),
    },
    "swiglu": {
        (1536, 576): Launch(16, 64, 2, 2, 6, 8),
        (8192, 2048): Launch(32, 64, 2, 2, 3),
        (14336, 4096): Launch(32, 128, 1, 4, 3),
    },
    "add": {
        (576, 576): Launch(8, 64, 2, 2, 6, 16),
        (576, 1536): Launch(8, 64, 4, 4, 6, 32),
        (2048, 2048): Launch(16, 64, 4, 4, 6, 16),
        (2048, 8192): Launch(16, 64, 4, 4, 6, 1),
        (4096, 4096): Launch(8, 128, 2, 2, 4),
        (4096, 14336): Launch(16, 128, 4, 4, 3),
    },
}


@triton.jit
def prefetch(weight, rows, K: tl.constexpr, LINES: tl.constexpr):
    """The beginning of these rows comes into the L2 cache, a line of it for 128 bytes."""
    columns = tl.minimum(tl.arange(0, LINES) * LINE, K - 1)
    places = weight + rows[:, None] * K + columns[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def weight_tile(weight, rows, columns, first, N, K: tl.constexpr):
    """`[(SLICES,) BK, BN]` of the N rows from the first on, 0 outside."""
    inside = (rows < N) & (columns < K)
    return tl.load(weight + (first + rows) * K + columns, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["B"])  # one program for any number of rows
def product_kernel(
    x, norm, weight, bias, output, B, N, epsilon,
    K: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr,
    NORM: tl.constexpr, SWIGLU: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    WAITS: tl.constexpr, TELLS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """x `[B, K]`, normalised if NORM, times weight `[N, K]`, plus bias `[N]` if BIAS; of SWIGLU both are as long again,
    and the second half's result is multiplied by silu of the first's. `[B, N]` is put out or, if ADD, added."""
    mine, batch = tl.program_id(0) * ROWS + tl.arange(0, BN), tl.arange(0, BM)
    if ROWS < BN:  # the others' rows are none
        mine = tl.where(tl.arange(0, BN) < ROWS, mine, N)
    if WAITS:
        prefetch(weight, tl.minimum(mine, N - 1), K, LINES)
        if SWIGLU:
            prefetch(weight, N + tl.minimum(mine, N - 1), K, LINES)
        tl.extra.cuda.gdc_wait()
    if TELLS:
        tl.extra.cuda.gdc_launch_dependents()
    place, here = output + batch[:, None] * N + mine[None, :], (batch < B)[:, None] & (mine < N)[None, :]
    if ADD:  # loads wait long; this one while all others do
        before = tl.load(place, mask=here, other=0.0)

    if SLICES == 1:
        columns = tl.arange(0, BK)
        across, down, rows_x, rows_w = columns[None, :], columns[:, None], batch[:, None], mine[None, :]
        squares, result = tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BN), tl.float32)
    else:
        columns = tl.arange(0, SLICES)[:, None] * BK + tl.arange(0, BK)[None, :]
        across, down = columns[:, None, :], columns[:, :, None]
        rows_x, rows_w = batch[None, :, None], mine[None, None, :]
        squares, result = tl.zeros((SLICES, BM, BK), tl.float32), tl.zeros((SLICES, BM, BN), tl.float32)
    up = result
    for k in range(0, K, SLICES * BK):
        a = tl.load(x + rows_x * K + k + across, mask=(rows_x < B) & (k + across < K), other=0.0)
        if NORM:
            a = a.to(tl.float32)
            squares += a * a
            a *= tl.load(norm + k + across, mask=k + across < K, other=0.0).to(tl.float32)
        a = a.to(weight.dtype.element_ty)
        result = tl.dot(a, weight_tile(weight, rows_w, k + down, 0, N, K), result, input_precision="tf32x3")
        if SWIGLU:
            up = tl.dot(a, weight_tile(weight, rows_w, k + down, N, N, K), up, input_precision="tf32x3")

    factor, length = 1.0, tl.sum(squares, -1)
    if SLICES > 1:
        result, up, length = tl.sum(result, 0), tl.sum(up, 0), tl.sum(length, 0)
    if NORM:
        factor = 1.0 / tl.sqrt(length / K + epsilon)[:, None]
    result *= factor
    if BIAS:
        result += tl.load(bias + mine, mask=mine < N, other=0.0).to(tl.float32)[None, :]
    if SWIGLU:
        up *= factor
        if BIAS:
            up += tl.load(bias + N + mine, mask=mine < N, other=0.0).to(tl.float32)[None, :]
        result *= up / (1.0 + tl.exp(-result))
    if ADD:
        result += before.to(tl.float32)
    tl.store(place, result.to(output.dtype.element_ty), mask=here)


@triton.jit
def norm_kernel(x, weight, output, K, epsilon, BLOCK: tl.constexpr):
    """Rows of x divided by their root mean square, times `weight` `[K]`."""
    columns = tl.arange(0, BLOCK)
    inside, place = columns < K, tl.program_id(0).to(tl.int64) * K + columns
    row = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    row *= scale / tl.sqrt(tl.sum(row * row, 0) / K + epsilon)
    tl.store(output + place, row.to(output.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(gate_up, output, stride, size, BLOCK: tl.constexpr):
    """silu(gate) · up, of rows that begin with `[gate, up]`."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + columns, mask=inside, other=0.0).to(tl.float32)
    result = (gate / (1.0 + tl.exp(-gate))).to(output.dtype.element_ty).to(tl.float32) * up
    tl.store(output + row * size + columns, result.to(output.dtype.element_ty), mask=inside)


def normed(x: Tensor, norm: Norm) -> Tensor:
    """As `products.normed`; rows are contiguous."""
    (B, K), output = x.shape, torch.empty_like(x)
    block = triton.next_power_of_2(K)
    warps = min(max(block // 512, 1), 16)
    norm_kernel[(B,)](x, norm.weight, output, K, norm.epsilon, BLOCK=block, num_warps=warps)
    return output


def swiglu(gate_up: Tensor, size: int) -> Tensor:
    """As `products.swiglu`; rows are contiguous."""
    output = gate_up.new_empty(gate_up.shape[0], size)
    grid = gate_up.shape[0], triton.cdiv(size, 1024)
    swiglu_kernel[grid](gate_up, output, gate_up.stride(0), size, BLOCK=1024, num_warps=4)
    return output


def normed_product(x: Tensor, norm: Norm, linear: Linear) -> Tensor:
    """As `products.normed_product`."""
    output = x.new_empty(x.shape[0], linear[0].shape[0])
    run("product", x, norm, linear, output)
    return output


def normed_swiglu(x: Tensor, norm: Norm, linear: Linear, size: int) -> Tensor:
    """As `products.normed_swiglu`."""
    output = x.new_empty(x.shape[0], size)
    run("swiglu", x, norm, linear, output)
    return output


def add_product(hidden: Tensor, x: Tensor, linear: Linear) -> None:
    """As `products.add_product`."""
    run("add", x, None, linear, hidden)


def launch_of(kind: str, rows: int, columns: int) -> Launch:
    """What the table has of the shape that is the nearest, by the ratios of its sides."""

    def distance(shape: tuple[int, int]) -> float:
        return abs(math.log(shape[0] / rows)) + abs(math.log(shape[1] / columns))

    return LAUNCHES[kind][min(LAUNCHES[kind], key=distance)]


def run(kind: str, x: Tensor, norm: Norm | None, linear: Linear, output: Tensor) -> None:
    """One of `LAUNCHES`: x `[B, K]` by the weight into output `[B, N]`."""
    (B, K), N, (weight, bias) = x.shape, output.shape[1], linear
    launch, overlaps = launch_of(kind, N, K), can_overlap(x)
    waits = overlaps and launch.ahead > 0
    for stages in range(launch.num_stages, 0, -1):
        try:
            product_kernel[(triton.cdiv(N, launch.rows),)](
                x, weight if norm is None else norm.weight, weight, weight if bias is None else bias, output, B, N,
                0.0 if norm is None else norm.epsilon,
                K=K, BM=max(triton.next_power_of_2(B), LEAST), ROWS=launch.rows,
                BN=triton.next_power_of_2(launch.rows), BK=launch.columns, SLICES=launch.slices,
                NORM=norm is not None, SWIGLU=kind == "swiglu", BIAS=bias is not None, ADD=kind == "add",
                WAITS=waits, TELLS=overlaps, LINES=launch.ahead,
                num_warps=launch.num_warps, num_stages=stages, **({"launch_pdl": True} if waits else {}),
            )  # fmt: skip
            return
        except OutOfResources:  # before it ran: some devices have half the shared memory of others
            if stages == 1:
                raise
