"""The window of Liger Attention by itself: its share of the output, and of the gradients.

It reads q, k and v as they are and rotates them itself. The terms are those of `liger_triton`.
"""

import triton
import triton.language as tl

from linearize.ops.liger_triton import (
    CHUNK,
    exp,
    load_first,
    load_one_first,
    load_rope,
    load_tile,
    partner_of,
    product,
    rotate_back,
    rotated,
    sink_mask,
    sink_rows,
    store_by_sink,
    store_tile,
    window_mask,
)


@triton.jit
def load_turned(base, rows, columns, cos, sin, T, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """`load_tile`, after RoPE."""
    x = load_tile(base, rows, columns, T, STRIDE, D)
    if R > 0:
        c, s = load_rope(cos, sin, rows, columns, T, R)
        x = rotated(x, load_tile(base, rows, partner_of(columns, R), T, STRIDE, D), c, s).to(x.dtype)
    return x


@triton.jit(do_not_specialize=["T", "rope_stride"])
def window_kernel(
    q, k, v, cos, sin, mixing, first, output, lse, T, rope_stride, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    SINKS: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """output = (1 - w) · window, for one chunk and one query head; with KEEP, the log-sum-exp of each query's window
    goes to `lse` `[B, H, T]`."""
    chunk, H = tl.program_id(0), KV * GROUPS
    index = tl.program_id(1).to(tl.int64)  # of a query head among all sequences
    batch, query_head = index // H, index % H
    ours, theirs = (batch * T * H + query_head) * D, (batch * T * KV + query_head // GROUPS) * D
    start = chunk * CHUNK
    rows, before, columns = start + tl.arange(0, CHUNK), start - CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    first += batch * T
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R
    starts = load_first(first, rows, T, PACKED)
    query = load_turned(q + ours, rows, columns, cos, sin, T, H * D, D, R)
    key = load_turned(k + theirs, rows, columns, cos, sin, T, KV * D, D, R)
    key_before = load_turned(k + theirs, before, columns, cos, sin, T, KV * D, D, R)
    values = load_tile(v + theirs, rows, columns, T, KV * D, D)
    values_before = load_tile(v + theirs, before, columns, T, KV * D, D)
    own = product(query, tl.trans(key), DTYPE) * scale
    past = product(query, tl.trans(key_before), DTYPE) * scale
    own = tl.where(window_mask(rows, rows, starts, W), own, -float("inf"))
    past = tl.where(window_mask(rows, before, starts, W), past, -float("inf"))
    largest = tl.maximum(tl.max(own, 1), tl.max(past, 1))
    if SINKS > 0:
        chunk_first = load_one_first(first, start, PACKED)
        sinks = sink_rows(chunk_first, SINKS)
        far = product(query, tl.trans(load_turned(k + theirs, sinks, columns, cos, sin, T, KV * D, D, R)), DTYPE)
        far = tl.where(sink_mask(rows, sinks, starts, chunk_first, W), far * scale, -float("inf"))
        largest = tl.maximum(largest, tl.max(far, 1))
        far = exp(far - largest[:, None])
    own, past = exp(own - largest[:, None]), exp(past - largest[:, None])
    weight = tl.sum(own, 1) + tl.sum(past, 1)
    if SINKS > 0:
        weight += tl.sum(far, 1)
    if KEEP:
        tl.store(lse + index * T + rows, largest + tl.log(weight), mask=rows < T)
    out = product(own, values, DTYPE) + product(past, values_before, DTYPE)
    if SINKS > 0:
        out += product(far, load_tile(v + theirs, sinks, columns, T, KV * D, D), DTYPE)
    out *= ((1.0 - tl.load(mixing + query_head)) / weight)[:, None]
    store_tile(output + ours, rows, columns, out, T, H * D, D)


@triton.jit(do_not_specialize=["T", "rope_stride"])
def window_query_gradients_kernel(
    q, k, v, cos, sin, mixing, first, lse, doutput, dq, delta, dmixing, dsink_key, dsink_values, T, rope_stride, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    SINKS: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The gradient of a chunk's queries of one head; besides, for each query doutput · window, `delta` `[B, H, T]`,
    and what the chunk adds to the gradients of the mixing weights, `dmixing` `[B, H, chunks]`, and of the sinks, after
    RoPE, `[B, H, chunks, SINKS, D]`. If TURNED, q and k are given after RoPE."""
    chunk, chunks, H = tl.program_id(0), tl.num_programs(0), KV * GROUPS
    index = tl.program_id(1).to(tl.int64)  # of a query head among all sequences
    batch, query_head = index // H, index % H
    ours, theirs = (batch * T * H + query_head) * D, (batch * T * KV + query_head // GROUPS) * D
    start = chunk * CHUNK
    rows, before, columns = start + tl.arange(0, CHUNK), start - CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    first += batch * T
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R
    starts = load_first(first, rows, T, PACKED)
    w = tl.load(mixing + query_head)
    share = (1.0 - w) * scale
    norm = tl.load(lse + index * T + rows, mask=rows < T, other=0.0)[:, None]
    query = load_turned(q + ours, rows, columns, cos, sin, T, H * D, D, 0 if TURNED else R)
    dout = load_tile(doutput + ours, rows, columns, T, H * D, D)

    key = load_turned(k + theirs, rows, columns, cos, sin, T, KV * D, D, 0 if TURNED else R)
    key_before = load_turned(k + theirs, before, columns, cos, sin, T, KV * D, D, 0 if TURNED else R)
    own, past = product(query, tl.trans(key), DTYPE) * scale, product(query, tl.trans(key_before), DTYPE) * scale
    own = exp(tl.where(window_mask(rows, rows, starts, W), own, -float("inf")) - norm)
    past = exp(tl.where(window_mask(rows, before, starts, W), past, -float("inf")) - norm)
    down = product(dout, tl.trans(load_tile(v + theirs, rows, columns, T, KV * D, D)), DTYPE)
    dpast = product(dout, tl.trans(load_tile(v + theirs, before, columns, T, KV * D, D)), DTYPE)
    read = tl.sum(own * down, 1) + tl.sum(past * dpast, 1)
    if SINKS > 0:
        chunk_first = load_one_first(first, start, PACKED)
        sinks = sink_rows(chunk_first, SINKS)
        sink_key = load_turned(k + theirs, sinks, columns, cos, sin, T, KV * D, D, 0 if TURNED else R)
        far = product(query, tl.trans(sink_key), DTYPE) * scale
        far = exp(tl.where(sink_mask(rows, sinks, starts, chunk_first, W), far, -float("inf")) - norm)
        dfar = product(dout, tl.trans(load_tile(v + theirs, sinks, columns, T, KV * D, D)), DTYPE)
        read += tl.sum(far * dfar, 1)
    tl.store(delta + index * T + rows, read, mask=rows < T)
    tl.store(dmixing + index * chunks + chunk, -tl.sum(tl.where(rows < T, read, 0.0), 0))
    dquery = product(share * own * (down - read[:, None]), key, DTYPE)
    dquery += product(share * past * (dpast - read[:, None]), key_before, DTYPE)
    if SINKS > 0:
        dfar = share * far * (dfar - read[:, None])
        dquery += product(dfar, sink_key, DTYPE)
        at = (index * chunks + chunk) * SINKS * D
        store_by_sink(dsink_key + at, dfar, query, columns, SINKS, D, DTYPE)
        store_by_sink(dsink_values + at, (1.0 - w) * far, dout, columns, SINKS, D, DTYPE)
    dquery = rotate_back(dquery, rows, columns, cos, sin, T, R)
    store_tile(dq + ours, rows, columns, dquery, T, H * D, D)


@triton.jit(do_not_specialize=["T", "rope_stride"])
def window_key_gradients_kernel(
    q, k, v, cos, sin, mixing, first, lse, delta, doutput, dk, dv, T, rope_stride, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's keys and values, from the window of its queries and the next chunk's; not of sinks."""
    chunk, H = tl.program_id(0), KV * GROUPS
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // KV, pair % KV
    theirs = (batch * T * KV + head) * D
    rows, columns = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R
    key = load_turned(k + theirs, rows, columns, cos, sin, T, KV * D, D, R)
    values = load_tile(v + theirs, rows, columns, T, KV * D, D)
    dkey, dvalues = tl.zeros([CHUNK, DP], tl.float32), tl.zeros([CHUNK, DP], tl.float32)
    for n in range(2 * GROUPS):
        query_head, times = head * GROUPS + n // 2, rows + n % 2 * CHUNK
        ours, sums = (batch * T * H + query_head) * D, (batch * H + query_head) * T + times
        query = load_turned(q + ours, times, columns, cos, sin, T, H * D, D, R)
        dout = load_tile(doutput + ours, times, columns, T, H * D, D)
        norm = tl.load(lse + sums, mask=times < T, other=0.0)
        read = tl.load(delta + sums, mask=times < T, other=0.0)
        share = 1.0 - tl.load(mixing + query_head)
        starts, age = load_first(first + batch * T, times, T, PACKED), times[None, :] - rows[:, None]
        seen = (age >= 0) & (age < W) & (rows[:, None] >= starts[None, :])  # [key, query]
        p = product(key, tl.trans(query), DTYPE) * scale
        p = share * exp(tl.where(seen, p, -float("inf")) - norm[None, :])
        dp = product(values, tl.trans(dout), DTYPE)
        dvalues += product(p, dout, DTYPE)
        dkey += product(p * (dp - read[None, :]), query, DTYPE)
    dkey = rotate_back(scale * dkey, rows, columns, cos, sin, T, R)
    store_tile(dk + theirs, rows, columns, dkey, T, KV * D, D)
    store_tile(dv + theirs, rows, columns, dvalues, T, KV * D, D)
