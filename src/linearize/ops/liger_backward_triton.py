"""Backward kernels of Liger Attention; shapes and names as in `liger_triton`.

Three passes: the gradients of the states, from the last chunk to the first; then for every chunk at once the gradients
of its queries, and those of its keys and values. What the forward pass had in registers is computed again.

The gate's gradient is a sum over the chunk of query · dquery - key · dkey, in which most terms cancel: it is taken of
the operands exactly as rounded for the matrix products, in fp32, so that they do.
"""

import triton
import triton.language as tl

from linearize.ops.liger_triton import (
    CHUNK,
    GONE,
    LEVELS,
    LIMIT,
    SINK_ROWS,
    decay_between,
    decay_to_boundary,
    decay_to_end,
    feature,
    feature_backward,
    key_and_gate,
    key_and_gate_backward,
    load_first,
    load_one_first,
    load_rotated,
    load_tile,
    merged_at,
    product,
    rotate_back,
    running_sum,
    sink_mask,
    sink_rows,
    store_tile,
    window_mask,
)


@triton.jit(do_not_specialize=["T", "SEGMENT"])
def state_gradients_kernel(
    q, k, doutput, mixing, first, decay, initial, dstates, final, products, T, SEGMENT, rate, lower,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    FEATURE: tl.constexpr, SCALAR: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """`states_kernel` run backwards: dS ← exp(total of log_g) dS + Σ over the group (query decayed from the chunk's
    start)ᵀ w doutput. The gradient of the state after every chunk goes to `dstates`."""
    block, segment, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments, chunks, H = tl.num_programs(1), tl.cdiv(T, CHUNK), KV * GROUPS
    batch, head = pair // KV, pair % KV
    k += (batch * T * KV + head) * D
    first += batch * T
    channels, columns = tl.arange(0, DP), block * BV + tl.arange(0, BV)
    inside = (channels < D)[:, None] & (columns < D)[None, :]
    offsets = channels[:, None] * D + columns[None, :]
    fixed = tl.load(decay + head)
    dstate = tl.load(initial + (pair * segments + segment) * D * D + offsets, mask=inside, other=0.0)
    kept = tl.full([DP], 1.0, tl.float32)
    stop = tl.minimum(chunks, (segment + 1) * SEGMENT)
    for n in range(segment * SEGMENT, stop):
        chunk = segment * SEGMENT + stop - 1 - n
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        if STORE:
            place = dstates + (pair * chunks + chunk) * D * D + offsets
            tl.store(place, dstate.to(dstates.dtype.element_ty), mask=inside)
        x = load_tile(k, rows, channels, T, KV * D, D).to(tl.float32)
        _, log_g = key_and_gate(x, rows < T, channels, fixed, rate, lower, D, GATE, FEATURE)
        passed, from_start = tl.exp(tl.sum(log_g, 0)), tl.exp(running_sum(log_g, SCALAR))
        if PACKED:
            begins = tl.maximum(chunk * CHUNK, 1)
            reads = (load_first(first, rows, T, PACKED) < begins).to(tl.float32)
            from_start = from_start * reads[:, None]
            last_first = load_one_first(first, tl.minimum(chunk * CHUNK + CHUNK, T) - 1, PACKED)
            passed = tl.where(last_first < begins, passed, 0.0)
        dstate = dstate * passed[:, None]
        for group in range(GROUPS):
            at = (batch * T * H + head * GROUPS + group) * D
            query = feature(load_tile(q + at, rows, channels, T, H * D, D).to(tl.float32), channels, D, FEATURE)
            dout = load_tile(doutput + at, rows, columns, T, H * D, D)
            w = tl.load(mixing + head * GROUPS + group)
            dstate += product(tl.trans(query * from_start * w), dout, DTYPE)
        kept *= passed
    tl.store(final + (pair * segments + segment) * D * D + offsets, dstate, mask=inside)
    if not STORE:
        tl.store(products + (pair * segments + segment) * D + channels, kept, mask=channels < D)


@triton.jit
def query_gradient(da, key, near_key, log_g, centred, fast, DTYPE: tl.constexpr, SCALAR: tl.constexpr):
    """The gradient of the query in `scores`, from that of its result, 0 where nothing is seen."""
    if SCALAR:
        dquery = product(da * decay_between(log_g), key, DTYPE)
    elif fast:
        dquery = product(da, near_key, DTYPE) * tl.exp(centred)
    else:
        i = tl.arange(0, CHUNK)
        dquery = tl.sum(tl.where(i[:, None] == i[None, :], da, 0.0), 1)[:, None] * key
        for level in range(LEVELS):
            decay, right = decay_to_boundary(log_g, 1 << level, DTYPE)
            merged = tl.where(merged_at(1 << level), da, 0.0)
            dquery += tl.where(right, product(merged, tl.where(right, 0.0, key * decay), DTYPE) * decay, 0.0)
    return dquery


@triton.jit
def key_gradient(da, query, key, near_key, log_g, centred, fast, seen, DTYPE: tl.constexpr, SCALAR: tl.constexpr):
    """The result of `scores` again, the gradient of its key, and the terms of the gate's gradient `[C, K]`: its sum
    from each token to the chunk's end is that of log_g."""
    i = tl.arange(0, CHUNK)
    if SCALAR:
        between = decay_between(log_g)
        a = tl.where(seen, product(query, tl.trans(key), DTYPE) * between, 0.0)
        dkey = product(tl.trans(da * between), query, DTYPE)
        terms = (tl.sum(a * da, 1) - tl.sum(a * da, 0))[:, None]
    elif fast:
        near_query = (query * tl.exp(centred)).to(DTYPE)
        a = product(near_query, tl.trans(near_key), DTYPE)
        dnear_key = product(tl.trans(da), near_query, DTYPE)
        terms = near_query.to(tl.float32) * product(da, near_key, DTYPE) - near_key.to(tl.float32) * dnear_key
        dkey = dnear_key * tl.exp(-centred)
    else:
        here = i[:, None] == i[None, :]
        a = tl.where(here, product(query, tl.trans(key), DTYPE), 0.0)
        dkey = tl.sum(tl.where(here, da, 0.0), 0)[:, None] * query
        terms = tl.zeros_like(dkey)
        for level in range(LEVELS):
            decay, right = decay_to_boundary(log_g, 1 << level, DTYPE)
            right_query = tl.where(right, query * decay, 0.0).to(DTYPE)
            left_key = tl.where(right, 0.0, key * decay).to(DTYPE)
            merged = merged_at(1 << level)
            a += tl.where(merged, product(right_query, tl.trans(left_key), DTYPE), 0.0)
            da_merged = tl.where(merged, da, 0.0)
            dleft_key = product(tl.trans(da_merged), right_query, DTYPE)
            terms += right_query.to(tl.float32) * product(da_merged, left_key, DTYPE)
            terms -= left_key.to(tl.float32) * dleft_key
            dkey += tl.where(right, 0.0, dleft_key * decay)
    return tl.where(seen, a, 0.0), dkey, terms


@triton.jit(do_not_specialize=["T", "rope_stride"])
def query_gradients_kernel(
    q, k, v, cos, sin, mixing, first, decay, states, lse, doutput, dq, delta, dmixing, dsink_key, dsink_values,
    T, rope_stride, rate, lower, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    SINKS: tl.constexpr, GATE: tl.constexpr, FEATURE: tl.constexpr, SCALAR: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradient of a chunk's queries; besides, for each query doutput · window output, `delta` `[B, H, T]`, and
    what the chunk adds to the gradients of the mixing weights, `dmixing` `[B, H, chunks]`, and of the sinks, after
    RoPE, `[B * KV, chunks, SINKS, D]`."""
    chunk, pair = tl.program_id(0), tl.program_id(1)
    chunks = tl.num_programs(0)
    batch, head, H = (pair // KV).to(tl.int64), pair % KV, KV * GROUPS
    k += (batch * T * KV + head) * D
    v += (batch * T * KV + head) * D
    cos += batch * rope_stride
    sin += batch * rope_stride
    first += batch * T
    start = chunk * CHUNK
    rows, before, columns = start + tl.arange(0, CHUNK), start - CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    starts, chunk_first = load_first(first, rows, T, PACKED), load_one_first(first, start, PACKED)

    x = load_tile(k, rows, columns, T, KV * D, D).to(tl.float32)
    key, log_g = key_and_gate(x, rows < T, columns, tl.load(decay + head), rate, lower, D, GATE, FEATURE)
    to_query, total = running_sum(log_g, SCALAR), tl.sum(log_g, 0)
    fast = tl.min(total) > LIMIT
    centred = to_query - 0.5 * total[None, :]
    near_key = (key * tl.exp(tl.minimum(-centred, -LIMIT))).to(DTYPE)
    key = key.to(DTYPE)
    values = load_tile(v, rows, columns, T, KV * D, D).to(DTYPE)
    values_before = load_tile(v, before, columns, T, KV * D, D).to(DTYPE)
    own_key = load_rotated(k, rows, columns, cos, sin, T, KV * D, D, R).to(DTYPE)
    key_before = load_rotated(k, before, columns, cos, sin, T, KV * D, D, R).to(DTYPE)
    causal = (rows[:, None] >= rows[None, :]) & (rows[None, :] >= starts[:, None])
    own_seen, before_seen = window_mask(rows, rows, starts, W), window_mask(rows, before, starts, W)
    reads = (starts < tl.maximum(start, 1)).to(tl.float32)[:, None]
    inside = (columns < D)[:, None] & (columns < D)[None, :]
    at = (pair.to(tl.int64) * chunks + chunk) * D * D
    state = tl.load(states + at + columns[:, None] * D + columns[None, :], mask=inside, other=0.0)
    if SINKS > 0:
        sinks = sink_rows(chunk_first, SINKS)
        sink_key = load_rotated(k, sinks, columns, cos, sin, T, KV * D, D, R).to(DTYPE)
        sink_values = load_tile(v, sinks, columns, T, KV * D, D).to(DTYPE)
        kept = sink_mask(rows, sinks, starts, chunk_first, W)
        dfar_key = tl.zeros([SINK_ROWS, DP], tl.float32)
        dfar_values = tl.zeros([SINK_ROWS, DP], tl.float32)

    for group in range(GROUPS):
        query_head = head * GROUPS + group
        w = tl.load(mixing + query_head)
        q_head = q + (batch * T * H + query_head) * D
        dout = load_tile(doutput + (batch * T * H + query_head) * D, rows, columns, T, H * D, D).to(DTYPE)
        rotated = load_rotated(q_head, rows, columns, cos, sin, T, H * D, D, R).to(DTYPE)
        norm = tl.load(lse + (batch * H + query_head) * T + rows, mask=rows < T, other=0.0)[:, None]
        own = tl.where(own_seen, product(rotated, tl.trans(own_key), DTYPE) * scale, -float("inf"))
        past = tl.where(before_seen, product(rotated, tl.trans(key_before), DTYPE) * scale, -float("inf"))
        own, past = tl.exp(own - norm), tl.exp(past - norm)
        down, dpast = product(dout, tl.trans(values), DTYPE), product(dout, tl.trans(values_before), DTYPE)
        read = tl.sum(own * down, 1) + tl.sum(past * dpast, 1)
        if SINKS > 0:
            far = tl.where(kept, product(rotated, tl.trans(sink_key), DTYPE) * scale, -float("inf"))
            far = tl.exp(far - norm)
            dfar = product(dout, tl.trans(sink_values), DTYPE)
            read += tl.sum(far * dfar, 1)
        tl.store(delta + (batch * H + query_head) * T + rows, read, mask=rows < T)
        share = (1.0 - w) * scale
        drotated = product(share * own * (down - read[:, None]), own_key, DTYPE)
        drotated += product(share * past * (dpast - read[:, None]), key_before, DTYPE)
        if SINKS > 0:
            dfar = share * far * (dfar - read[:, None])
            drotated += product(dfar, sink_key, DTYPE)
            dfar_key += product(tl.trans(dfar), rotated, DTYPE)
            dfar_values += product(tl.trans((1.0 - w) * far), dout, DTYPE)

        raw = load_tile(q_head, rows, columns, T, H * D, D).to(tl.float32)
        da = tl.where(causal, down, 0.0)
        dquery = query_gradient(da, key, near_key, log_g, centred, fast, DTYPE, SCALAR)
        dquery += product(dout, tl.trans(state), DTYPE) * (tl.exp(to_query) * reads)
        gain = tl.sum(tl.sum(feature(raw, columns, D, FEATURE) * dquery, 1) - read, 0)
        tl.store(dmixing + (batch * H + query_head) * chunks + chunk, gain)
        draw = feature_backward(raw, w * dquery, columns, D, FEATURE)
        draw += rotate_back(drotated, rows, columns, cos, sin, T, R)
        store_tile(dq + (batch * T * H + query_head) * D, rows, columns, draw, T, H * D, D)

    if SINKS > 0:
        slots = tl.arange(0, SINK_ROWS)
        at = (pair.to(tl.int64) * chunks + chunk) * SINKS * D
        store_tile(dsink_key + at, slots, columns, dfar_key, SINKS, D, D)
        store_tile(dsink_values + at, slots, columns, dfar_values, SINKS, D, D)


@triton.jit(do_not_specialize=["T", "rope_stride"])
def key_gradients_kernel(
    q, k, v, cos, sin, mixing, first, decay, states, dstates, lse, delta, doutput, dk, dv,
    T, rope_stride, rate, lower, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    GATE: tl.constexpr, FEATURE: tl.constexpr, SCALAR: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's keys (as keys of both branches and as the gate) and values, from its own queries,
    from the window of the next chunk's, and from the state after it."""
    chunk, pair = tl.program_id(0), tl.program_id(1)
    batch, head, H = (pair // KV).to(tl.int64), pair % KV, KV * GROUPS
    at = (batch * T * KV + head) * D
    k += at
    v += at
    cos += batch * rope_stride
    sin += batch * rope_stride
    first += batch * T
    start = chunk * CHUNK
    rows, after, columns = start + tl.arange(0, CHUNK), start + CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    starts, starts_after = load_first(first, rows, T, PACKED), load_first(first, after, T, PACKED)
    last_first = load_one_first(first, tl.minimum(start + CHUNK, T) - 1, PACKED)
    begins = tl.maximum(start, 1)

    raw = load_tile(k, rows, columns, T, KV * D, D).to(tl.float32)
    key, log_g = key_and_gate(raw, rows < T, columns, tl.load(decay + head), rate, lower, D, GATE, FEATURE)
    to_query, total = running_sum(log_g, SCALAR), tl.sum(log_g, 0)
    fast = tl.min(total) > LIMIT
    centred = to_query - 0.5 * total[None, :]
    near_key = (key * tl.exp(tl.minimum(-centred, -LIMIT))).to(DTYPE)
    key = key.to(DTYPE)
    values = load_tile(v, rows, columns, T, KV * D, D).to(DTYPE)
    own_key = load_rotated(k, rows, columns, cos, sin, T, KV * D, D, R).to(DTYPE)
    causal = (rows[:, None] >= rows[None, :]) & (rows[None, :] >= starts[:, None])
    own_seen, after_seen = window_mask(rows, rows, starts, W), window_mask(after, rows, starts_after, W)
    reads = (starts < begins).to(tl.float32)[:, None]
    inside = (columns < D)[:, None] & (columns < D)[None, :]
    square = (pair.to(tl.int64) * tl.num_programs(0) + chunk) * D * D + columns[:, None] * D + columns[None, :]
    state = tl.load(states + square, mask=inside, other=0.0)

    drotated, dvalues = tl.zeros([CHUNK, DP], tl.float32), tl.zeros([CHUNK, DP], tl.float32)
    dkey, terms = tl.zeros([CHUNK, DP], tl.float32), tl.zeros_like(log_g)
    for group in range(GROUPS):
        query_head = head * GROUPS + group
        w = tl.load(mixing + query_head)
        q_head = q + (batch * T * H + query_head) * D
        dout_head = doutput + (batch * T * H + query_head) * D
        row_sums = (batch * H + query_head) * T

        dout = load_tile(dout_head, rows, columns, T, H * D, D).to(DTYPE)
        rotated = load_rotated(q_head, rows, columns, cos, sin, T, H * D, D, R).to(DTYPE)
        norm = tl.load(lse + row_sums + rows, mask=rows < T, other=0.0)[:, None]
        read = tl.load(delta + row_sums + rows, mask=rows < T, other=0.0)[:, None]
        own = tl.where(own_seen, product(rotated, tl.trans(own_key), DTYPE) * scale, -float("inf"))
        own = (1.0 - w) * tl.exp(own - norm)
        down = product(dout, tl.trans(values), DTYPE)
        drotated += product(tl.trans(scale * own * (down - read)), rotated, DTYPE)

        query = feature(load_tile(q_head, rows, columns, T, H * D, D).to(tl.float32), columns, D, FEATURE)
        da = tl.where(causal, w * down, 0.0)
        a, dkey_here, terms_here = key_gradient(da, query, key, near_key, log_g, centred, fast, causal, DTYPE, SCALAR)
        dkey += dkey_here
        terms += terms_here
        dvalues += product(tl.trans(w * a + own), dout, DTYPE)
        carried = (query * tl.exp(to_query) * (w * reads)).to(DTYPE)
        from_state = carried.to(tl.float32) * product(dout, tl.trans(state), DTYPE)
        terms += tl.sum(from_state, 1, keep_dims=True) if SCALAR else from_state

        dout = load_tile(dout_head, after, columns, T, H * D, D).to(DTYPE)
        rotated = load_rotated(q_head, after, columns, cos, sin, T, H * D, D, R).to(DTYPE)
        norm = tl.load(lse + row_sums + after, mask=after < T, other=0.0)[:, None]
        read = tl.load(delta + row_sums + after, mask=after < T, other=0.0)[:, None]
        late = tl.where(after_seen, product(rotated, tl.trans(own_key), DTYPE) * scale, -float("inf"))
        late = (1.0 - w) * tl.exp(late - norm)
        down = product(dout, tl.trans(values), DTYPE)
        drotated += product(tl.trans(scale * late * (down - read)), rotated, DTYPE)
        dvalues += product(tl.trans(late), dout, DTYPE)

    dstate = tl.load(dstates + square, mask=inside, other=0.0)
    to_end = tl.exp(decay_to_end(log_g, to_query, fast, DTYPE, SCALAR))
    passed = tl.exp(total)
    if PACKED:
        to_end = tl.where((rows >= last_first)[:, None], to_end, 0.0)
        passed = tl.where(last_first < begins, passed, 0.0)
    ended = (key * to_end).to(DTYPE)
    dended = product(values, tl.trans(dstate), DTYPE)
    dvalues += product(ended, dstate, DTYPE)
    written = ended.to(tl.float32) * dended
    held = tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1) * passed
    if SCALAR:
        written, held = tl.sum(written, 1, keep_dims=True), tl.sum(held, 0)
        dlog_g = running_sum(terms - written, SCALAR, True) + tl.sum(written, 0)[None, :] + held
    else:
        dlog_g = running_sum(terms - written, SCALAR, True) + (tl.sum(written, 0) + held)[None, :]
    dkey += dended * to_end
    dlog_g = tl.where(log_g > GONE, dlog_g, 0.0)  # else the sum's rounding, times the slope of a steep gate
    draw = key_and_gate_backward(raw, dkey, dlog_g, columns, rate, lower, D, GATE, FEATURE)
    draw += rotate_back(drotated, rows, columns, cos, sin, T, R)
    store_tile(dk + at, rows, columns, draw, T, KV * D, D)
    store_tile(dv + at, rows, columns, dvalues, T, KV * D, D)
