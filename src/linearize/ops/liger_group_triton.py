"""The output of Liger Attention for grouped query heads: `output_kernel`, with one program for a whole group.

Keys, values and the state are loaded once, and a turn's queries while those before them are at work. With one turn that
order would hold everything at once and spill, so that heads without a group have the other kernel.
"""

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
    whole,
)
from linearize.ops.liger_triton import (
    CHUNK,
    LOG2_E,
    continues,
    feature,
    load_first,
    load_gate,
    load_one_first,
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


@triton.jit(do_not_specialize=["T", "rope_stride"])
def group_output_kernel(
    q, near_key, turned_key, totals, for_queries, v, cos, sin, mixing, first, states, output,
    near_query, turned_query, lse, T, rope_stride, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr, SINKS: tl.constexpr, FEATURE: tl.constexpr, SCALAR: tl.constexpr, PACKED: tl.constexpr,
    KEEP: tl.constexpr, DTYPE: tl.constexpr, HALVES: tl.constexpr,
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
    key, key_right = load_parts(near_key + theirs, keys, columns, T, KV * D, D, 0, HALVES)
    own_key, own_right = load_parts(turned_key + theirs, keys, columns, T, KV * D, D, 0, HALVES)
    past_key, past_right = load_parts(turned_key + theirs, before, columns, T, KV * D, D, 0, HALVES)
    own_values = load_tile(v + theirs, keys, columns, T, KV * D, D)
    past_values = load_tile(v + theirs, before, columns, T, KV * D, D)
    state, state_below = load_state_parts(states + (pair * chunks + chunk) * D * D, columns, D, HALVES)
    if SINKS > 0:
        chunk_first = load_one_first(first + batch * T, start, PACKED)
        sinks = sink_rows(chunk_first, SINKS)
        sink_key, sink_right = load_parts(turned_key + theirs, sinks, columns, T, KV * D, D, 0, HALVES)
        sink_values = load_tile(v + theirs, sinks, columns, T, KV * D, D)
    x, partner = load_parts(q + ours, places, columns, T * H, D, D, R, HALVES)
    for n in range(TURNS):
        w = tl.load(mixing + heads)[:, None]
        if HALVES:
            read, read_right = near_halves(
                x, partner, for_queries, batch, pair % KV, rows, T, KV, D, FEATURE, SCALAR, DTYPE
            )
        else:
            for_query = load_gate(for_queries, batch, pair % KV, rows, columns, T, KV, D, SCALAR)
            read = feature(whole(x, partner, rows, columns, R).to(tl.float32), columns, D, FEATURE)
            read = (read * for_query).to(DTYPE)
            read_right = read
        query, query_right = turned_parts(x, partner, rows, columns, cos, sin, T, R, HALVES)
        at, sums_at = places, (batch * H + heads) * T + rows
        _, _, heads, _, places = query_rows(chunk, index + tl.minimum(n + 1, TURNS - 1), KV, GROUPS, HEADS)
        x, partner = load_parts(q + ours, places, columns, T * H, D, D, R, HALVES)  # the next turn's
        if KEEP:
            store_parts(near_query + ours, at, columns, read, read_right, T * H, D, D, HALVES)
            if R > 0:
                store_parts(turned_query + ours, at, columns, query, query_right, T * H, D, D, HALVES)
        within = product_of_parts(read, read_right, key, key_right, HALVES, DTYPE)
        within = tl.where(read_mask(rows, keys, starts, total), w * within, 0.0)
        own = product_of_parts(query, query_right, own_key, own_right, HALVES, DTYPE)
        past = product_of_parts(query, query_right, past_key, past_right, HALVES, DTYPE)
        own = tl.where(window_mask(rows, keys, starts, W), own, -float("inf"))
        past = tl.where(window_mask(rows, before, starts, W), past, -float("inf"))
        largest = tl.maximum(tl.max(own, 1), tl.max(past, 1))
        if SINKS > 0:
            far = product_of_parts(query, query_right, sink_key, sink_right, HALVES, DTYPE)
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
            has = continues(starts, start)[:, None]
            read, read_right = tl.where(has, read, 0.0), tl.where(has, read_right, 0.0)
        out = w * read_state(read, read_right, state, state_below, HALVES, DTYPE)
        if SINKS > 0:
            out += product(share * far, sink_values, DTYPE)
        out += product(past, past_values, DTYPE)
        out += product(own, own_values, DTYPE)
        store_tile(output + ours, at, columns, out, T * H, D, D)
