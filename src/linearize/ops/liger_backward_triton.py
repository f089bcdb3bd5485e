"""Backward kernels of Liger Attention; shapes and names as in `liger_triton`.

The gradients of the states, from the last chunk to the first; then for every chunk at once the gradients of its
queries, from the recurrence, beside those from the window, which `liger_window_triton` leaves; those of its near keys
and values, from the recurrence; of these, those of keys and gates; and, beside them, those from the window. Kernels
that do several of these need more tiles at once.

The gate's gradient is a sum over the chunk of query · dquery - key · dkey, in which most terms cancel: it is taken of
the operands exactly as rounded for the matrix products, in fp32, so that they do. The first term is summed where the
queries' gradients are at hand, and handed on in fp32.
"""

import triton
import triton.language as tl

from linearize.ops.liger_parts_triton import load_parts, product_of_parts, store_parts, turned_back
from linearize.ops.liger_triton import (
    CHUNK,
    LIMIT,
    continues,
    exp,
    feature_backward,
    key_and_gate,
    key_and_gate_backward,
    load_first,
    load_gate,
    load_last_first,
    load_state,
    load_tile,
    load_total,
    log_decay_after,
    product,
    program,
    read_mask,
    running_sum,
    scan,
    state_factors,
    store_gate,
    store_tile,
)


@triton.jit(do_not_specialize=["T", "SEGMENT"])
def state_gradients_kernel(
    near_query, doutput, mixing, first, totals, initial, dstates, final, products, T, SEGMENT,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """`states_kernel` run backwards: dS ← exp(total of log_g) dS + Σ over the group (query decayed from the chunk's
    start)ᵀ w doutput. The gradient of near keysᵀ values goes to `dstates`."""
    block, segment, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments, chunks, H = tl.num_programs(1), tl.cdiv(T, CHUNK), KV * GROUPS
    batch, head = pair // KV, pair % KV
    first += batch * T
    channels, columns = tl.arange(0, DP), block * BV + tl.arange(0, BV)
    inside = (channels < D)[:, None] & (columns < D)[None, :]
    offsets = channels[:, None] * D + columns[None, :]
    dstate = tl.load(initial + (pair * segments + segment) * D * D + offsets, mask=inside, other=0.0)
    passed = tl.full([DP], 1.0, tl.float32)
    begin, end = segment * SEGMENT, tl.minimum(chunks, (segment + 1) * SEGMENT)
    total = load_total(totals, pair, chunks, end - 1, channels, D)
    for n in range((end - begin) * GROUPS):  # one loop over chunks and query heads, for its loads to be prefetched
        chunk, group = end - 1 - n // GROUPS, n % GROUPS
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        at = (batch * T * H + head * GROUPS + group) * D
        query = load_tile(near_query + at, rows, channels, T, H * D, D)
        dout = load_tile(doutput + at, rows, columns, T, H * D, D)
        whole, after = state_factors(total)
        next_chunk = tl.maximum(end - 1 - (n + 1) // GROUPS, 0)
        total = load_total(totals, pair, chunks, next_chunk, channels, D)
        if PACKED:
            starts = load_first(first, rows, T, PACKED)
            query = tl.where(continues(starts, chunk * CHUNK)[:, None], query, 0.0)
            last_first = load_last_first(first, chunk * CHUNK, T, PACKED)
            whole = tl.where(continues(last_first, chunk * CHUNK), whole, 0.0)
        leaving = group == 0  # the chunk, from its end to its start
        dstate *= tl.where(leaving, after, 1.0)[:, None]
        if STORE:
            place = dstates + (pair * chunks + chunk) * D * D + offsets
            tl.store(place, dstate.to(dstates.dtype.element_ty), mask=inside & leaving)
        dstate *= tl.where(leaving, whole, 1.0)[:, None]
        dstate += tl.load(mixing + head * GROUPS + group) * product(tl.trans(query), dout, DTYPE)
        passed *= tl.where(leaving, whole * after, 1.0)
    tl.store(final + (pair * segments + segment) * D * D + offsets, dstate, mask=inside)
    if not STORE:
        tl.store(products + (pair * segments + segment) * D + channels, passed, mask=channels < D)


@triton.jit(do_not_specialize=["T"])
def query_gradients_kernel(
    q, k, near_query, near_key, v, mixing, first, decay, totals, states, doutput, dq, dmixing, terms, T, rate, lower,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GATE: tl.constexpr,
    FEATURE: tl.constexpr, SCALAR: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """To the gradients of a chunk's queries, of all heads of one key/value head, and of the mixing weights,
    `dmixing` `[B, H, chunks]`, those from the recurrence. The sum over these heads of w · near query · its gradient,
    which the gate's gradient takes, goes to `terms` `[B, T, KV, K]`."""
    chunk, chunks, pair = program()
    batch, head, H = pair // KV, pair % KV, KV * GROUPS
    theirs = (batch * T * KV + head) * D
    start = chunk * CHUNK
    rows, columns = start + tl.arange(0, CHUNK), tl.arange(0, DP)
    starts = load_first(first + batch * T, rows, T, PACKED)
    total = load_total(totals, pair, chunks, chunk, columns, D)
    seen = read_mask(rows, rows, starts, total)
    key = load_tile(near_key + theirs, rows, columns, T, KV * D, D)
    values = load_tile(v + theirs, rows, columns, T, KV * D, D)
    state = load_state(states, pair * chunks + chunk, columns, D)
    for_query = tl.full([1, 1], 1.0, tl.float32)
    if FEATURE != "softmax":
        x = load_tile(k + theirs, rows, columns, T, KV * D, D).to(tl.float32)
        _, log_g = key_and_gate(x, rows < T, columns, tl.load(decay + head), rate, lower, D, GATE, FEATURE)
        for_query = exp(running_sum(log_g, DTYPE, SCALAR))
    gathered = tl.zeros([CHUNK, 1 if SCALAR else DP], tl.float32)
    for group in range(GROUPS):
        index, ours = batch * H + head * GROUPS + group, (batch * T * H + head * GROUPS + group) * D
        w = tl.load(mixing + head * GROUPS + group)
        weight, used = tl.where(w == 0.0, 1.0, w), tl.where(w == 0.0, 0.0, 1.0)  # the gradient of w is divided by it
        dout = load_tile(doutput + ours, rows, columns, T, H * D, D)
        if DP <= 64:  # at one time; more channels would not fit into registers
            near = load_tile(near_query + ours, rows, columns, T, H * D, D)
        # rounded with w, as the keys' gradients have it
        da = tl.where(seen, weight * product(dout, tl.trans(values), DTYPE), 0.0).to(DTYPE)
        if PACKED:  # a document that began here has no state
            dout = tl.where(continues(starts, start)[:, None], dout, 0.0)
        dquery = weight * product(dout, tl.trans(state), DTYPE)
        dquery += product(da, key, DTYPE)
        if DP > 64:
            near = load_tile(near_query + ours, rows, columns, T, H * D, D)
        paired = near.to(tl.float32) * dquery
        gain = tl.sum(paired, 1)
        place = dmixing + index * chunks + chunk
        tl.store(place, tl.load(place) + tl.sum(gain, 0) / weight)
        gathered += used * (gain[:, None] if SCALAR else paired)
        raw = load_tile(q + ours, rows, columns, T, H * D, D).to(tl.float32)
        draw = used * feature_backward(raw, dquery * for_query, paired, columns, D, FEATURE)
        draw += load_tile(dq + ours, rows, columns, T, H * D, D).to(tl.float32)
        store_tile(dq + ours, rows, columns, draw, T, H * D, D)
    store_gate(terms, batch, head, rows, columns, gathered, T, KV, D, SCALAR)


@triton.jit
def gradients_of_state(
    key, values, states, dstates, place, first, start, total, columns, T, D: tl.constexpr, DTYPE: tl.constexpr,
    SCALAR: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradients of near keys and values from that of the state after their chunk; and, `[1, K]`, of the gate of the
    chunk's last token."""
    dstate, state = load_state(dstates, place, columns, D), load_state(states, place, columns, D)
    last = tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    written, writes, whole = key, values, state_factors(total)[0]
    if PACKED:  # what the chunk's last token still sees
        last_first = load_last_first(first, start, T, PACKED)
        whole = tl.where(continues(last_first, start), whole, 0.0)
        ends = (start + tl.arange(0, CHUNK) >= last_first)[:, None]
        written, writes = tl.where(ends, key, 0.0), tl.where(ends, values, 0.0)
    dvalues = product(written, dstate, DTYPE)
    dkey = product(writes, tl.trans(dstate), DTYPE)
    last = (last * whole + tl.sum(key.to(tl.float32) * dkey, 0))[None, :]
    if SCALAR:
        last = tl.sum(last, 1, keep_dims=True)
    return dkey, dvalues, last


@triton.jit(do_not_specialize=["T"])
def key_gradients_kernel(
    near_query, near_key, v, mixing, first, totals, states, dstates, doutput, dnear_key, lasts, dv, T,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SCALAR: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's near keys, fp32, and values, from its own queries and from the state after it; and of
    the gate of its last token, `lasts` `[B * KV, chunks, K]`, from the state."""
    chunk, chunks, pair = program()
    batch, head, H = pair // KV, pair % KV, KV * GROUPS
    theirs = (batch * T * KV + head) * D
    start = chunk * CHUNK
    rows, columns = start + tl.arange(0, CHUNK), tl.arange(0, DP)
    key = load_tile(near_key + theirs, rows, columns, T, KV * D, D)
    values = load_tile(v + theirs, rows, columns, T, KV * D, D)
    starts = load_first(first + batch * T, rows, T, PACKED)
    total = load_total(totals, pair, chunks, chunk, columns, D)

    dkey, dvalues, last = gradients_of_state(
        key, values, states, dstates, pair * chunks + chunk, first + batch * T, start, total, columns, T, D, DTYPE,
        SCALAR, PACKED,
    )  # fmt: skip
    K: tl.constexpr = 1 if SCALAR else D
    channels = tl.arange(0, last.shape[1])
    tl.store(lasts + ((pair * chunks + chunk) * K + channels)[None, :], last, mask=(channels < K)[None, :])

    # transposed, so that they are operands as they are
    seen = tl.trans(read_mask(rows, rows, starts, total))  # [key, query]
    for group in range(GROUPS):
        ours = (batch * T * H + head * GROUPS + group) * D
        w = tl.load(mixing + head * GROUPS + group)
        query = load_tile(near_query + ours, rows, columns, T, H * D, D)
        dout = load_tile(doutput + ours, rows, columns, T, H * D, D)
        a = tl.where(seen, w * product(key, tl.trans(query), DTYPE), 0.0)
        da = tl.where(seen, w * product(values, tl.trans(dout), DTYPE), 0.0)
        dvalues += product(a, dout, DTYPE)
        dkey += product(da, query, DTYPE)
    store_tile(dv + theirs, rows, columns, dvalues, T, KV * D, D)
    store_tile(dnear_key + theirs, rows, columns, dkey, T, KV * D, D)


@triton.jit(do_not_specialize=["T"])
def gate_gradients_kernel(
    k, near_key, decay, totals, terms, dnear_key, lasts, dk, T, rate, lower,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr,
    FEATURE: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's keys, as keys of the recurrence and as the gate, from those of the near keys; `terms`
    as `query_gradients_kernel` leaves them. One warp has ROWS at a time, as in `prepare_kernel`, from the chunk's end,
    where the gate's gradient is `lasts`."""
    chunk, chunks, pair = program()
    batch, head = pair // KV, pair % KV
    theirs, columns = (batch * T * KV + head) * D, tl.arange(0, DP)
    K: tl.constexpr = 1 if SCALAR else D
    channels = tl.arange(0, 1 if SCALAR else DP)[None, :]
    after = tl.load(lasts + (pair * chunks + chunk) * K + channels, mask=channels < K, other=0.0)
    total = tl.load(totals + (pair * chunks + chunk) * D + channels, mask=channels < K, other=0.0)
    mild = tl.min(load_total(totals, pair, chunks, chunk, columns, D)) > LIMIT
    from_start = tl.where(mild, total, 0.0)  # what keys are decayed from, for whole heads the same in all channels
    fixed, log_after = tl.load(decay + head), tl.zeros_like(after)
    for n in range(CHUNK // ROWS):
        rows = (chunk + 1) * CHUNK - 1 - n * ROWS - tl.arange(0, ROWS)  # the last token first
        dkey = load_tile(dnear_key + theirs, rows, columns, T, KV * D, D)
        paired = load_tile(near_key + theirs, rows, columns, T, KV * D, D).to(tl.float32) * dkey
        change = load_gate(terms, batch, head, rows, columns, T, KV, D, SCALAR)
        change -= tl.sum(paired, 1, keep_dims=True) if SCALAR else paired
        dlog_g = scan(change, SCALAR) + after
        after += tl.sum(change, 0, keep_dims=True)
        raw = load_tile(k + theirs, rows, columns, T, KV * D, D).to(tl.float32)
        if FEATURE != "softmax" or GATE == "hgrn2":  # else the gradient of what the key decayed to is all it takes
            log_g = log_decay_after(k + theirs, rows, columns, T, fixed, rate, lower, KV * D, D, GATE, FEATURE)
            dkey *= exp(scan(log_g, SCALAR) + log_after - from_start)
            log_after += tl.sum(log_g, 0, keep_dims=True)
        draw = key_and_gate_backward(raw, dkey, paired, dlog_g, columns, rate, lower, D, GATE, FEATURE)
        store_tile(dk + theirs, rows, columns, draw, T, KV * D, D)


@triton.jit(do_not_specialize=["T", "rope_stride"])
def window_gradients_kernel(
    turned_query, turned_key, v, cos, sin, mixing, first, lse, delta, doutput, dk, dv, T, rope_stride, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    PACKED: tl.constexpr, DTYPE: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """To the gradients of a chunk's keys and values, those from the window of its queries and the next chunk's."""
    chunk, _, pair = program()
    batch, head, H = pair // KV, pair % KV, KV * GROUPS
    theirs = (batch * T * KV + head) * D
    rows, columns = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    key, key_right = load_parts(turned_key + theirs, rows, columns, T, KV * D, D, 0, HALVES)
    values = load_tile(v + theirs, rows, columns, T, KV * D, D)
    dkey, dvalues = tl.zeros(key.shape, tl.float32), tl.zeros([CHUNK, DP], tl.float32)
    dkey_right = dkey
    for n in range(2 * GROUPS):
        query_head, times = head * GROUPS + n // 2, rows + n % 2 * CHUNK
        ours, sums = (batch * T * H + query_head) * D, (batch * H + query_head) * T + times
        query, query_right = load_parts(turned_query + ours, times, columns, T, H * D, D, 0, HALVES)
        dout = load_tile(doutput + ours, times, columns, T, H * D, D)
        norm = tl.load(lse + sums, mask=times < T, other=0.0)[:, None]
        read = tl.load(delta + sums, mask=times < T, other=0.0)[:, None]
        share = 1.0 - tl.load(mixing + query_head)
        starts, age = load_first(first + batch * T, times, T, PACKED), times[:, None] - rows[None, :]
        seen = (age >= 0) & (age < W) & (rows[None, :] >= starts[:, None])  # [query, key]
        p = product_of_parts(query, query_right, key, key_right, HALVES, DTYPE) * scale
        p = share * exp(tl.where(seen, p, -float("inf")) - norm)
        dp = product(dout, tl.trans(values), DTYPE)
        dvalues += product(tl.trans(p), dout, DTYPE)
        dp = tl.trans(p * (dp - read)).to(DTYPE)
        dkey += product(dp, query, DTYPE)
        if HALVES:
            dkey_right += product(dp, query_right, DTYPE)
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R
    dkey, dkey_right = turned_back(scale * dkey, scale * dkey_right, rows, columns, cos, sin, T, R, HALVES)
    key, key_right = load_parts(dk + theirs, rows, columns, T, KV * D, D, 0, HALVES)
    dkey, dkey_right = key.to(tl.float32) + dkey, key_right.to(tl.float32) + dkey_right
    store_parts(dk + theirs, rows, columns, dkey, dkey_right, T, KV * D, D, HALVES)
    dvalues += load_tile(dv + theirs, rows, columns, T, KV * D, D).to(tl.float32)
    store_tile(dv + theirs, rows, columns, dvalues, T, KV * D, D)
