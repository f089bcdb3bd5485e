"""Tiles in parts: the halves of a head's channels by themselves.

RoPE, as rotate-half, turns one half by the other, and a product over channels is the sum of two, so that halves need
not be put together, for which a program would wait at a barrier. Where not all channels are rotated, and on GPUs whose
products take operands from registers, which would not hold as many, a tile is its own two parts.
"""

import triton
import triton.language as tl

from linearize.ops.liger_triton import (
    exp,
    load_gate,
    load_rope,
    load_tile,
    partner_of,
    product,
    rotate_back,
    rotated,
    store_tile,
)

# --- loads and stores ---


@triton.jit
def load_parts(base, rows, columns, T, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALVES: tl.constexpr):
    """What `turned` and `turned_parts` make a tile of: both halves of the channels, if HALVES or where all are rotated;
    else the tile and the channels that each is rotated with."""
    DP: tl.constexpr = columns.shape[0]
    if HALVES or R == DP:
        left = tl.arange(0, DP // 2)
        x, partner = load_tile(base, rows, left, T, STRIDE, D), load_tile(base + DP // 2, rows, left, T, STRIDE, D)
    elif R > 0:
        x = load_tile(base, rows, columns, T, STRIDE, D)
        partner = load_tile(base, rows, partner_of(columns, R), T, STRIDE, D)
    else:
        x = load_tile(base, rows, columns, T, STRIDE, D)
        partner = x
    return x, partner


@triton.jit
def store_parts(base, rows, columns, x, right, T, STRIDE: tl.constexpr, D: tl.constexpr, HALVES: tl.constexpr):
    """A tile of two halves if HALVES, else `x`."""
    if HALVES:
        left = tl.arange(0, columns.shape[0] // 2)
        store_tile(base, rows, left, x, T, STRIDE, D)
        store_tile(base + columns.shape[0] // 2, rows, left, right, T, STRIDE, D)
    else:
        store_tile(base, rows, columns, x, T, STRIDE, D)


# --- rotary position embedding ---


@triton.jit
def whole(x, partner, rows, columns, R: tl.constexpr):
    """A tile as it is, of `load_parts`."""
    DP: tl.constexpr = columns.shape[0]
    if R == DP:
        x = tl.reshape(tl.permute(tl.join(x, partner), [0, 2, 1]), [rows.shape[0], DP])
    return x


@triton.jit
def load_rope_half(cos, sin, rows, T, R: tl.constexpr):
    """Cosine and sine of the first half of the R channels; the other half has the same."""
    channels = tl.arange(0, R // 2)
    inside = ((rows >= 0) & (rows < T))[:, None]
    offsets = rows[:, None] * R + channels[None, :]
    c, s = tl.load(cos + offsets, mask=inside, other=1.0), tl.load(sin + offsets, mask=inside, other=0.0)
    return c.to(tl.float32), s.to(tl.float32)


@triton.jit
def turned(x, partner, rows, columns, cos, sin, T, R: tl.constexpr):
    """A tile after RoPE, of `load_parts`."""
    dtype = x.dtype
    DP: tl.constexpr = columns.shape[0]
    if R == DP:
        x, partner = turned_parts(x, partner, rows, columns, cos, sin, T, R, True)
        x = whole(x, partner, rows, columns, R)
    elif R > 0:
        c, s = load_rope(cos, sin, rows, columns, T, R)
        x = rotated(x, partner, c, s).to(dtype)
    return x


@triton.jit
def turned_parts(x, partner, rows, columns, cos, sin, T, R: tl.constexpr, HALVES: tl.constexpr):
    """A tile after RoPE, of `load_parts`, in parts: none where R is 0."""
    if HALVES:
        if R > 0:
            c, s = load_rope_half(cos, sin, rows, T, R)
            dtype = x.dtype
            left, right = x.to(tl.float32), partner.to(tl.float32)
            x, partner = (left * c - right * s).to(dtype), (right * c + left * s).to(dtype)
    else:
        x = turned(x, partner, rows, columns, cos, sin, T, R)
        partner = x
    return x, partner


@triton.jit
def turned_back(dx, right, rows, columns, cos, sin, T, R: tl.constexpr, HALVES: tl.constexpr):
    """A gradient, in parts, of a tile after RoPE as that before it."""
    if HALVES:
        if R > 0:
            c, s = load_rope_half(cos, sin, rows, T, R)
            dx, right = dx * c + right * s, right * c - dx * s
    else:
        dx = rotate_back(dx, rows, columns, cos, sin, T, R)
        right = dx
    return dx, right


@triton.jit
def load_turned(base, rows, columns, cos, sin, T, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """`load_tile`, after RoPE."""
    x, partner = load_parts(base, rows, columns, T, STRIDE, D, R, False)
    return turned(x, partner, rows, columns, cos, sin, T, R)


# --- products ---


@triton.jit
def product_of_parts(x, x_right, y, y_right, HALVES: tl.constexpr, DTYPE: tl.constexpr):
    """x yᵀ of tiles in parts."""
    z = product(x, tl.trans(y), DTYPE)
    if HALVES:
        z = tl.dot(x_right.to(DTYPE), tl.trans(y_right.to(DTYPE)), z, input_precision="tf32x3")
    return z


@triton.jit
def near_halves(
    x, right, for_queries, batch, head, rows, T, KV: tl.constexpr, D: tl.constexpr, FEATURE: tl.constexpr,
    SCALAR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Near queries of the halves of queries."""
    half = tl.arange(0, D // 2)
    decay = load_gate(for_queries, batch, head, rows, half, T, KV, D, SCALAR)
    decay_right = decay
    if not SCALAR:
        decay_right = load_gate(for_queries + D // 2, batch, head, rows, half, T, KV, D, SCALAR)
    x, right = x.to(tl.float32), right.to(tl.float32)
    if FEATURE == "softmax":
        largest = tl.max(tl.maximum(x, right), 1)[:, None]
        x, right = exp(x - largest), exp(right - largest)
        share = 1.0 / tl.sum(x + right, 1)[:, None]
        x, right = x * share, right * share
    return (x * decay).to(DTYPE), (right * decay_right).to(DTYPE)


@triton.jit
def load_state_parts(state, columns, D: tl.constexpr, HALVES: tl.constexpr):
    """A state `[D, D]`: its upper and lower half if HALVES, else itself, twice."""
    if HALVES:
        half = tl.arange(0, D // 2)
        upper, lower = load_tile(state, half, columns, D, D, D), load_tile(state, D // 2 + half, columns, D, D, D)
    else:
        upper = load_tile(state, columns, columns, D, D, D)
        lower = upper
    return upper, lower


@triton.jit
def read_state(x, right, upper, lower, HALVES: tl.constexpr, DTYPE: tl.constexpr):
    """x, in parts, times a state, of `load_state_parts`."""
    z = product(x, upper, DTYPE)
    if HALVES:
        z = tl.dot(right.to(DTYPE), lower.to(DTYPE), z, input_precision="tf32x3")
    return z
