"""Forward kernels of the delta rule: that of Liger Attention, added to what `liger_window_triton` writes, or alone.

With b the log decay up to and with each token of a chunk, S the state before it, and D_ij = exp(b_i - b_j) from key j
to query i, what the tokens really write, u, solves

    (1 + A) u = r,    A_ij = β_i D_ij k_i·k_j for j < i,    r = β (v - exp(b) k S)

r, `residual`, is what each would write if it were alone in the chunk. With the inverse X of 1 + A, `solved`,
o = exp(b) q S + M r with M = (D · q kᵀ) X, and S ← exp(b_C) S + leftᵀ r with left = Xᵀ (exp(b_C - b) k), what later
tokens leave of each key.

Why r and not u = X r: where keys are nearly the same and β is near 2, the u of a chunk are large and nearly cancel in
every sum over tokens, so that rounding them, or their weights, is felt many times over; of M r and leftᵀ r nothing
cancels. X and q kᵀ, which are to be multiplied, have entries of at most 2 and are FINE: fp16 where all else is bf16.

Shapes as in `liger_delta_triton`.
"""

import triton
import triton.language as tl

from linearize.ops.liger_delta_triton import (
    decay_mask,
    entering,
    kept,
    lasting,
    load_matrix,
    load_square,
    load_sums,
    reach,
    reached,
    store_effect,
    store_matrix,
    unit,
)
from linearize.ops.liger_steep_triton import decay_between
from linearize.ops.liger_triton import (
    CHUNK,
    LEVELS,
    LIMIT,
    document_mask,
    exp,
    load_first,
    load_tile,
    log_sigmoid,
    product,
    sigmoid,
    store_tile,
)

# --- the chunk by itself ---


@triton.jit
def exact(x, y, DTYPE: tl.constexpr):
    """x y with nearly fp32's precision: in half the precision, both are split in two."""
    if tl.float32 == DTYPE:
        z = product(x, y, DTYPE)
    else:
        x_high, y_high = x.to(DTYPE), y.to(DTYPE)
        z = product(x_high, y - y_high.to(tl.float32), DTYPE) + product(x - x_high.to(tl.float32), y_high, DTYPE)
        z += product(x_high, y_high, DTYPE)
    return z


@triton.jit
def inverse(a, DTYPE: tl.constexpr):
    """(1 + a)^-1 `[C, C]` of a strictly lower triangle: inverses X and Z of neighbouring blocks on the diagonal, with
    c below the first, merge to [[X, 0], [-Z c X, Z]]; 1 + 1 tokens, 2 + 2, ..."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    x = tl.where(i == j, 1.0, tl.where((i // 2 == j // 2) & (i > j), -a, 0.0))
    for level in range(1, LEVELS):
        size = 1 << level
        below = (i // (2 * size) == j // (2 * size)) & ((i & size) != 0) & ((j & size) == 0)
        x -= exact(exact(x, tl.where(below, a, 0.0), DTYPE), x, DTYPE)
    return x


@triton.jit(do_not_specialize=["T"])
def delta_solve_kernel(
    k, first, key, left, solved, beta, log_g, T, rate, strength,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FEATURE: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, DTYPE: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """Keys, gates, and what they alone make of a chunk: X, `solved`, and `left`; β = strength · σ(mean of k),
    unless given."""
    chunk, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = chunk * CHUNK
    i, rows, columns = tl.arange(0, CHUNK), start + tl.arange(0, CHUNK), tl.arange(0, DP)
    at = (pair // KV * T * KV + pair % KV) * D
    first += pair // KV * T
    starts = load_first(first, rows, T, PACKED)
    x = load_tile(k + at, rows, columns, T, KV * D, D).to(tl.float32)
    beta += pair * T
    log_g += pair * T
    pooled = tl.sum(x, 1) / D
    if FEATURE == "given":
        write = tl.load(beta + rows, mask=rows < T, other=0.0)
    else:
        write = tl.where(rows < T, strength * sigmoid(pooled), 0.0)
        tl.store(beta + rows, write, mask=rows < T)
    between = tl.full([CHUNK, CHUNK], 1.0, tl.float32)
    if GATED:
        if FEATURE == "given":
            decay = tl.load(log_g + rows, mask=rows < T, other=0.0)
        else:
            decay = tl.where(rows < T, log_sigmoid(pooled) * rate, 0.0)
            tl.store(log_g + rows, decay, mask=rows < T)
        to_query = tl.cumsum(decay, 0)
        if tl.min(to_query) > LIMIT:
            between = exp(tl.minimum(to_query[:, None] - to_query[None, :], 0.0))
        else:
            between = decay_between(decay[:, None])
    unit_key, _ = unit(x, columns, D, FEATURE)
    unit_key = tl.where((rows < T)[:, None], unit_key, 0.0).to(FINE)
    store_tile(key + at, rows, columns, unit_key, T, KV * D, D)
    seen = (rows[:, None] > rows[None, :]) & (rows[None, :] >= starts[:, None])
    a = tl.where(seen, write[:, None] * between * product(unit_key, tl.trans(unit_key), FINE), 0.0)
    inverted = inverse(a, FINE)
    place = solved + (pair * tl.num_programs(0) + chunk) * CHUNK * CHUNK
    tl.store(place + i[:, None] * CHUNK + i[None, :], inverted.to(FINE))
    ending = lasting(tl.sum(tl.where(i[:, None] == CHUNK - 1, between, 0.0), 0), first, rows, start, T, PACKED)
    inverted *= ending[:, None]
    store_tile(left + at, rows, columns, product(tl.trans(inverted), unit_key, FINE), T, KV * D, D)


# --- states and output ---


@triton.jit(do_not_specialize=["T", "SEGMENT"])
def delta_states_kernel(
    key, v, left, first, beta, log_g, initial, states, residual, final, T, SEGMENT,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, STAGES: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """The state before every chunk, and its tokens' r, for BV value channels of one head and one segment of SEGMENT
    chunks, from `initial` `[B * KV, segments, D, V]`; `final` `[B * KV, D, V]` is the state after the last segment.
    Without STORE, what a segment makes of `entering` goes to `final`, as `store_effect` has it, and nothing else."""
    block, segment, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments, chunks = tl.num_programs(1), tl.cdiv(T, CHUNK)
    at = pair // KV * T * KV + pair % KV
    first += pair // KV * T
    beta += pair * T
    log_g += pair * T
    channels, columns = tl.arange(0, DP), block * BV + tl.arange(0, BV)
    state = entering(initial, pair * segments + segment, channels, columns, D, V, VP, STORE)
    begin, end = segment * SEGMENT, tl.minimum(chunks, (segment + 1) * SEGMENT)
    for chunk in tl.range(begin, end, num_stages=STAGES if STAGES > 2 else None):
        start = chunk * CHUNK
        rows = start + tl.arange(0, CHUNK)
        unit_key = load_tile(key + at * D, rows, channels, T, KV * D, D)
        values = load_tile(v + at * V, rows, columns, T, KV * V, V).to(tl.float32)
        remainder = load_tile(left + at * D, rows, channels, T, KV * D, D)
        write = tl.load(beta + rows, mask=rows < T, other=0.0)
        if STORE:
            store_matrix(states, pair * chunks + chunk, channels, columns, state, D, V)
        reaching = reach(log_g, first, rows, start, T, GATED, PACKED)
        gain = write[:, None] * (values - reaching[:, None] * product(unit_key, state, DTYPE))
        if STORE:
            store_tile(residual + at * V, rows, columns, gain, T, KV * V, V)
        state *= kept(log_g, first, rows, start, T, GATED, PACKED)
        state += product(tl.trans(remainder), gain, DTYPE)
    if not STORE:
        store_effect(final, pair * segments + segment, channels, columns, state, D, V, VP)
    elif segment == segments - 1:
        store_matrix(final, pair, channels, columns, state, D, V)


@triton.jit(do_not_specialize=["SEGMENTS"])
def delta_carry_kernel(
    initial, effects, starts, SEGMENTS, D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """What enters each segment, `starts` `[B * KV, SEGMENTS, D, V]`, from N and P of all but the last, `effects`
    `[B * KV, SEGMENTS - 1, D, V + D]`; in fp32, so that a state is rounded no more often than without segments. Where
    P is too large for a program, it is read in PART columns, and the state from where it was just written."""
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels, columns = tl.arange(0, DP), block * BV + tl.arange(0, BV)
    state = load_matrix(initial, pair, channels, columns, D, V)
    store_matrix(starts, pair * SEGMENTS, channels, columns, state, D, V)
    for n in range(SEGMENTS - 1):
        made = effects + (pair * (SEGMENTS - 1) + n) * D * (V + D)
        added = load_tile(made, channels, columns, D, V + D, V)
        if PART == DP:
            state = product(load_tile(made + V, channels, channels, D, V + D, D), state, tl.float32) + added
        else:
            tl.debug_barrier()  # other threads have written what is read
            state = added
            for first in range(0, D, PART):
                some = first + tl.arange(0, PART)
                entered = load_matrix(starts, pair * SEGMENTS + n, some, columns, D, V)
                state += product(load_tile(made + V, channels, some, D, V + D, D), entered, tl.float32)
        store_matrix(starts, pair * SEGMENTS + n + 1, channels, columns, state, D, V)


@triton.jit(do_not_specialize=["T"])
def delta_output_kernel(
    q, key, residual, solved, mixing, first, log_g, states, output, T,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    FEATURE: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """To the output, w · recurrence, for one chunk and one query head; alone, the recurrence is the output."""
    chunk, chunks, H = tl.program_id(0), tl.num_programs(0), KV * GROUPS
    index = tl.program_id(1).to(tl.int64)  # of a query head among all sequences
    batch, query_head, pair = index // H, index % H, index // GROUPS
    ours, theirs = batch * T * H + query_head, batch * T * KV + query_head // GROUPS
    start = chunk * CHUNK
    rows, channels, columns = start + tl.arange(0, CHUNK), tl.arange(0, DP), tl.arange(0, VP)
    starts = load_first(first + batch * T, rows, T, PACKED)
    to_query, _ = load_sums(log_g + pair * T, rows, T, GATED)
    between = decay_mask(log_g + pair * T, to_query, rows, T, GATED)
    query, _ = unit(load_tile(q + ours * D, rows, channels, T, H * D, D).to(tl.float32), channels, D, FEATURE)
    query = query.to(DTYPE)
    unit_key = load_tile(key + theirs * D, rows, channels, T, KV * D, D)
    p = tl.where(document_mask(rows, rows, starts), between * product(query, tl.trans(unit_key), DTYPE), 0.0)
    m = product(p, load_square(solved, pair * chunks + chunk), FINE)
    out = product(query, load_matrix(states, pair * chunks + chunk, channels, columns, D, V), DTYPE)
    out *= reached(exp(to_query), starts, start, PACKED)[:, None]
    out += product(m, load_tile(residual + theirs * V, rows, columns, T, KV * V, V), DTYPE)
    if FEATURE != "given":
        out *= tl.load(mixing + query_head)
        out += load_tile(output + ours * V, rows, columns, T, H * V, V).to(tl.float32)
    store_tile(output + ours * V, rows, columns, out, T, H * V, V)
