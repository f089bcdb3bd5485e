"""The window of Liger Attention by itself: its share of the output, and of the gradients.

It reads q, k and v as they are and rotates them itself. The terms are those of `liger_triton`. A program has the keys
of two chunks, which are rotated once for all heads that read them; a head's queries are loaded while those before them
are at work.
"""

import triton
import triton.language as tl

from linearize.ops.liger_triton import (
    CHUNK,
    LOG2_E,
    SINK_ROWS,
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
    store_tile,
)


@triton.jit
def load_parts(base, rows, columns, T, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """What `turned` makes a tile of: both halves of the channels, where all are rotated; else the tile and the channels
    that each is rotated with."""
    DP: tl.constexpr = columns.shape[0]
    if R == DP:
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
        c, s = load_rope_half(cos, sin, rows, T, R)
        x, partner = x.to(tl.float32), partner.to(tl.float32)
        x = tl.join((x * c - partner * s).to(dtype), (partner * c + x * s).to(dtype))
        x = tl.reshape(tl.permute(x, [0, 2, 1]), [rows.shape[0], DP])
    elif R > 0:
        c, s = load_rope(cos, sin, rows, columns, T, R)
        x = rotated(x, partner, c, s).to(dtype)
    return x


@triton.jit
def load_turned(base, rows, columns, cos, sin, T, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """`load_tile`, after RoPE."""
    x, partner = load_parts(base, rows, columns, T, STRIDE, D, R)
    return turned(x, partner, rows, columns, cos, sin, T, R)


@triton.jit
def store_turned_back(base, rows, places, columns, dx, cos, sin, T, STRIDE: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """The gradient before RoPE, from that after it, of tokens `rows`; it goes to the rows `places`."""
    if dx.shape[1] == R:
        c, s = load_rope_half(cos, sin, rows, T, R)
        half = tl.arange(0, R // 2)
        left, right = tl.split(tl.permute(tl.reshape(dx, [rows.shape[0], 2, R // 2]), [0, 2, 1]))
        store_tile(base, places, half, left * c + right * s, T, STRIDE, D)
        store_tile(base + R // 2, places, half, right * c - left * s, T, STRIDE, D)
    else:
        store_tile(base, places, columns, rotate_back(dx, rows, columns, cos, sin, T, R), T, STRIDE, D)


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
    chunk, H = tl.program_id(0), KV * GROUPS
    index = tl.program_id(1).to(tl.int64) * TURNS  # of the first query head among all sequences
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
    x, partner = load_parts(q + ours, rows, columns, T, H * D, D, R)
    for n in range(TURNS):
        query = turned(x, partner, rows, columns, cos, sin, T, R)
        x, partner = load_parts(q + ours + tl.minimum(n + 1, TURNS - 1) * D, rows, columns, T, H * D, D, R)
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


@triton.jit
def load_queries(q, doutput, head, chunk, columns, T, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """A head's queries of a chunk, as `load_parts`, and the gradient of its output there."""
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    x, partner = load_parts(q + head * D, rows, columns, T, H * D, D, R)
    return x, partner, load_tile(doutput + head * D, rows, columns, T, H * D, D)


@triton.jit(do_not_specialize=["T", "rope_stride", "SIZE"])
def window_backward_kernel(
    q, k, v, cos, sin, mixing, first, lse, doutput, dq, dk, dv, delta, dmixing, dsink_key, dsink_values, T, rope_stride,
    SIZE, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    SINKS: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of SIZE chunks of one key/value head. With QUERIES those of its queries, and what each chunk
    adds to those of the mixing weights, `dmixing` `[B, H, chunks]`, and of the sinks, after RoPE,
    `[B, KV, chunks, SINKS, D]`; with KEYS those of its keys and values, without what comes from sinks. Where these are
    apart, the former write for the latter doutput · window of each query, `delta` `[B, H, T]`.

    Chunk after chunk, of queries and of the keys before and beside them, in tiles of `[key, query]`; for the last keys,
    the queries of the chunk that follows are read once more.
    """
    H: tl.constexpr = KV * GROUPS
    chunks, pair = tl.cdiv(T, CHUNK), tl.program_id(1).to(tl.int64)
    batch, head = pair // KV, pair % KV
    begin, end = tl.program_id(0) * SIZE, tl.minimum((tl.program_id(0) + 1) * SIZE, chunks)
    columns, slots = tl.arange(0, DP), tl.arange(0, 2 * CHUNK)
    theirs, ours = (batch * T * KV + head) * D, (batch * T * H + head * GROUPS) * D
    first += batch * T
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R
    if KEYS:
        dkey, dvalues = tl.zeros([2 * CHUNK, DP], tl.float32), tl.zeros([2 * CHUNK, DP], tl.float32)
    x, partner, dout = load_queries(q + ours, doutput + ours, 0, begin, columns, T, H, D, R)
    for chunk in range(begin, end + 1 if KEYS else end):
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        # even chunks' keys in one half and odd ones' in the other, so that sums stay where they are
        keys = (chunk - (chunk + slots // CHUNK) % 2) * CHUNK + slots % CHUNK
        key = load_turned(k + theirs, keys, columns, cos, sin, T, KV * D, D, R)
        values = load_tile(v + theirs, keys, columns, T, KV * D, D)
        starts = load_first(first, rows, T, PACKED)
        lowest = tl.maximum(starts, rows - W + 1)
        if QUERIES and SINKS > 0:
            chunk_first, sinks, sink_key, sink_values = load_sinks(
                k + theirs, v + theirs, first, cos, sin, chunk * CHUNK, columns, T, KV * D, D, R, SINKS, PACKED
            )
            dfar_key, dfar_values = tl.zeros([SINK_ROWS, DP], tl.float32), tl.zeros([SINK_ROWS, DP], tl.float32)
        for group in range(tl.where(chunk < chunks, GROUPS, 0)):
            index = batch * H + head * GROUPS + group
            query, given = turned(x, partner, rows, columns, cos, sin, T, R), dout
            following = (group + 1) % GROUPS
            x, partner, dout = load_queries(
                q + ours, doutput + ours, following, tl.where(following > 0, chunk, chunk + 1), columns, T, H, D, R
            )
            norm = tl.load(lse + index * T + rows, mask=rows < T, other=0.0)
            share = 1.0 - tl.load(mixing + head * GROUPS + group)
            if QUERIES and SINKS > 0:
                far = product(query, tl.trans(sink_key), DTYPE) * scale - norm[:, None]
                far = exp(tl.where(sink_mask(rows, sinks, starts, chunk_first, W), far, -float("inf")))
                dfar = product(given, tl.trans(sink_values), DTYPE)
                far_read = tl.sum(far * dfar, 1)
            p = product(key, tl.trans(query), DTYPE) * scale - norm[None, :]
            seen = (keys[:, None] <= rows[None, :]) & (keys[:, None] >= lowest[None, :])
            p = exp(tl.where(seen, p, -float("inf")))
            dp = product(values, tl.trans(given), DTYPE)
            if QUERIES:
                read = tl.sum(p * dp, 0)  # doutput · window
                if SINKS > 0:
                    read += far_read
                if tl.float32 == DTYPE:  # scores of `[query, key]`, of which `lse` is, differ in their last digits
                    read /= tl.sum(p, 0) + (tl.sum(far, 1) if SINKS > 0 else 0.0)
                tl.store(dmixing + index * chunks + chunk, -tl.sum(read, 0), mask=chunk < end)
                if not KEYS:
                    tl.store(delta + index * T + rows, read, mask=rows < T)
            else:
                read = tl.load(delta + index * T + rows, mask=rows < T, other=0.0)
            p *= share
            dp = p * (dp - read[None, :])
            if KEYS:
                dvalues += product(p, given, DTYPE)
                dkey += product(dp, query, DTYPE)
            if QUERIES:
                # scaled before sinks' part is added: a product that goes on from another has its rows twice, by half of
                # the warps each
                dquery = scale * product(tl.trans(dp), key, DTYPE)
                if SINKS > 0:
                    far *= share
                    dfar = far * (dfar - read[:, None])
                    dquery += scale * product(dfar, sink_key, DTYPE)
                    # sinks as rows: as 16 columns of a transposed product, Triton 3.6 reads past its shared memory
                    dfar_key += product(tl.trans(dfar), query, DTYPE)
                    dfar_values += product(tl.trans(far), given, DTYPE)
                places = tl.where(chunk < end, rows, T)
                store_turned_back(dq + ours + group * D, rows, places, columns, dquery, cos, sin, T, H * D, D, R)
        if QUERIES and SINKS > 0:
            at, slot = (pair * chunks + chunk) * SINKS * D, tl.arange(0, SINK_ROWS)
            count = tl.where(chunk < end, SINKS, 0)
            store_tile(dsink_key + at, slot, columns, scale * dfar_key, count, D, D)
            store_tile(dsink_values + at, slot, columns, dfar_values, count, D, D)
        if KEYS:
            done = keys < chunk * CHUNK
            places = tl.where(done & (keys >= begin * CHUNK), keys, T)
            store_turned_back(dk + theirs, keys, places, columns, scale * dkey, cos, sin, T, KV * D, D, R)
            store_tile(dv + theirs, places, columns, dvalues, T, KV * D, D)
            dkey, dvalues = tl.where(done[:, None], 0.0, dkey), tl.where(done[:, None], 0.0, dvalues)
