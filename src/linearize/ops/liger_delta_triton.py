"""What the kernels of the delta rule share; its equations are in `liger_delta_forward_triton`.

A program works on one chunk of 64 tokens of one head. q and k are of length 1, after the feature map. Where FEATURE is
"given", so are q, k, β and the log decay, nothing is added to anything, and there are no mixing weights; values then
may be of another size than keys. Tensors are contiguous: q `[B, T, H, D]`; o `[B, T, H, V]`; k, key, left
`[B, T, KV, D]`; v, residual `[B, T, KV, V]`; β and the log decay `[B * KV, T]` in fp32; X `[B * KV, chunks, C, C]`;
states `[B * KV, chunks, D, V]`. DP and VP are D and V rounded up to a power of two.

The passes over the states go from chunk to chunk. A long sequence of few heads is cut into segments of chunks: over a
segment S becomes P S + N, where N is what the pass makes of no state, and P what it makes of the identity if nothing is
written, both for all segments at once. From these follows what enters each segment, and then all pass again, each from
its own state. Backward likewise, with Pᵀ. These loops say STAGES themselves, so that the compiler loads all that a
chunk needs ahead of it, and not only operands of products; from three on, since with two it waits for what it begins to
load.
"""

import triton
import triton.language as tl

from linearize.ops.liger_steep_triton import decay_between
from linearize.ops.liger_triton import CHUNK, LIMIT, continues, exp, load_first, load_last_first

LEAST = tl.constexpr(1e-12)  # length of a vector; shorter ones are not made longer than this makes them

# --- tiles ---


@triton.jit
def load_square(squares, place):
    """One chunk's tokens by its tokens `[C, C]`."""
    i = tl.arange(0, CHUNK)
    return tl.load(squares + place * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :])


@triton.jit
def store_square(squares, place, values):
    """As `load_square` reads it."""
    i = tl.arange(0, CHUNK)
    offsets = place * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :]
    tl.store(squares + offsets, values.to(squares.dtype.element_ty))


@triton.jit
def load_matrix(states, place, channels, columns, D: tl.constexpr, V: tl.constexpr):
    """One state, or its gradient, `[DP, VP]`, 0 outside the head."""
    inside = (channels < D)[:, None] & (columns < V)[None, :]
    return tl.load(states + place * D * V + channels[:, None] * V + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_matrix(states, place, channels, columns, state, D: tl.constexpr, V: tl.constexpr):
    """As `load_matrix` reads it."""
    inside = (channels < D)[:, None] & (columns < V)[None, :]
    offsets = channels[:, None] * V + columns[None, :]
    tl.store(states + place * D * V + offsets, state.to(states.dtype.element_ty), mask=inside)


# --- features ---


@triton.jit
def unit(x, columns, D: tl.constexpr, FEATURE: tl.constexpr):
    """The feature map of x `[C, DP]` at length 1, and one over the length of what was scaled `[C, 1]`."""
    scale = tl.full([CHUNK, 1], 1.0, tl.float32)
    if FEATURE != "given":
        if FEATURE == "softmax":
            x = tl.where((columns < D)[None, :], x, -float("inf"))
            x = exp(x - tl.max(x, 1)[:, None])
        scale = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), LEAST)[:, None]
        x = x * scale
    return x, scale


@triton.jit
def unit_backward(y, scale, dy, FEATURE: tl.constexpr):
    """The gradient of `unit`'s input from its results and their gradient; that of a softmax sums to 0."""
    if FEATURE != "given":
        dy -= y * tl.sum(y * dy, 1)[:, None]
        dy = y * dy if FEATURE == "softmax" else scale * dy
    return dy


# --- decay within a chunk ---


@triton.jit
def load_sums(log_g, rows, T, GATED: tl.constexpr):
    """Of one chunk's log decays, the sums from its start up to and with each token, and from after each token to the
    chunk's end `[C]`: the second is never made by subtraction, since one -1e4 would swallow its neighbours."""
    to_query, to_end = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    if GATED:
        later = rows + 1
        to_query = tl.cumsum(tl.load(log_g + rows, mask=rows < T, other=0.0), 0)
        after = tl.load(log_g + later, mask=(later < T) & (later % CHUNK != 0), other=0.0)
        to_end = tl.cumsum(after, 0, reverse=True)
    return to_query, to_end


@triton.jit
def decay_mask(log_g, to_query, rows, T, GATED: tl.constexpr):
    """exp(log decay from key j to query i) `[C, C]`, for j up to i."""
    between = tl.full([CHUNK, CHUNK], 1.0, tl.float32)
    if GATED:
        if tl.min(to_query) > LIMIT:
            between = exp(tl.minimum(to_query[:, None] - to_query[None, :], 0.0))
        else:
            between = decay_between(tl.load(log_g + rows, mask=rows < T, other=0.0)[:, None])
    return between


# --- who sees whom ---


@triton.jit
def reached(values, starts, start, PACKED: tl.constexpr):
    """`values` of tokens that the state before the chunk reaches, else 0 `[C]`."""
    if PACKED:
        values = tl.where(continues(starts, start), values, 0.0)
    return values


@triton.jit
def reach(log_g, first, rows, start, T, GATED: tl.constexpr, PACKED: tl.constexpr):
    """The share of the state before a chunk that each token finds `[C]`."""
    to_query, _ = load_sums(log_g, rows, T, GATED)
    return reached(exp(to_query), load_first(first, rows, T, PACKED), start, PACKED)


@triton.jit
def lasting(values, first, rows, start, T, PACKED: tl.constexpr):
    """`values` of tokens that the chunk's last one still sees, else 0 `[C]`."""
    if PACKED:
        values = tl.where(rows >= load_last_first(first, start, T, PACKED), values, 0.0)
    return values


@triton.jit
def kept(log_g, first, rows, start, T, GATED: tl.constexpr, PACKED: tl.constexpr):
    """The share of the state before a chunk that is left after it."""
    share = 1.0
    if GATED:
        share = exp(tl.sum(tl.load(log_g + rows, mask=rows < T, other=0.0), 0))
    if PACKED:
        share = tl.where(continues(load_last_first(first, start, T, PACKED), start), share, 0.0)
    return share


# --- segments ---


@triton.jit
def entering(
    initial, place, channels, columns, D: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, STORE: tl.constexpr
):
    """The state with which a segment begins `[DP, BV]`; without STORE nothing and, from column VP on, the identity."""
    if STORE:
        state = load_matrix(initial, place, channels, columns, D, V)
    else:
        state = tl.where(channels[:, None] + VP == columns[None, :], 1.0, 0.0)
    return state


@triton.jit
def store_effect(effects, place, channels, columns, state, D: tl.constexpr, V: tl.constexpr, VP: tl.constexpr):
    """What a segment made of `entering` without STORE, N and P side by side `[D, V + D]`."""
    ours = tl.where(columns < VP, columns < V, columns < VP + D)
    offsets = channels[:, None] * (V + D) + tl.where(columns < VP, columns, columns - VP + V)[None, :]
    tl.store(effects + place * D * (V + D) + offsets, state, mask=(channels < D)[:, None] & ours[None, :])
