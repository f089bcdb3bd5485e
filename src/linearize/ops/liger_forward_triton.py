"""Forward kernels of Liger Attention: what the others read, the states before every chunk, and the output."""

import triton
import triton.language as tl

from linearize.ops.liger_triton import (
    CHUNK,
    continues,
    decays,
    exp,
    feature,
    key_and_gate,
    load_first,
    load_last_first,
    load_one_first,
    load_rope,
    load_state,
    load_tile,
    load_total,
    partner_of,
    product,
    query_rows,
    read_mask,
    rotated,
    sink_mask,
    sink_rows,
    state_factors,
    store_tile,
    window_mask,
)


@triton.jit(do_not_specialize=["T", "rope_stride"])
def prepare_kernel(
    q, k, cos, sin, decay, near_query, turned_query, near_key, turned_key, totals, T, rope_stride, rate, lower,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, GATE: tl.constexpr,
    FEATURE: tl.constexpr, SCALAR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Operands of the matrix products, of one chunk and all query heads of one key/value head: `near_query` and
    `near_key` of the recurrence, `turned_query` and `turned_key`, after RoPE, of the window; and the log decay over
    each chunk, `totals` `[B * KV, chunks, D]`."""
    chunk, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head, H = pair // KV, pair % KV, KV * GROUPS
    rows, columns = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    at, partners = (batch * T * KV + head) * D, partner_of(columns, R)
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R
    raw = load_tile(k + at, rows, columns, T, KV * D, D)
    queries = (batch * T * H + head * GROUPS) * D
    next_query = load_tile(q + queries, rows, columns, T, H * D, D)  # well before its use, which then does not wait
    if R > 0:
        c, s = load_rope(cos, sin, rows, columns, T, R)
        turned = rotated(raw, load_tile(k + at, rows, partners, T, KV * D, D), c, s)
        store_tile(turned_key + at, rows, columns, turned, T, KV * D, D)
    x, fixed = raw.to(tl.float32), tl.load(decay + head)
    key, log_g = key_and_gate(x, rows < T, columns, fixed, rate, lower, D, GATE, FEATURE)
    total = tl.where(columns < D, tl.sum(log_g, 0), 0.0)
    tl.store(totals + (pair * tl.num_programs(0) + chunk) * D + columns, total, mask=columns < D)
    for_query, for_key = decays(
        log_g, total, k + at, rows, columns, T, fixed, rate, lower, KV * D, D, GATE, FEATURE, SCALAR
    )
    store_tile(near_key + at, rows, columns, key * for_key, T, KV * D, D)
    for group in range(GROUPS):
        at, y = queries + group * D, next_query
        if GROUPS > 1:
            next_query = load_tile(q + queries + tl.minimum(group + 1, GROUPS - 1) * D, rows, columns, T, H * D, D)
        if R > 0:
            c, s = load_rope(cos, sin, rows, columns, T, R)
            turned = rotated(y, load_tile(q + at, rows, partners, T, H * D, D), c, s)
            store_tile(turned_query + at, rows, columns, turned, T, H * D, D)
        query = feature(y.to(tl.float32), columns, D, FEATURE) * for_query
        store_tile(near_query + at, rows, columns, query, T, H * D, D)


@triton.jit(do_not_specialize=["T", "SEGMENT"])
def states_kernel(
    near_key, v, first, totals, initial, states, final, products, T, SEGMENT,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    """S ← exp(total of log_g) S + (key decayed to the chunk's end)ᵀ v, over one segment of chunks.

    From `initial` `[B * KV, segments, D, D]` to `final`, likewise; the state before every chunk, as `state_factors`
    keeps it, goes to `states`. Without STORE, the decay over the segment goes to `products` `[B * KV, segments, D]`.
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
        half, whole = state_factors(total)
        total = load_total(totals, pair, chunks, tl.minimum(chunk + 1, chunks - 1), channels, D)  # the next one
        if PACKED:  # what the chunk's last token still sees
            last_first = load_last_first(first, chunk * CHUNK, T, PACKED)
            key = tl.where((rows >= last_first)[:, None], key, 0.0)
            whole = tl.where(continues(last_first, chunk * CHUNK), whole, 0.0)
        state = state * half[:, None]
        if STORE:
            tl.store(states + (pair * chunks + chunk) * D * D + offsets, state.to(states.dtype.element_ty), mask=inside)
        state = (state * whole[:, None] + product(tl.trans(key), values, DTYPE)) * half[:, None]
        passed *= half * whole * half
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


@triton.jit(do_not_specialize=["T"])
def output_kernel(
    near_query, turned_query, near_key, turned_key, v, mixing, first, totals, states, output, lse, T, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, W: tl.constexpr,
    SINKS: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """output = w · recurrence + (1 - w) · window, for one chunk and HEADS query heads of one key/value head, whose
    rows are one below the other, and the log-sum-exp of each query's window `[B, H, T]`."""
    chunk, chunks, H = tl.program_id(0), tl.num_programs(0), KV * GROUPS
    batch, pair, heads, rows, places = query_rows(chunk, tl.program_id(1), KV, GROUPS, HEADS)
    theirs = (batch * T * KV + pair % KV) * D
    near_query += batch * T * H * D
    turned_query += batch * T * H * D
    output += batch * T * H * D
    start = chunk * CHUNK
    keys, before, columns = start + tl.arange(0, CHUNK), start - CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    starts = load_first(first + batch * T, rows, T, PACKED)
    w = tl.load(mixing + heads)[:, None]

    query = load_tile(turned_query, places, columns, T * H, D, D)
    key = load_tile(turned_key + theirs, keys, columns, T, KV * D, D)
    key_before = load_tile(turned_key + theirs, before, columns, T, KV * D, D)
    own = product(query, tl.trans(key), DTYPE) * scale
    past = product(query, tl.trans(key_before), DTYPE) * scale
    if SINKS > 0:
        chunk_first = load_one_first(first + batch * T, start, PACKED)
        sinks = sink_rows(chunk_first, SINKS)
        far = product(query, tl.trans(load_tile(turned_key + theirs, sinks, columns, T, KV * D, D)), DTYPE) * scale
        sink_values = load_tile(v + theirs, sinks, columns, T, KV * D, D)
    # loads well before their use, which then does not wait
    values_before = load_tile(v + theirs, before, columns, T, KV * D, D)
    query = load_tile(near_query, places, columns, T * H, D, D)
    key = load_tile(near_key + theirs, keys, columns, T, KV * D, D)
    total = load_total(totals, pair, chunks, chunk, columns, D)

    own = tl.where(window_mask(rows, keys, starts, W), own, -float("inf"))
    past = tl.where(window_mask(rows, before, starts, W), past, -float("inf"))
    largest = tl.maximum(tl.max(own, 1), tl.max(past, 1))
    if SINKS > 0:
        far = tl.where(sink_mask(rows, sinks, starts, chunk_first, W), far, -float("inf"))
        largest = tl.maximum(largest, tl.max(far, 1))
        far = exp(far - largest[:, None])
    own, past = exp(own - largest[:, None]), exp(past - largest[:, None])
    weight = tl.sum(own, 1) + tl.sum(past, 1)
    if SINKS > 0:
        weight += tl.sum(far, 1)
    share = (1.0 - w) / weight[:, None]
    tl.store(lse + (batch * H + heads) * T + rows, largest + tl.log(weight), mask=rows < T)

    values = load_tile(v + theirs, keys, columns, T, KV * D, D)
    state = load_state(states, pair * chunks + chunk, columns, D)
    within = tl.where(read_mask(rows, keys, starts, total), product(query, tl.trans(key), DTYPE), 0.0)
    out = product(share * past, values_before, DTYPE)
    if SINKS > 0:
        out += product(share * far, sink_values, DTYPE)
    out += product(w * within + share * own, values, DTYPE)
    if PACKED:  # a document that began here has no state
        query = tl.where(continues(starts, start)[:, None], query, 0.0)
    out += w * product(query, state, DTYPE)
    store_tile(output, places, columns, out, T * H, D, D)
