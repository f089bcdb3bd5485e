"""The output of Liger Attention for grouped query heads: `output_kernel`, with one program for a whole group.

Keys, values and the state are loaded once, and a turn's queries while those before them are at work. With one turn that
order would hold everything at once and spill, so that heads without a group have the other kernel.
"""

import triton
import triton.language as tl

from linearize.ops.liger_triton import (
    CHUNK,
    LOG2_E,
    continues,
    feature,
    load_first,
    load_gate,
    load_one_first,
    load_state,
    load_tile,
    load_total,
    product,
    query_rows,
    read_mask,
    sink_mask,
    sink_rows,
    store_tile,
    window_mask,
)
from linearize.ops.liger_window_triton import load_parts, turned, whole


@triton.jit(do_not_specialize=["T", "rope_stride"])
def group_output_kernel(
    q, near_key, turned_key, totals, for_queries, v, cos, sin, mixing, first, states, output,
    near_query, turned_query, lse, T, rope_stride, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr, SINKS: tl.constexpr, FEATURE: tl.constexpr, SCALAR: tl.constexpr, PACKED: tl.constexpr,
    KEEP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """As `liger_forward_triton.output_kernel`, for one chunk and all query heads of one key/value head: HEADS of them a
    turn, their rows one below the other."""
    chunk, chunks, H = tl.program_id(0), tl.num_programs(0), KV * GROUPS
    TURNS: tl.constexpr = GROUPS // HEADS
    index = tl.program_id(1) * TURNS
    start = chunk * CHUNK
    keys, before, columns = start + tl.arange(0, CHUNK), start - CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    batch, pair, heads, rows, places = query_rows(chunk, index, KV, GROUPS, HEADS)
    theirs = (batch * T * KV + pair % KV) * D
    cos += batch * rope_stride * R
    sin += batch * rope_stride * R
    ours = batch * T * H * D
    starts = load_first(first + batch * T, rows, T, PACKED)
    total = load_total(totals, pair, chunks, chunk, columns, D)
    key = load_tile(near_key + theirs, keys, columns, T, KV * D, D)
    own_key = load_tile(turned_key + theirs, keys, columns, T, KV * D, D)
    past_key = load_tile(turned_key + theirs, before, columns, T, KV * D, D)
    own_values = load_tile(v + theirs, keys, columns, T, KV * D, D)
    past_values = load_tile(v + theirs, before, columns, T, KV * D, D)
    state = load_state(states, pair * chunks + chunk, columns, D)
    if SINKS > 0:
        chunk_first = load_one_first(first + batch * T, start, PACKED)
        sinks = sink_rows(chunk_first, SINKS)
        sink_key = load_tile(turned_key + theirs, sinks, columns, T, KV * D, D)
        sink_values = load_tile(v + theirs, sinks, columns, T, KV * D, D)
    x, partner = load_parts(q + ours, places, columns, T * H, D, D, R)
    for n in range(TURNS):
        w = tl.load(mixing + heads)[:, None]
        for_query = load_gate(for_queries, batch, pair % KV, rows, columns, T, KV, D, SCALAR)
        read = feature(whole(x, partner, rows, columns, R).to(tl.float32), columns, D, FEATURE)
        read = (read * for_query).to(DTYPE)
        query = turned(x, partner, rows, columns, cos, sin, T, R)
        at, sums_at = places, (batch * H + heads) * T + rows
        _, _, heads, _, places = query_rows(chunk, index + tl.minimum(n + 1, TURNS - 1), KV, GROUPS, HEADS)
        x, partner = load_parts(q + ours, places, columns, T * H, D, D, R)  # the next turn's
        if KEEP:
            store_tile(near_query + ours, at, columns, read, T * H, D, D)
            if R > 0:
                store_tile(turned_query + ours, at, columns, query, T * H, D, D)
        within = tl.where(read_mask(rows, keys, starts, total), w * product(read, tl.trans(key), DTYPE), 0.0)
        own = product(query, tl.trans(own_key), DTYPE)
        past = product(query, tl.trans(past_key), DTYPE)
        own = tl.where(window_mask(rows, keys, starts, W), own, -float("inf"))
        past = tl.where(window_mask(rows, before, starts, W), past, -float("inf"))
        largest = tl.maximum(tl.max(own, 1), tl.max(past, 1))
        if SINKS > 0:
            far = product(query, tl.trans(sink_key), DTYPE)
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
            tl.store(lse + sums_at, largest * scale + tl.log(weight), mask=rows < T)
        own, past = (within + share * own).to(DTYPE), (share * past).to(DTYPE)
        # last, so that nothing but shared memory holds `read`, nor the sum, until now
        if PACKED:  # a document that began here has no state
            read = tl.where(continues(starts, start)[:, None], read, 0.0)
        out = w * product(read, state, DTYPE)
        if SINKS > 0:
            out += product(share * far, sink_values, DTYPE)
        out += product(past, past_values, DTYPE)
        out += product(own, own_values, DTYPE)
        store_tile(output + ours, at, columns, out, T * H, D, D)
