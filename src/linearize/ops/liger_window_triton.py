"""The window of Liger Attention by itself: its share of the output, and of the gradients.

It reads q, k and v as they are and rotates them itself. The terms are those of `liger_triton`. A program has the keys
of two chunks, which are rotated once for all heads that read them; a head's queries are loaded while those before them
are at work. Of a window of more than a chunk it goes through the keys chunk by chunk.
"""

import triton
import triton.language as tl

from linearize.ops.liger_parts_triton import (
    load_parts,
    load_turned,
    product_of_parts,
    store_parts,
    turned,
    turned_back,
    turned_parts,
)
from linearize.ops.liger_triton import (
    CHUNK,
    LOG2_E,
    exp,
    load_first,
    load_one_first,
    load_tile,
    product,
    program,
    rotate_back,
    sink_mask,
    sink_rows,
    store_by_sink,
    store_tile,
    window_mask,
)


@triton.jit
def load_sinks(k, v, first, cos, sin, start, columns, T, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    SINKS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Of a chunk: the first token of its document, where its sinks are, their keys after RoPE, and their values."""
    chunk_first = load_one_first(first, tl.minimum(start, T - 1), PACKED)
    sinks = sink_rows(chunk_first, SINKS)
    key = load_turned(k, sinks, columns, cos, sin, T, STRIDE, D, R)
    return chunk_first, sinks, key, load_tile(v, sinks, columns, T, STRIDE, D)


@triton.jit(do_not_specialize=["T", "rope_stride"])
def window_kernel(
    q, k, v, cos, sin, mixing, first, output, lse, T, rope_stride, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TURNS: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr, SINKS: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """output = (1 - w) · window, for one chunk and TURNS query heads of one key/value head, one after the other; with
    KEEP, the log-sum-exp of each query's window goes to `lse` `[B, H, T]`."""
    chunk, _, index = program()
    H = KV * GROUPS
    index = index * TURNS  # of the first query head among all sequences
    batch, head = index // H, index % H
    theirs = (batch * T * KV + head // GROUPS) * D
    start = chunk * CHUNK
    rows, keys = start + tl.arange(0, CHUNK), start - CHUNK + tl.arange(0, 2 * CHUNK)
    columns = tl.arange(0, DP)
    first += batch * T
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R
    starts = load_first(first, rows, T, PACKED)
    lowest = tl.maximum(starts, rows - W + 1)
    key = load_turned(k + theirs, keys, columns, cos, sin, T, KV * D, D, R)
    values = load_tile(v + theirs, keys, columns, T, KV * D, D)
    if SINKS > 0:
        chunk_first, sinks, sink_key, sink_values = load_sinks(
            k + theirs, v + theirs, first, cos, sin, start, columns, T, KV * D, D, R, SINKS, PACKED
        )
    ours = (batch * T * H + head) * D
    x, partner = load_parts(q + ours, rows, columns, T, H * D, D, R, False)
    for n in range(TURNS):
        query = turned(x, partner, rows, columns, cos, sin, T, R)
        x, partner = load_parts(q + ours + tl.minimum(n + 1, TURNS - 1) * D, rows, columns, T, H * D, D, R, False)
        near = product(query, tl.trans(key), DTYPE)
        seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= lowest[:, None])
        near = tl.where(seen, near, -float("inf"))
        largest = tl.max(near, 1)
        if SINKS > 0:
            far = product(query, tl.trans(sink_key), DTYPE)
            far = tl.where(sink_mask(rows, sinks, starts, chunk_first, W), far, -float("inf"))
            largest = tl.maximum(largest, tl.max(far, 1))
        near = tl.exp2((near - largest[:, None]) * (scale * LOG2_E))
        weight = tl.sum(near, 1)
        out = product(near, values, DTYPE)
        if SINKS > 0:
            far = tl.exp2((far - largest[:, None]) * (scale * LOG2_E))
            weight += tl.sum(far, 1)
            out += product(far, sink_values, DTYPE)
        if KEEP:
            tl.store(lse + (index + n) * T + rows, largest * scale + tl.log(weight), mask=rows < T)
        out *= ((1.0 - tl.load(mixing + head + n)) / weight)[:, None]
        store_tile(output + ours + n * D, rows, columns, out, T, H * D, D)


@triton.jit(do_not_specialize=["T", "rope_stride"])
def long_window_kernel(
    q, k, v, cos, sin, mixing, first, output, lse, T, rope_stride, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    SINKS: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """As `window_kernel`, for one query head and a window of more than a chunk: chunk after chunk of its keys, under a
    running maximum."""
    chunk, _, index = program()
    H = KV * GROUPS
    batch, head = index // H, index % H
    ours, theirs = (batch * T * H + head) * D, (batch * T * KV + head // GROUPS) * D
    start = chunk * CHUNK
    rows, columns = start + tl.arange(0, CHUNK), tl.arange(0, DP)
    first += batch * T
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R
    starts = load_first(first, rows, T, PACKED)
    query = load_turned(q + ours, rows, columns, cos, sin, T, H * D, D, R)
    largest = tl.full([CHUNK], -float("inf"), tl.float32)
    weight, out = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK, DP], tl.float32)
    for back in range((W + CHUNK - 2) // CHUNK + 1):  # first its own chunk, where every query sees itself
        keys = rows - back * CHUNK
        key = load_turned(k + theirs, keys, columns, cos, sin, T, KV * D, D, R)
        near = product(query, tl.trans(key), DTYPE)
        near = tl.where(window_mask(rows, keys, starts, W), near, -float("inf"))
        before, largest = largest, tl.maximum(largest, tl.max(near, 1))
        near = tl.exp2((near - largest[:, None]) * (scale * LOG2_E))
        fade = tl.exp2((before - largest) * (scale * LOG2_E))
        weight = weight * fade + tl.sum(near, 1)
        out = out * fade[:, None] + product(near, load_tile(v + theirs, keys, columns, T, KV * D, D), DTYPE)
    if SINKS > 0:
        chunk_first, sinks, sink_key, sink_values = load_sinks(
            k + theirs, v + theirs, first, cos, sin, start, columns, T, KV * D, D, R, SINKS, PACKED
        )
        far = product(query, tl.trans(sink_key), DTYPE)
        far = tl.where(sink_mask(rows, sinks, starts, chunk_first, W), far, -float("inf"))
        before, largest = largest, tl.maximum(largest, tl.max(far, 1))
        far = tl.exp2((far - largest[:, None]) * (scale * LOG2_E))
        fade = tl.exp2((before - largest) * (scale * LOG2_E))
        weight = weight * fade + tl.sum(far, 1)
        out = out * fade[:, None] + product(far, sink_values, DTYPE)
    if KEEP:
        tl.store(lse + index * T + rows, largest * scale + tl.log(weight), mask=rows < T)
    out *= ((1.0 - tl.load(mixing + head)) / weight)[:, None]
    store_tile(output + ours, rows, columns, out, T, H * D, D)


@triton.jit(do_not_specialize=["T", "rope_stride"])
def window_query_gradients_kernel(
    q, k, v, cos, sin, mixing, first, lse, doutput, dq, delta, dmixing, dsink_key, dsink_values, T, rope_stride, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    SINKS: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, TURNED: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The gradient of a chunk's queries of one head; besides, for each query doutput · window, `delta` `[B, H, T]`,
    and what the chunk adds to the gradients of the mixing weights, `dmixing` `[B, H, chunks]`, and of the sinks, after
    RoPE, `[B, H, chunks, SINKS, D]`. If TURNED, q and k are given after RoPE; of HALVES, see `turned_parts`."""
    chunk, chunks, index = program()  # of a query head among all sequences
    H = KV * GROUPS
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
    TURNS: tl.constexpr = 0 if TURNED else R
    key, key_right = load_parts(k + theirs, rows, columns, T, KV * D, D, TURNS, HALVES)
    old, old_right = load_parts(k + theirs, before, columns, T, KV * D, D, TURNS, HALVES)
    dout = load_tile(doutput + ours, rows, columns, T, H * D, D)
    if DP <= 64:  # at one time; with more channels there is not the shared memory for two programs
        values = load_tile(v + theirs, rows, columns, T, KV * D, D)
        values_before = load_tile(v + theirs, before, columns, T, KV * D, D)
    query, query_right = load_parts(q + ours, rows, columns, T, H * D, D, TURNS, HALVES)  # it is waited for first
    query, query_right = turned_parts(query, query_right, rows, columns, cos, sin, T, TURNS, HALVES)
    key, key_right = turned_parts(key, key_right, rows, columns, cos, sin, T, TURNS, HALVES)
    old, old_right = turned_parts(old, old_right, before, columns, cos, sin, T, TURNS, HALVES)
    norm = tl.load(lse + index * T + rows, mask=rows < T, other=0.0)[:, None]
    own = product_of_parts(query, query_right, key, key_right, HALVES, DTYPE) * scale
    past = product_of_parts(query, query_right, old, old_right, HALVES, DTYPE) * scale
    own = exp(tl.where(window_mask(rows, rows, starts, W), own, -float("inf")) - norm)
    past = exp(tl.where(window_mask(rows, before, starts, W), past, -float("inf")) - norm)
    if DP > 64:
        values = load_tile(v + theirs, rows, columns, T, KV * D, D)
    down = product(dout, tl.trans(values), DTYPE)
    if DP > 64:
        values_before = load_tile(v + theirs, before, columns, T, KV * D, D)
    dpast = product(dout, tl.trans(values_before), DTYPE)
    read = tl.sum(own * down, 1) + tl.sum(past * dpast, 1)
    if SINKS > 0:
        chunk_first = load_one_first(first, start, PACKED)
        sinks = sink_rows(chunk_first, SINKS)
        sink, sink_right = load_parts(k + theirs, sinks, columns, T, KV * D, D, TURNS, HALVES)
        sink, sink_right = turned_parts(sink, sink_right, sinks, columns, cos, sin, T, TURNS, HALVES)
        far = product_of_parts(query, query_right, sink, sink_right, HALVES, DTYPE) * scale
        far = exp(tl.where(sink_mask(rows, sinks, starts, chunk_first, W), far, -float("inf")) - norm)
        dfar = product(dout, tl.trans(load_tile(v + theirs, sinks, columns, T, KV * D, D)), DTYPE)
        read += tl.sum(far * dfar, 1)
    tl.store(delta + index * T + rows, read, mask=rows < T)
    tl.store(dmixing + index * chunks + chunk, -tl.sum(tl.where(rows < T, read, 0.0), 0))
    down = (share * own * (down - read[:, None])).to(DTYPE)
    dpast = (share * past * (dpast - read[:, None])).to(DTYPE)
    dquery = product(down, key, DTYPE) + product(dpast, old, DTYPE)
    dquery_right = dquery
    if HALVES:
        dquery_right = product(down, key_right, DTYPE) + product(dpast, old_right, DTYPE)
    if SINKS > 0:
        dfar = (share * far * (dfar - read[:, None])).to(DTYPE)
        at = (index * chunks + chunk) * SINKS * D
        dquery += product(dfar, sink, DTYPE)
        if HALVES:
            dquery_right += product(dfar, sink_right, DTYPE)
            half = tl.arange(0, DP // 2)
            store_by_sink(dsink_key + at, dfar, query, half, SINKS, D, DTYPE)
            store_by_sink(dsink_key + at + DP // 2, dfar, query_right, half, SINKS, D, DTYPE)
        else:
            store_by_sink(dsink_key + at, dfar, query, columns, SINKS, D, DTYPE)
        store_by_sink(dsink_values + at, (1.0 - w) * far, dout, columns, SINKS, D, DTYPE)
    dquery, dquery_right = turned_back(dquery, dquery_right, rows, columns, cos, sin, T, R, HALVES)
    store_parts(dq + ours, rows, columns, dquery, dquery_right, T, H * D, D, HALVES)


@triton.jit(do_not_specialize=["T", "rope_stride"])
def long_window_query_gradients_kernel(
    q, k, v, cos, sin, mixing, first, lse, doutput, dq, delta, dmixing, dsink_key, dsink_values, T, rope_stride, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    SINKS: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """As `window_query_gradients_kernel`, for a window of more than a chunk: once through its keys for what queries
    read, and once for their gradient."""
    chunk, chunks, index = program()  # of a query head among all sequences
    H = KV * GROUPS
    batch, query_head = index // H, index % H
    ours, theirs = (batch * T * H + query_head) * D, (batch * T * KV + query_head // GROUPS) * D
    start = chunk * CHUNK
    rows, columns = start + tl.arange(0, CHUNK), tl.arange(0, DP)
    first += batch * T
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R
    starts = load_first(first, rows, T, PACKED)
    w = tl.load(mixing + query_head)
    share = (1.0 - w) * scale
    norm = tl.load(lse + index * T + rows, mask=rows < T, other=0.0)[:, None]
    query = load_turned(q + ours, rows, columns, cos, sin, T, H * D, D, R)
    dout = load_tile(doutput + ours, rows, columns, T, H * D, D)
    read = tl.zeros([CHUNK], tl.float32)
    for back in range((W + CHUNK - 2) // CHUNK + 1):
        keys = rows - back * CHUNK
        key = load_turned(k + theirs, keys, columns, cos, sin, T, KV * D, D, R)
        near = product(query, tl.trans(key), DTYPE) * scale
        near = exp(tl.where(window_mask(rows, keys, starts, W), near, -float("inf")) - norm)
        dnear = product(dout, tl.trans(load_tile(v + theirs, keys, columns, T, KV * D, D)), DTYPE)
        read += tl.sum(near * dnear, 1)
    if SINKS > 0:
        chunk_first, sinks, sink_key, sink_values = load_sinks(
            k + theirs, v + theirs, first, cos, sin, start, columns, T, KV * D, D, R, SINKS, PACKED
        )
        far = product(query, tl.trans(sink_key), DTYPE) * scale
        far = exp(tl.where(sink_mask(rows, sinks, starts, chunk_first, W), far, -float("inf")) - norm)
        dfar = product(dout, tl.trans(sink_values), DTYPE)
        read += tl.sum(far * dfar, 1)
    tl.store(delta + index * T + rows, read, mask=rows < T)
    tl.store(dmixing + index * chunks + chunk, -tl.sum(tl.where(rows < T, read, 0.0), 0))
    dquery = tl.zeros([CHUNK, DP], tl.float32)
    for back in range((W + CHUNK - 2) // CHUNK + 1):
        keys = rows - back * CHUNK
        key = load_turned(k + theirs, keys, columns, cos, sin, T, KV * D, D, R)
        near = product(query, tl.trans(key), DTYPE) * scale
        near = exp(tl.where(window_mask(rows, keys, starts, W), near, -float("inf")) - norm)
        dnear = product(dout, tl.trans(load_tile(v + theirs, keys, columns, T, KV * D, D)), DTYPE)
        dquery += product(share * near * (dnear - read[:, None]), key, DTYPE)
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
    PACKED: tl.constexpr, DTYPE: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's keys and values, from the window of its queries and those of the chunks after it that
    see it; not of sinks."""
    chunk, _, pair = program()
    batch, head, H = pair // KV, pair % KV, KV * GROUPS
    theirs = (batch * T * KV + head) * D
    rows, columns = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R
    key, key_right = load_parts(k + theirs, rows, columns, T, KV * D, D, R, HALVES)
    values = load_tile(v + theirs, rows, columns, T, KV * D, D)
    key, key_right = turned_parts(key, key_right, rows, columns, cos, sin, T, R, HALVES)
    dkey, dvalues = tl.zeros(key.shape, tl.float32), tl.zeros([CHUNK, DP], tl.float32)
    dkey_right = dkey
    for n in range(((W + CHUNK - 2) // CHUNK + 1) * GROUPS):
        query_head, times = head * GROUPS + n % GROUPS, rows + n // GROUPS * CHUNK
        ours, sums = (batch * T * H + query_head) * D, (batch * H + query_head) * T + times
        dout = load_tile(doutput + ours, times, columns, T, H * D, D)
        query, query_right = load_parts(q + ours, times, columns, T, H * D, D, R, HALVES)
        query, query_right = turned_parts(query, query_right, times, columns, cos, sin, T, R, HALVES)
        norm = tl.load(lse + sums, mask=times < T, other=0.0)
        read = tl.load(delta + sums, mask=times < T, other=0.0)
        share = 1.0 - tl.load(mixing + query_head)
        starts, age = load_first(first + batch * T, times, T, PACKED), times[None, :] - rows[:, None]
        seen = (age >= 0) & (age < W) & (rows[:, None] >= starts[None, :])  # [key, query]
        p = product_of_parts(key, key_right, query, query_right, HALVES, DTYPE) * scale
        p = share * exp(tl.where(seen, p, -float("inf")) - norm[None, :])
        dp = product(values, tl.trans(dout), DTYPE)
        dvalues += product(p, dout, DTYPE)
        dp = (scale * p * (dp - read[None, :])).to(DTYPE)
        dkey += product(dp, query, DTYPE)
        if HALVES:
            dkey_right += product(dp, query_right, DTYPE)
    dkey, dkey_right = turned_back(dkey, dkey_right, rows, columns, cos, sin, T, R, HALVES)
    store_parts(dk + theirs, rows, columns, dkey, dkey_right, T, KV * D, D, HALVES)
    store_tile(dv + theirs, rows, columns, dvalues, T, KV * D, D)
