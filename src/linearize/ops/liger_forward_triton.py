"""Forward kernels of Liger Attention: what the others read, the states before every chunk, and the output."""

import triton
import triton.language as tl

from linearize.ops.liger_parts_triton import (
    load_parts,
    load_state_parts,
    near_halves,
    product_of_parts,
    read_state,
    store_parts,
    turned_parts,
)
from linearize.ops.liger_triton import (
    CHUNK,
    LIMIT,
    LOG2_E,
    continues,
    exp,
    feature,
    key_and_gate,
    load_first,
    load_gate,
    load_last_first,
    load_one_first,
    load_rope,
    load_tile,
    load_total,
    log_decay_after,
    partner_of,
    product,
    program,
    query_rows,
    read_mask,
    rotated,
    scan,
    sink_mask,
    sink_rows,
    state_factors,
    store_gate,
    store_tile,
    window_mask,
)


@triton.jit(do_not_specialize=["T", "rope_stride"])
def prepare_kernel(
    k, cos, sin, decay, near_key, turned_key, totals, for_queries, T, rope_stride, rate, lower,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, GATE: tl.constexpr,
    FEATURE: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """Of one chunk's keys, `near_key` of the recurrence and `turned_key`, after RoPE, of the window; the log decay over
    each chunk, `totals` `[B * KV, chunks, D]`; and what makes near queries of queries, `for_queries` `[B, T, KV, K]`:
    to make it again for every query head would take more instructions than all else that `output_kernel` does.

    One warp has ROWS at a time, so that neither sums over tokens nor over channels wait for other warps."""
    chunk, chunks, pair = program()
    batch, head = pair // KV, pair % KV
    at, columns = (batch * T * KV + head) * D, tl.arange(0, DP)
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R
    fixed, total = tl.load(decay + head), tl.zeros([1, 1 if SCALAR else DP], tl.float32)
    for n in range(CHUNK // ROWS):
        rows = chunk * CHUNK + n * ROWS + tl.arange(0, ROWS)
        raw = load_tile(k + at, rows, columns, T, KV * D, D)
        if R > 0:
            c, s = load_rope(cos, sin, rows, columns, T, R)
            turned = rotated(raw, load_tile(k + at, rows, partner_of(columns, R), T, KV * D, D), c, s)
            store_tile(turned_key + at, rows, columns, turned, T, KV * D, D)
        key, log_g = key_and_gate(raw.to(tl.float32), rows < T, columns, fixed, rate, lower, D, GATE, FEATURE)
        sums = scan(log_g, SCALAR) + total
        total += tl.sum(log_g, 0, keep_dims=True)
        store_gate(for_queries, batch, head, rows, columns, exp(sums), T, KV, D, SCALAR)
        store_tile(near_key + at, rows, columns, key * exp(-tl.maximum(sums, LIMIT)), T, KV * D, D)
    whole = tl.sum(tl.broadcast_to(total, [1, DP]), 0)
    tl.store(totals + (pair * chunks + chunk) * D + columns, whole, mask=columns < D)
    if tl.min(whole) <= LIMIT:  # keys decayed to the chunk's end
        tl.debug_barrier()  # other threads have written the same places
        after = tl.zeros_like(total)
        for n in range(CHUNK // ROWS):
            rows = (chunk + 1) * CHUNK - 1 - n * ROWS - tl.arange(0, ROWS)  # the last token first
            raw = load_tile(k + at, rows, columns, T, KV * D, D).to(tl.float32)
            key, _ = key_and_gate(raw, rows < T, columns, fixed, rate, lower, D, GATE, FEATURE)
            log_g = log_decay_after(k + at, rows, columns, T, fixed, rate, lower, KV * D, D, GATE, FEATURE)
            store_tile(near_key + at, rows, columns, key * exp(scan(log_g, SCALAR) + after), T, KV * D, D)
            after += tl.sum(log_g, 0, keep_dims=True)


@triton.jit(do_not_specialize=["T", "SEGMENT"])
def states_kernel(
    near_key, v, first, totals, initial, states, final, products, T, SEGMENT,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """S ← exp(total of log_g) S + (key decayed to the chunk's end)ᵀ v, over one segment of chunks.

    From `initial` `[B * KV, segments, D, D]` to `final`, likewise; the state before every chunk goes to `states`.
    Without STORE, the decay over the segment goes to `products` `[B * KV, segments, D]`.
    """
    block, segment, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments, chunks = tl.num_programs(1), tl.cdiv(T, CHUNK)
    near_key += (pair // KV * T * KV + pair % KV) * D
    v += (pair // KV * T * KV + pair % KV) * D
    first += pair // KV * T
    channels, columns = tl.arange(0, DP), block * BV + tl.arange(0, BV)
    inside = (channels < D)[:, None] & (columns < D)[None, :]
    offsets = channels[:, None] * D + columns[None, :]
    state = tl.load(initial + (pair * segments + segment) * D * D + offsets, mask=inside, other=0.0)
    passed = tl.full([DP], 1.0, tl.float32)
    total = load_total(totals, pair, chunks, segment * SEGMENT, channels, D)
    for chunk in range(segment * SEGMENT, tl.minimum(chunks, (segment + 1) * SEGMENT)):
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        key = load_tile(near_key, rows, channels, T, KV * D, D)
        values = load_tile(v, rows, columns, T, KV * D, D)
        whole, leaving = state_factors(total)
        total = load_total(totals, pair, chunks, tl.minimum(chunk + 1, chunks - 1), channels, D)  # the next one
        if PACKED:  # what the chunk's last token still sees
            last_first = load_last_first(first, chunk * CHUNK, T, PACKED)
            key = tl.where((rows >= last_first)[:, None], key, 0.0)
            whole = tl.where(continues(last_first, chunk * CHUNK), whole, 0.0)
        if STORE:
            tl.store(states + (pair * chunks + chunk) * D * D + offsets, state.to(states.dtype.element_ty), mask=inside)
        state = (state * whole[:, None] + product(tl.trans(key), values, DTYPE)) * leaving[:, None]
        passed *= whole * leaving
    tl.store(final + (pair * segments + segment) * D * D + offsets, state, mask=inside)
    if not STORE:
        tl.store(products + (pair * segments + segment) * D + channels, passed, mask=channels < D)


@triton.jit(do_not_specialize=["SEGMENTS"])
def carry_kernel(
    initial, finals, products, starts, last, SEGMENTS, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """What enters each segment, `starts` `[B * KV, segments, D, D]`, from what each makes of nothing, `finals`, and
    the decay over it, `products` `[B * KV, segments, D]`; from the last to the first if REVERSE."""
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels, columns = tl.arange(0, DP), block * BV + tl.arange(0, BV)
    inside = (channels < D)[:, None] & (columns < D)[None, :]
    offsets = channels[:, None] * D + columns[None, :]
    state = tl.load(initial + pair * D * D + offsets, mask=inside, other=0.0)
    for n in range(SEGMENTS):
        place = pair * SEGMENTS + (SEGMENTS - 1 - n if REVERSE else n)
        tl.store(starts + place * D * D + offsets, state, mask=inside)
        kept = tl.load(products + place * D + channels, mask=channels < D, other=0.0)
        state = state * kept[:, None] + tl.load(finals + place * D * D + offsets, mask=inside, other=0.0)
    tl.store(last + pair * D * D + offsets, state, mask=inside)


@triton.jit(do_not_specialize=["T", "rope_stride"])
def output_kernel(
    q, near_key, turned_key, totals, for_queries, v, cos, sin, mixing, first, states, output,
    near_query, turned_query, lse, T, rope_stride, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    SINKS: tl.constexpr, FEATURE: tl.constexpr, SCALAR: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr,
    DTYPE: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """output = w · recurrence + (1 - w) · window, for one chunk of one query head. With KEEP also what the backward
    pass reads: `near_query` of the recurrence, `turned_query`, after RoPE, of the window, and the log-sum-exp of each
    query's window `[B, H, T]`."""
    chunk, chunks, index = program()
    H = KV * GROUPS
    batch, pair, heads, rows, places = query_rows(chunk, index, KV, GROUPS, 1)
    ours, theirs = batch * T * H * D, (batch * T * KV + pair % KV) * D
    start = chunk * CHUNK
    keys, before, columns = start + tl.arange(0, CHUNK), start - CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    starts = load_first(first + batch * T, rows, T, PACKED)
    w = tl.load(mixing + heads)[:, None]
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R

    key, key_right = load_parts(near_key + theirs, keys, columns, T, KV * D, D, 0, HALVES)
    total = load_total(totals, pair, chunks, chunk, columns, D)
    if HALVES:
        x, right = load_parts(q + ours, places, columns, T * H, D, D, R, HALVES)
        read, read_right = near_halves(x, right, for_queries, batch, pair % KV, rows, T, KV, D, FEATURE, SCALAR, DTYPE)
        query, query_right = turned_parts(x, right, rows, columns, cos, sin, T, R, HALVES)
    else:
        x = load_tile(q + ours, places, columns, T * H, D, D).to(tl.float32)
        for_query = load_gate(for_queries, batch, pair % KV, rows, columns, T, KV, D, SCALAR)
        read = (feature(x, columns, D, FEATURE) * for_query).to(DTYPE)
        query = load_tile(q + ours, places, columns, T * H, D, D)
        if R > 0:
            c, s = load_rope(cos, sin, rows, columns, T, R)
            partner = load_tile(q + ours, places, partner_of(columns, R), T * H, D, D)
            query = rotated(query, partner, c, s).to(DTYPE)
        read_right, query_right = read, query
    if KEEP:
        store_parts(near_query + ours, places, columns, read, read_right, T * H, D, D, HALVES)
        if R > 0:
            store_parts(turned_query + ours, places, columns, query, query_right, T * H, D, D, HALVES)
    within = product_of_parts(read, read_right, key, key_right, HALVES, DTYPE)
    within = tl.where(read_mask(rows, keys, starts, total), w * within, 0.0)
    key, key_right = load_parts(turned_key + theirs, keys, columns, T, KV * D, D, 0, HALVES)
    own = product_of_parts(query, query_right, key, key_right, HALVES, DTYPE)
    key, key_right = load_parts(turned_key + theirs, before, columns, T, KV * D, D, 0, HALVES)
    past = product_of_parts(query, query_right, key, key_right, HALVES, DTYPE)
    own = tl.where(window_mask(rows, keys, starts, W), own, -float("inf"))
    past = tl.where(window_mask(rows, before, starts, W), past, -float("inf"))
    largest = tl.maximum(tl.max(own, 1), tl.max(past, 1))
    if SINKS > 0:
        chunk_first = load_one_first(first + batch * T, start, PACKED)
        sinks = sink_rows(chunk_first, SINKS)
        key, key_right = load_parts(turned_key + theirs, sinks, columns, T, KV * D, D, 0, HALVES)
        far = product_of_parts(query, query_right, key, key_right, HALVES, DTYPE)
        far = tl.where(sink_mask(rows, sinks, starts, chunk_first, W), far, -float("inf"))
        largest = tl.maximum(largest, tl.max(far, 1))
        far = tl.exp2((far - largest[:, None]) * (scale * LOG2_E))
    own = tl.exp2((own - largest[:, None]) * (scale * LOG2_E))
    past = tl.exp2((past - largest[:, None]) * (scale * LOG2_E))
    weight = tl.sum(own, 1) + tl.sum(past, 1)
    if SINKS > 0:
        weight += tl.sum(far, 1)
    share = (1.0 - w) / weight[:, None]
    if KEEP:
        tl.store(lse + (batch * H + heads) * T + rows, largest * scale + tl.log(weight), mask=rows < T)

    own, past = (within + share * own).to(DTYPE), (share * past).to(DTYPE)

    # last, so that nothing but shared memory holds `read`, nor the sum, until now
    if PACKED:  # a document that began here has no state
        has = continues(starts, start)[:, None]
        read, read_right = tl.where(has, read, 0.0), tl.where(has, read_right, 0.0)
    upper, lower = load_state_parts(states + (pair * chunks + chunk) * D * D, columns, D, HALVES)
    out = w * read_state(read, read_right, upper, lower, HALVES, DTYPE)
    if SINKS > 0:
        out += product(share * far, load_tile(v + theirs, sinks, columns, T, KV * D, D), DTYPE)
    out += product(past, load_tile(v + theirs, before, columns, T, KV * D, D), DTYPE)
    out += product(own, load_tile(v + theirs, keys, columns, T, KV * D, D), DTYPE)
    store_tile(output + ours, places, columns, out, T * H, D, D)
