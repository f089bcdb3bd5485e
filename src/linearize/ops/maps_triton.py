"""Kernels of learned maps: x + U V x, of length 1, in one pass over x; and its gradients.

A program has rows of 64 tokens of one head, one after the other: `blocks` `[B * T / 64]` are dealt out to as many
programs as a head has. x is `[N, H, D]`, V, `down`, `[H, D, R]`, and U, `up`, `[H, R, D]`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.ops.liger_triton import product

ROWS = tl.constexpr(64)
LEAST = tl.constexpr(1e-12)  # that a row is divided by, as `torch.nn.functional.normalize` has it
PROGRAMS = 128  # of a head, in the backward pass


@triton.jit
def load_rows(x, block, head, columns, N, H: tl.constexpr, D: tl.constexpr):
    """A block of one head, 0 past the end."""
    rows = block * ROWS + tl.arange(0, ROWS)
    place = (rows[:, None].to(tl.int64) * H + head) * D + columns[None, :]
    return tl.load(x + place, mask=(rows < N)[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def store_rows(x, block, head, columns, values, N, H: tl.constexpr, D: tl.constexpr):
    """As `load_rows` reads it."""
    rows = block * ROWS + tl.arange(0, ROWS)
    place = (rows[:, None].to(tl.int64) * H + head) * D + columns[None, :]
    tl.store(x + place, values.to(x.dtype.element_ty), mask=(rows < N)[:, None] & (columns < D)[None, :])


@triton.jit
def load_maps(down, up, head, columns, ranks, D: tl.constexpr, R: tl.constexpr):
    """V `[DP, RP]` and U `[RP, DP]` of one head, 0 past them."""
    inside = (columns < D)[:, None] & (ranks < R)[None, :]
    v = tl.load(down + (head * D + columns[:, None]) * R + ranks[None, :], mask=inside, other=0.0)
    u = tl.load(up + (head * R + ranks[:, None]) * D + columns[None, :], mask=tl.trans(inside), other=0.0)
    return v, u


@triton.jit(do_not_specialize=["N"])
def map_kernel(
    x, down, up, output, N,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of one block."""
    block, head, columns, ranks = tl.program_id(0), tl.program_id(1), tl.arange(0, DP), tl.arange(0, RP)
    v, u = load_maps(down, up, head, columns, ranks, D, R)
    raw = load_rows(x, block, head, columns, N, H, D)
    made = raw.to(tl.float32) + product(product(raw, v, DTYPE), u, DTYPE)
    length = tl.maximum(tl.sqrt(tl.sum(made * made, 1)), LEAST)
    store_rows(output, block, head, columns, made / length[:, None], N, H, D)


@triton.jit(do_not_specialize=["N"])
def map_gradients_kernel(
    x, down, up, doutput, dx, ddown, dup, N,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of some blocks; what they give the maps goes to `ddown` `[programs, H, D, R]` and `dup` `[programs, H, R, D]`."""
    program, head, columns, ranks = tl.program_id(0), tl.program_id(1), tl.arange(0, DP), tl.arange(0, RP)
    v, u = load_maps(down, up, head, columns, ranks, D, R)
    dv, du = tl.zeros([DP, RP], tl.float32), tl.zeros([RP, DP], tl.float32)
    for block in range(program, tl.cdiv(N, ROWS), tl.num_programs(0)):
        raw = load_rows(x, block, head, columns, N, H, D)
        low = product(raw, v, DTYPE)
        made = raw.to(tl.float32) + product(low, u, DTYPE)
        length = tl.sqrt(tl.sum(made * made, 1))[:, None]
        unit = made / tl.maximum(length, LEAST)
        dunit = load_rows(doutput, block, head, columns, N, H, D).to(tl.float32)
        along = tl.where(length > LEAST, tl.sum(unit * dunit, 1)[:, None], 0.0)
        dmade = (dunit - along * unit) / tl.maximum(length, LEAST)
        dlow = product(dmade, tl.trans(u), DTYPE)
        store_rows(dx, block, head, columns, dmade + product(dlow, tl.trans(v), DTYPE), N, H, D)
        du += product(tl.trans(low), dmade, DTYPE)
        dv += product(tl.trans(raw), dlow, DTYPE)
    place = program * H + head
    inside = (columns < D)[:, None] & (ranks < R)[None, :]
    tl.store(ddown + (place * D + columns[:, None]) * R + ranks[None, :], dv, mask=inside)
    tl.store(dup + (place * R + ranks[:, None]) * D + columns[None, :], du, mask=tl.trans(inside))


def told(x: Tensor, down: Tensor) -> dict:
    """Shapes and the type of operands, that of x."""
    (*_, H, D), R = x.shape, down.shape[2]
    dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(x.dtype, tl.float32)
    sizes = {"D": D, "DP": max(16, triton.next_power_of_2(D)), "R": R, "RP": max(16, triton.next_power_of_2(R))}
    return {"H": H, **sizes, "DTYPE": dtype, "num_warps": 4, "num_stages": 1}


@torch.library.custom_op("linearize::map", mutates_args=())
def mapped(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """As `maps.mapped`. One operator, which `torch.compile` does not open."""
    N, H = x.shape[:-2].numel(), x.shape[-2]
    output = torch.empty_like(x, dtype=torch.float32)
    with torch.cuda.device_of(x):  # kernels run on the current device; backward, autograd sees to it
        map_kernel[(triton.cdiv(N, ROWS.value), H)](x, down, up, output, N, **told(x, down))
    return output


@torch.library.custom_op("linearize::map_gradients", mutates_args=())
def gradients(doutput: Tensor, x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, V and U."""
    N, H = x.shape[:-2].numel(), x.shape[-2]
    programs = min(PROGRAMS, triton.cdiv(N, ROWS.value))
    dx, ddown, dup = torch.empty_like(x), *(m.new_empty(programs, *m.shape, dtype=torch.float32) for m in (down, up))
    map_gradients_kernel[(programs, H)](x, down, up, doutput, dx, ddown, dup, N, **told(x, down))
    return dx, ddown.sum(0).to(down.dtype), dup.sum(0).to(up.dtype)


@mapped.register_fake
def _(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


@gradients.register_fake
def _(doutput: Tensor, x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(down), torch.empty_like(up)


mapped.register_autograd(
    lambda ctx, doutput: gradients(doutput.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
