"""The delta rule, forward and backward: that of Liger Attention, added to what `liger_window_triton` writes, or alone.

A program works on one chunk of 64 tokens of one head. With b the log decay up to and with each token of a chunk, S the
state before it, and D_ij = exp(b_i - b_j) from key j to query i, what the tokens really write, u, solves

    (1 + A) u = r,    A_ij = β_i D_ij k_i·k_j for j < i,    r = β (v - exp(b) k S)

r, `residual`, is what each would write if it were alone in the chunk. With the inverse X of 1 + A, `solved`,
o = exp(b) q S + M r with M = (D · q kᵀ) X, and S ← exp(b_C) S + leftᵀ r with left = Xᵀ (exp(b_C - b) k), what later
tokens leave of each key. Backward, z = Mᵀ do + left dS is the gradient of r, -z uᵀ that of A, dM Xᵀ that of D · q kᵀ.

Why r and not u = X r: where keys are nearly the same and β is near 2, the u of a chunk are large and nearly cancel in
every sum over tokens, so that rounding them, or their weights, is felt many times over; of M r and leftᵀ r nothing
cancels. X and q kᵀ, which are to be multiplied, have entries of at most 2 and are FINE: fp16 where all else is bf16.

q and k are of length 1, after the feature map. Where FEATURE is "given", so are q, k, β and the log decay, nothing is
added to anything, and there are no mixing weights. Tensors are contiguous: q, o `[B, T, H, D]`; k, v, key, residual,
left `[B, T, KV, D]`; β and the log decay `[B * KV, T]` in fp32; X `[B * KV, chunks, C, C]`; states
`[B * KV, chunks, D, D]`.

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
from linearize.ops.liger_triton import (
    CHUNK,
    GONE,
    LEVELS,
    LIMIT,
    exp,
    load_first,
    load_one_first,
    load_state,
    load_tile,
    log_sigmoid,
    product,
    sigmoid,
    store_state,
    store_tile,
)

FAINT = tl.constexpr(1e-4)  # a β with which entries of X, in fp16, have few digits left
LEAST = tl.constexpr(1e-12)  # length of a vector; shorter ones are not made longer than this makes them

# --- features and gates ---


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
def by_fine(x, y, DTYPE: tl.constexpr):
    """x yᵀ of an x that has no bounds and a y that is in fp16: in bf16, y is split in two."""
    high = y.to(DTYPE)
    z = product(x, tl.trans(high), DTYPE)
    if tl.float32 != DTYPE:
        z += product(x, tl.trans(y.to(tl.float32) - high.to(tl.float32)), DTYPE)
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


@triton.jit
def load_square(squares, place):
    """One chunk's tokens by its tokens `[C, C]`."""
    i = tl.arange(0, CHUNK)
    return tl.load(squares + place * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :])


# --- who sees whom ---


@triton.jit
def reached(values, starts, start, PACKED: tl.constexpr):
    """`[C]` for tokens that the state before the chunk reaches, else 0."""
    if PACKED:
        values = tl.where(starts < tl.maximum(start, 1), values, 0.0)
    return values


@triton.jit
def reach(log_g, first, rows, start, T, GATED: tl.constexpr, PACKED: tl.constexpr):
    """The share of the state before a chunk that each token finds `[C]`."""
    to_query, _ = load_sums(log_g, rows, T, GATED)
    return reached(exp(to_query), load_first(first, rows, T, PACKED), start, PACKED)


@triton.jit
def lasting(values, first, rows, start, T, PACKED: tl.constexpr):
    """`[C]` for tokens that the chunk's last one still sees, else 0."""
    if PACKED:
        values = tl.where(rows >= load_one_first(first, tl.minimum(start + CHUNK, T) - 1, PACKED), values, 0.0)
    return values


@triton.jit
def kept(log_g, first, rows, start, T, GATED: tl.constexpr, PACKED: tl.constexpr):
    """The share of the state before a chunk that is left after it."""
    share = 1.0
    if GATED:
        share = exp(tl.sum(tl.load(log_g + rows, mask=rows < T, other=0.0), 0))
    if PACKED:
        last_first = load_one_first(first, tl.minimum(start + CHUNK, T) - 1, PACKED)
        share = tl.where(last_first < tl.maximum(start, 1), share, 0.0)
    return share


# --- segments ---


@triton.jit
def entering(initial, place, channels, columns, D: tl.constexpr, DP: tl.constexpr, STORE: tl.constexpr):
    """The state with which a segment begins `[DP, BV]`; without STORE nothing and, from column DP on, the identity."""
    if STORE:
        inside = (channels < D)[:, None] & (columns < D)[None, :]
        offsets = channels[:, None] * D + columns[None, :]
        state = tl.load(initial + place * D * D + offsets, mask=inside, other=0.0)
    else:
        state = tl.where(channels[:, None] + DP == columns[None, :], 1.0, 0.0)
    return state


@triton.jit
def store_effect(effects, place, channels, columns, state, D: tl.constexpr, DP: tl.constexpr):
    """What a segment made of `entering` without STORE, N and P `[2, D, D]`."""
    side, column = columns // DP, columns % DP
    inside = (channels < D)[:, None] & (column < D)[None, :]
    offsets = (side * D * D + column)[None, :] + channels[:, None] * D
    tl.store(effects + place * 2 * D * D + offsets, state, mask=inside)


@triton.jit(do_not_specialize=["SEGMENTS"])
def delta_carry_kernel(initial, effects, starts, SEGMENTS, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr):
    """What enters each segment, `starts` `[B * KV, SEGMENTS, D, D]`, from N and P of all but the last, `effects`
    `[B * KV, SEGMENTS - 1, 2, D, D]`; in fp32, so that a state is rounded no more often than without segments."""
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels, columns = tl.arange(0, DP), block * BV + tl.arange(0, BV)
    inside = (channels < D)[:, None] & (columns < D)[None, :]
    offsets = channels[:, None] * D + columns[None, :]
    state = tl.load(initial + pair * D * D + offsets, mask=inside, other=0.0)
    tl.store(starts + pair * SEGMENTS * D * D + offsets, state, mask=inside)
    for n in range(SEGMENTS - 1):
        place = 2 * (pair * (SEGMENTS - 1) + n)
        added = tl.load(effects + place * D * D + offsets, mask=inside, other=0.0)
        state = product(load_state(effects, place + 1, channels, D), state, tl.float32) + added
        tl.store(starts + (pair * SEGMENTS + n + 1) * D * D + offsets, state, mask=inside)


# --- forward ---


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


@triton.jit(do_not_specialize=["T", "SEGMENT"])
def delta_states_kernel(
    key, v, left, first, beta, log_g, initial, states, residual, final, T, SEGMENT,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, STAGES: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """The state before every chunk, and its tokens' r, for BV value channels of one head and one segment of SEGMENT
    chunks, from `initial` `[B * KV, segments, D, D]`; `final` `[B * KV, D, D]` is the state after the last segment.
    Without STORE, what a segment makes of `entering` goes to `final`, as `store_effect` has it, and nothing else."""
    block, segment, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments, chunks = tl.num_programs(1), tl.cdiv(T, CHUNK)
    at = (pair // KV * T * KV + pair % KV) * D
    first += pair // KV * T
    beta += pair * T
    log_g += pair * T
    channels, columns = tl.arange(0, DP), block * BV + tl.arange(0, BV)
    inside = (channels < D)[:, None] & (columns < D)[None, :]
    offsets = channels[:, None] * D + columns[None, :]
    state = entering(initial, pair * segments + segment, channels, columns, D, DP, STORE)
    begin, end = segment * SEGMENT, tl.minimum(chunks, (segment + 1) * SEGMENT)
    for chunk in tl.range(begin, end, num_stages=STAGES if STAGES > 2 else None):
        start = chunk * CHUNK
        rows = start + tl.arange(0, CHUNK)
        unit_key = load_tile(key + at, rows, channels, T, KV * D, D)
        values = load_tile(v + at, rows, columns, T, KV * D, D).to(tl.float32)
        remainder = load_tile(left + at, rows, channels, T, KV * D, D)
        write = tl.load(beta + rows, mask=rows < T, other=0.0)
        if STORE:
            tl.store(states + (pair * chunks + chunk) * D * D + offsets, state.to(states.dtype.element_ty), mask=inside)
        reaching = reach(log_g, first, rows, start, T, GATED, PACKED)
        gain = write[:, None] * (values - reaching[:, None] * product(unit_key, state, DTYPE))
        if STORE:
            store_tile(residual + at, rows, columns, gain, T, KV * D, D)
        state *= kept(log_g, first, rows, start, T, GATED, PACKED)
        state += product(tl.trans(remainder), gain, DTYPE)
    if not STORE:
        store_effect(final, pair * segments + segment, channels, columns, state, D, DP)
    elif segment == segments - 1:
        tl.store(final + pair * D * D + offsets, state, mask=inside)


@triton.jit(do_not_specialize=["T"])
def delta_output_kernel(
    q, key, residual, solved, mixing, first, log_g, states, output, T,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FEATURE: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """To the output, w · recurrence, for one chunk and one query head; alone, the recurrence is the output."""
    chunk, chunks, H = tl.program_id(0), tl.num_programs(0), KV * GROUPS
    index = tl.program_id(1).to(tl.int64)  # of a query head among all sequences
    batch, query_head, pair = index // H, index % H, index // GROUPS
    ours, theirs = (batch * T * H + query_head) * D, (batch * T * KV + query_head // GROUPS) * D
    start = chunk * CHUNK
    rows, columns = start + tl.arange(0, CHUNK), tl.arange(0, DP)
    starts = load_first(first + batch * T, rows, T, PACKED)
    to_query, _ = load_sums(log_g + pair * T, rows, T, GATED)
    between = decay_mask(log_g + pair * T, to_query, rows, T, GATED)
    query, _ = unit(load_tile(q + ours, rows, columns, T, H * D, D).to(tl.float32), columns, D, FEATURE)
    query = query.to(DTYPE)
    unit_key = load_tile(key + theirs, rows, columns, T, KV * D, D)
    seen = (rows[:, None] >= rows[None, :]) & (rows[None, :] >= starts[:, None])
    p = tl.where(seen, between * product(query, tl.trans(unit_key), DTYPE), 0.0)
    m = product(p, load_square(solved, pair * chunks + chunk), FINE)
    out = product(query, load_state(states, pair * chunks + chunk, columns, D), DTYPE)
    out *= reached(exp(to_query), starts, start, PACKED)[:, None]
    out += product(m, load_tile(residual + theirs, rows, columns, T, KV * D, D), DTYPE)
    if FEATURE != "given":
        out *= tl.load(mixing + query_head)
        out += load_tile(output + ours, rows, columns, T, H * D, D).to(tl.float32)
    store_tile(output + ours, rows, columns, out, T, H * D, D)


# --- backward ---


@triton.jit(do_not_specialize=["T"])
def delta_query_gradients_kernel(
    q, key, residual, solved, mixing, first, log_g, states, doutput, dq, dmixing, dread, dresidual, dkey, dsums, T,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FEATURE: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk's queries of one key/value head, added to `dq` and `dmixing`; and from its own queries
    alone those of r, of keys, of the state that they read, `dread` `[B * KV, chunks, D, D]`, and, where there is a
    decay, of b `[B * KV, T]`."""
    chunk, chunks, H = tl.program_id(0), tl.num_programs(0), KV * GROUPS
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // KV, pair % KV
    theirs = (batch * T * KV + head) * D
    start = chunk * CHUNK
    rows, columns = start + tl.arange(0, CHUNK), tl.arange(0, DP)
    starts = load_first(first + batch * T, rows, T, PACKED)
    to_query, _ = load_sums(log_g + pair * T, rows, T, GATED)
    between = decay_mask(log_g + pair * T, to_query, rows, T, GATED)
    reaching = reached(exp(to_query), starts, start, PACKED)[:, None]
    unit_key = load_tile(key + theirs, rows, columns, T, KV * D, D)
    gain = load_tile(residual + theirs, rows, columns, T, KV * D, D)
    inverted = load_square(solved, pair * chunks + chunk)
    state = load_state(states, pair * chunks + chunk, columns, D)
    between = tl.where((rows[:, None] >= rows[None, :]) & (rows[None, :] >= starts[:, None]), between, 0.0)
    dgain, dunit_key = tl.zeros([CHUNK, DP], tl.float32), tl.zeros([CHUNK, DP], tl.float32)
    dstate, dsum = tl.zeros([DP, DP], tl.float32), tl.zeros([CHUNK], tl.float32)
    for group in tl.range(0, GROUPS, disable_licm=True):  # offsets and masks, made anew, need no registers meanwhile
        index = batch * H + head * GROUPS + group
        ours = (batch * T * H + head * GROUPS + group) * D
        w = 1.0 if FEATURE == "given" else tl.load(mixing + head * GROUPS + group)
        dout = load_tile(doutput + ours, rows, columns, T, H * D, D)
        x = load_tile(q + ours, rows, columns, T, H * D, D).to(tl.float32)
        query, scale = unit(x, columns, D, FEATURE)
        query = query.to(DTYPE)
        dstate += product(tl.trans(query), w * reaching * dout.to(tl.float32), DTYPE)
        dout = dout.to(DTYPE)
        p = (between * product(query, tl.trans(unit_key), DTYPE)).to(FINE)
        m = product(p, inverted, FINE)
        dgain += product(tl.trans((w * m).to(DTYPE)), dout, DTYPE)
        dm = product(dout, tl.trans(gain), DTYPE)
        read = tl.sum(m * dm, 1)
        dp = by_fine(dm, inverted, DTYPE)
        if GATED:
            change = w * p.to(tl.float32) * dp
            dsum += tl.sum(change, 1) - tl.sum(change, 0)
        dp *= between
        dunit_key += product(tl.trans((w * dp).to(DTYPE)), query, DTYPE)
        dquery = reaching * product(dout, tl.trans(state), DTYPE)
        y = query.to(tl.float32)
        before = tl.sum(y * dquery, 1)
        dsum += w * before
        if FEATURE != "given":
            place = dmixing + index * chunks + chunk
            tl.store(place, tl.load(place) + tl.sum(read + before, 0))
        within = product(dp, unit_key, DTYPE)
        if DP > 64:  # a bare sum would become one product's start, and each half of 8 warps would make the whole of it
            within = tl.where((rows < T)[:, None], within, 0.0)
        dquery += within
        draw = w * unit_backward(y, scale, dquery, FEATURE)
        if FEATURE != "given":
            draw += load_tile(dq + ours, rows, columns, T, H * D, D).to(tl.float32)
        store_tile(dq + ours, rows, columns, draw, T, H * D, D)
    store_tile(dresidual + theirs, rows, columns, dgain, T, KV * D, D)
    store_tile(dkey + theirs, rows, columns, dunit_key, T, KV * D, D)
    store_state(dread, pair * chunks + chunk, columns, dstate, D)
    if GATED:
        tl.store(dsums + pair * T + rows, dsum, mask=rows < T)


@triton.jit(do_not_specialize=["T", "SEGMENT"])
def delta_state_gradients_kernel(
    key, left, first, beta, log_g, dread, dfinal, dresidual, dstates, dinitial, T, SEGMENT,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, STAGES: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """`delta_states_kernel` backwards: the gradient of the state after every chunk, and from it the rest of r's. The
    first segment is the one at the end."""
    block, segment, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments, chunks = tl.num_programs(1), tl.cdiv(T, CHUNK)
    at = (pair // KV * T * KV + pair % KV) * D
    first += pair // KV * T
    beta += pair * T
    log_g += pair * T
    channels, columns = tl.arange(0, DP), block * BV + tl.arange(0, BV)
    inside = (channels < D)[:, None] & (columns < D)[None, :]
    offsets = channels[:, None] * D + columns[None, :]
    dstate = entering(dfinal, pair * segments + segment, channels, columns, D, DP, STORE)
    begin, end = segment * SEGMENT, tl.minimum(chunks, (segment + 1) * SEGMENT)
    for n in tl.range(begin, end, num_stages=STAGES if STAGES > 2 else None):
        chunk = chunks - 1 - n
        start = chunk * CHUNK
        rows = start + tl.arange(0, CHUNK)
        unit_key = load_tile(key + at, rows, channels, T, KV * D, D)
        remainder = load_tile(left + at, rows, channels, T, KV * D, D)
        dgain = load_tile(dresidual + at, rows, columns, T, KV * D, D).to(tl.float32)
        read = tl.load(dread + (pair * chunks + chunk) * D * D + offsets, mask=inside, other=0.0).to(tl.float32)
        write = tl.load(beta + rows, mask=rows < T, other=0.0)
        if STORE:
            place = (pair * chunks + chunk) * D * D
            tl.store(dstates + place + offsets, dstate.to(dstates.dtype.element_ty), mask=inside)
        dgain += product(remainder, dstate, DTYPE)
        if STORE:
            store_tile(dresidual + at, rows, columns, dgain, T, KV * D, D)
        dgain *= (write * reach(log_g, first, rows, start, T, GATED, PACKED))[:, None]
        dstate *= kept(log_g, first, rows, start, T, GATED, PACKED)
        dstate += read - product(tl.trans(unit_key), dgain, DTYPE)
    if not STORE:
        store_effect(dinitial, pair * segments + segment, channels, columns, dstate, D, DP)
    elif segment == segments - 1:
        tl.store(dinitial + pair * D * D + offsets, dstate, mask=inside)


@triton.jit(do_not_specialize=["T"])
def delta_key_gradients_kernel(
    k, v, key, residual, solved, first, beta, log_g, states, dstates, dresidual, dkey, dsums, dk, dv, dbeta, dlog_g, T,
    rate, strength,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FEATURE: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """To the gradients of a chunk's keys and values, those as keys, values and gates of the recurrence; where those are
    given, their gradients, `dbeta` and `dlog_g` `[B * KV, T]` too."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // KV
    at = (batch * T * KV + pair % KV) * D
    first += batch * T
    log_g += pair * T
    start = chunk * CHUNK
    rows, columns = start + tl.arange(0, CHUNK), tl.arange(0, DP)
    starts = load_first(first, rows, T, PACKED)
    to_query, to_end = load_sums(log_g, rows, T, GATED)
    between = decay_mask(log_g, to_query, rows, T, GATED)
    write = tl.load(beta + pair * T + rows, mask=rows < T, other=0.0)
    z = load_tile(dresidual + at, rows, columns, T, KV * D, D).to(tl.float32)

    values = load_tile(v + at, rows, columns, T, KV * D, D).to(tl.float32)
    dwrite = tl.sum(z * values, 1)
    dvalues = write[:, None] * z
    if FEATURE != "given":
        dvalues += load_tile(dv + at, rows, columns, T, KV * D, D).to(tl.float32)
    store_tile(dv + at, rows, columns, dvalues, T, KV * D, D)

    unit_key = load_tile(key + at, rows, columns, T, KV * D, D)
    gain = load_tile(residual + at, rows, columns, T, KV * D, D)
    written = product(load_square(solved, pair * chunks + chunk), gain, DTYPE)
    # β's gradient as one sum; `dwrite` is several, which nearly cancel
    direct = tl.sum(z * written, 1) / tl.maximum(write, FAINT)
    seen = (rows[:, None] > rows[None, :]) & (rows[None, :] >= starts[:, None])
    between = tl.where(seen, between, 0.0)
    da = -product(z, tl.trans(written), DTYPE)
    a = da * between * product(unit_key, tl.trans(unit_key), DTYPE)
    dwrite += tl.sum(a, 1)
    dsum = tl.zeros([CHUNK], tl.float32)
    if GATED:
        a *= write[:, None]
        dsum = tl.load(dsums + pair * T + rows, mask=rows < T, other=0.0) + tl.sum(a, 1) - tl.sum(a, 0)
    da *= between * write[:, None]
    dunit_key = load_tile(dkey + at, rows, columns, T, KV * D, D).to(tl.float32)
    dunit_key += product(da, unit_key, DTYPE) + product(tl.trans(da), unit_key, DTYPE)

    state = load_state(states, pair * chunks + chunk, columns, D)
    reaching = reached(exp(to_query), starts, start, PACKED)
    derased = product(z, tl.trans(state), DTYPE)
    dread = reaching * tl.sum(unit_key.to(tl.float32) * derased, 1)
    dwrite -= dread
    dunit_key -= (write * reaching)[:, None] * derased

    dstate = load_state(dstates, pair * chunks + chunk, columns, D)
    last = tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1), 0)
    ending = lasting(exp(to_end), first, rows, start, T, PACKED)
    dended = ending[:, None] * product(written, tl.trans(dstate), DTYPE)
    dunit_key += dended

    ddecay = tl.zeros([CHUNK], tl.float32)
    if GATED:
        held = tl.sum(unit_key.to(tl.float32) * dended, 1)
        dsum -= write * dread + held
        last = last * kept(log_g, first, rows, start, T, GATED, PACKED) + tl.sum(held, 0)
        decay = tl.load(log_g + rows, mask=rows < T, other=0.0)
        ddecay = tl.where(decay > GONE, tl.cumsum(dsum, 0, reverse=True) + last, 0.0)
    if FEATURE == "given":
        tl.store(dbeta + pair * T + rows, tl.where(write > FAINT, direct, dwrite), mask=rows < T)
        if GATED:
            tl.store(dlog_g + pair * T + rows, ddecay, mask=rows < T)
    else:
        x = load_tile(k + at, rows, columns, T, KV * D, D).to(tl.float32)
        share = sigmoid(tl.sum(x, 1) / D)
        dpooled = (dwrite * strength * share + ddecay * rate) * (1.0 - share)
        y, scale = unit(x, columns, D, FEATURE)
        dunit_key = unit_backward(y, scale, dunit_key, FEATURE) + (dpooled / D)[:, None]
        dunit_key += load_tile(dk + at, rows, columns, T, KV * D, D).to(tl.float32)
    store_tile(dk + at, rows, columns, dunit_key, T, KV * D, D)
