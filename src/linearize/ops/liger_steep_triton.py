"""Kernels of Liger Attention for chunks with steep decays: what their queries read of the chunk's own keys.

Added to what the other kernels make, which leave that out; programs that find no such chunk end at once.
"""

import triton
import triton.language as tl

from linearize.ops.liger_triton import (
    CHUNK,
    LEVELS,
    LIMIT,
    NEVER,
    document_mask,
    exp,
    feature,
    feature_backward,
    key_and_gate,
    key_and_gate_backward,
    load_first,
    load_tile,
    load_total,
    product,
    running_sum,
    split_product,
    store_tile,
)

STEP = tl.constexpr(16)  # chunks that one program looks at


@triton.jit
def steep_chunks(totals, pair, chunks, columns, D: tl.constexpr):
    """The first steep chunk of this program's STEP, and the one after the last; no range if there is none. All are
    looked at at once, where one after the other each look would wait for memory."""
    steps = tl.program_id(0) * STEP + tl.arange(0, STEP)
    inside = (steps < chunks)[:, None] & (columns < D)[None, :]
    found = tl.load(totals + (pair * chunks + steps)[:, None] * D + columns[None, :], mask=inside, other=0.0)
    steep = tl.min(found, 1) <= LIMIT
    return tl.min(tl.where(steep, steps, NEVER)), tl.max(tl.where(steep, steps + 1, 0))


# --- decay within a chunk ---


@triton.jit
def decay_between(log_g):
    """exp(log decay from key j to query i) `[C, C]` for one decay a head; each sum starts from its own key."""
    i = tl.arange(0, CHUNK)
    return exp(tl.cumsum(tl.where(i[:, None] > i[None, :], log_g, 0.0), 0))


@triton.jit
def decay_to_boundary(log_g, size, DTYPE: tl.constexpr):
    """For the merge of neighbouring blocks of `size` tokens: the decay from the boundary to each query of the right
    blocks and from each key of the left ones to it, both at most 1, and which tokens are in right blocks `[C, 1]`."""
    i, t = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    right = (i & size) != 0
    between = (i // size == t // size) & ((right & (t <= i)) | ((right == 0) & (t > i)))
    return exp(split_product(tl.where(between, 1.0, 0.0), log_g, DTYPE)), right


@triton.jit
def merged_at(size):
    """The pairs that one merge serves `[C, C]`: both tokens in one pair of blocks."""
    i = tl.arange(0, CHUNK)
    return i[:, None] // (2 * size) == i[None, :] // (2 * size)


@triton.jit
def scores(query, key, log_g, seen, DTYPE: tl.constexpr, SCALAR: tl.constexpr):
    """query_i · exp(sum of log_g over (j, i]) key_j where j is seen `[C, C]`.

    Blocks merge pairwise, 1 + 1 tokens, 2 + 2 ..., as in `gated_linear.chunked`: no exponent is positive.
    """
    a = product(query, tl.trans(key), DTYPE)
    if SCALAR:
        a *= decay_between(log_g)
    else:
        i = tl.arange(0, CHUNK)
        a = tl.where(i[:, None] == i[None, :], a, 0.0)
        for level in range(LEVELS):
            decay, right = decay_to_boundary(log_g, 1 << level, DTYPE)
            right_query, left_key = tl.where(right, query * decay, 0.0), tl.where(right, 0.0, key * decay)
            a += tl.where(merged_at(1 << level), product(right_query, tl.trans(left_key), DTYPE), 0.0)
    return tl.where(seen, a, 0.0)


@triton.jit
def scores_backward(da, query, key, log_g, seen, DTYPE: tl.constexpr, SCALAR: tl.constexpr):
    """The result of `scores` again, the gradients of query and key from that of the result, 0 where nothing is seen,
    and the terms of the gate's gradient `[C, K]`: its sum from each token to the chunk's end is that of log_g."""
    a = product(query, tl.trans(key), DTYPE)
    if SCALAR:
        between = decay_between(log_g)
        a = tl.where(seen, a * between, 0.0)
        dquery, dkey = product(da * between, key, DTYPE), product(tl.trans(da * between), query, DTYPE)
        terms = (tl.sum(a * da, 1) - tl.sum(a * da, 0))[:, None]
    else:
        i = tl.arange(0, CHUNK)
        here = i[:, None] == i[None, :]
        a, da_here = tl.where(here, a, 0.0), tl.where(here, da, 0.0)
        dquery, dkey = tl.sum(da_here, 1)[:, None] * key, tl.sum(da_here, 0)[:, None] * query
        terms = tl.zeros_like(dkey)
        for level in range(LEVELS):
            decay, right = decay_to_boundary(log_g, 1 << level, DTYPE)
            right_query = tl.where(right, query * decay, 0.0).to(DTYPE)
            left_key = tl.where(right, 0.0, key * decay).to(DTYPE)
            merged = merged_at(1 << level)
            a += tl.where(merged, product(right_query, tl.trans(left_key), DTYPE), 0.0)
            da_merged = tl.where(merged, da, 0.0).to(DTYPE)
            dright_query = product(da_merged, left_key, DTYPE)
            dleft_key = product(tl.trans(da_merged), right_query, DTYPE)
            terms += right_query.to(tl.float32) * dright_query - left_key.to(tl.float32) * dleft_key
            dquery += tl.where(right, dright_query * decay, 0.0)
            dkey += tl.where(right, 0.0, dleft_key * decay)
        a = tl.where(seen, a, 0.0)
    return a, dquery, dkey, terms


@triton.jit(do_not_specialize=["T"])
def add_output_kernel(
    q, k, v, mixing, first, decay, totals, output, T, rate, lower,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GATE: tl.constexpr,
    FEATURE: tl.constexpr, SCALAR: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """To the output, what the queries of a steep chunk read of its keys."""
    pair, chunks, columns = tl.program_id(1).to(tl.int64), tl.cdiv(T, CHUNK), tl.arange(0, DP)
    batch, head, H = pair // KV, pair % KV, KV * GROUPS
    theirs = (batch * T * KV + head) * D
    begin, end = steep_chunks(totals, pair, chunks, columns, D)
    for chunk in range(begin, end):
        if tl.min(load_total(totals, pair, chunks, chunk, columns, D)) <= LIMIT:
            rows = chunk * CHUNK + tl.arange(0, CHUNK)
            starts = load_first(first + batch * T, rows, T, PACKED)
            seen = document_mask(rows, rows, starts)
            x = load_tile(k + theirs, rows, columns, T, KV * D, D).to(tl.float32)
            key, log_g = key_and_gate(x, rows < T, columns, tl.load(decay + head), rate, lower, D, GATE, FEATURE)
            values = load_tile(v + theirs, rows, columns, T, KV * D, D)
            for group in range(GROUPS):
                ours = (batch * T * H + head * GROUPS + group) * D
                x = load_tile(q + ours, rows, columns, T, H * D, D).to(tl.float32)
                a = scores(feature(x, columns, D, FEATURE), key, log_g, seen, DTYPE, SCALAR)
                out = tl.load(mixing + head * GROUPS + group) * product(a, values, DTYPE)
                out += load_tile(output + ours, rows, columns, T, H * D, D).to(tl.float32)
                store_tile(output + ours, rows, columns, out, T, H * D, D)


@triton.jit(do_not_specialize=["T"])
def add_gradients_kernel(
    q, k, v, mixing, first, decay, totals, doutput, dq, dk, dv, dmixing, T, rate, lower,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GATE: tl.constexpr,
    FEATURE: tl.constexpr, SCALAR: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """To all gradients, what `add_output_kernel` is to the output."""
    pair, chunks, columns = tl.program_id(1).to(tl.int64), tl.cdiv(T, CHUNK), tl.arange(0, DP)
    batch, head, H = pair // KV, pair % KV, KV * GROUPS
    theirs = (batch * T * KV + head) * D
    begin, end = steep_chunks(totals, pair, chunks, columns, D)
    for chunk in range(begin, end):
        if tl.min(load_total(totals, pair, chunks, chunk, columns, D)) <= LIMIT:
            rows = chunk * CHUNK + tl.arange(0, CHUNK)
            starts = load_first(first + batch * T, rows, T, PACKED)
            seen = document_mask(rows, rows, starts)
            x = load_tile(k + theirs, rows, columns, T, KV * D, D).to(tl.float32)
            key, log_g = key_and_gate(x, rows < T, columns, tl.load(decay + head), rate, lower, D, GATE, FEATURE)
            values = load_tile(v + theirs, rows, columns, T, KV * D, D)
            dkey, dvalues = tl.zeros([CHUNK, DP], tl.float32), tl.zeros([CHUNK, DP], tl.float32)
            terms = tl.zeros_like(log_g)
            for group in range(GROUPS):
                index = batch * H + head * GROUPS + group
                ours = (batch * T * H + head * GROUPS + group) * D
                w = tl.load(mixing + head * GROUPS + group)
                dout = load_tile(doutput + ours, rows, columns, T, H * D, D)
                da = tl.where(seen, product(dout, tl.trans(values), DTYPE), 0.0)
                raw = load_tile(q + ours, rows, columns, T, H * D, D).to(tl.float32)
                query = feature(raw, columns, D, FEATURE)
                a, dquery, dkey_here, terms_here = scores_backward(da, query, key, log_g, seen, DTYPE, SCALAR)
                dkey += w * dkey_here
                terms += w * terms_here
                dvalues += product(tl.trans(w * a), dout, DTYPE)
                gain = tl.load(dmixing + index * chunks + chunk) + tl.sum(tl.sum(query * dquery, 1), 0)
                tl.store(dmixing + index * chunks + chunk, gain)
                draw = feature_backward(raw, w * dquery, w * query * dquery, columns, D, FEATURE)
                draw += load_tile(dq + ours, rows, columns, T, H * D, D).to(tl.float32)
                store_tile(dq + ours, rows, columns, draw, T, H * D, D)
            dlog_g = running_sum(terms, DTYPE, SCALAR, True)
            draw = key_and_gate_backward(x, dkey, key * dkey, dlog_g, columns, rate, lower, D, GATE, FEATURE)
            draw += load_tile(dk + theirs, rows, columns, T, KV * D, D).to(tl.float32)
            dvalues += load_tile(dv + theirs, rows, columns, T, KV * D, D).to(tl.float32)
            store_tile(dk + theirs, rows, columns, draw, T, KV * D, D)
            store_tile(dv + theirs, rows, columns, dvalues, T, KV * D, D)
