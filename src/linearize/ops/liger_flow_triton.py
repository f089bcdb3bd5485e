"""The recurrence of Liger Attention where no gradients are wanted.

It reads q, k and v as they are and adds itself to what `liger_window_triton` wrote; no state or decayed key is ever in
memory. Programs go through the chunks of one key/value head with all its query heads and carry the state in registers;
with fewer heads than multiprocessors a sequence is cut into segments, each with the state that enters it. The terms are
those of `liger_triton`.
"""

import triton
import triton.language as tl

from linearize.ops.liger_triton import (
    CHUNK,
    decays,
    feature,
    key_and_gate,
    load_first,
    load_one_first,
    load_tile,
    product,
    read_mask,
    state_factors,
    store_tile,
)


@triton.jit(do_not_specialize=["T", "SEGMENT"])
def flow_kernel(
    q, k, v, mixing, first, decay, initial, output, totals, final, T, SEGMENT, rate, lower,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GATE: tl.constexpr,
    FEATURE: tl.constexpr, SCALAR: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """To the output, w · recurrence for one segment of one key/value head, from `initial` `[B * KV, segments, D, D]`;
    `final` `[B * KV, D, D]` is the state after the last segment. The log decay over every chunk goes to `totals`
    `[B * KV, chunks, D]`, where `add_output_kernel` finds the steep ones."""
    segment, segments, chunks, H = tl.program_id(0), tl.num_programs(0), tl.cdiv(T, CHUNK), KV * GROUPS
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // KV, pair % KV
    queries = (batch * T * H + head * GROUPS) * D
    q += queries
    output += queries
    k += (batch * T * KV + head) * D
    v += (batch * T * KV + head) * D
    first += batch * T
    mixing += head * GROUPS
    columns = tl.arange(0, DP)
    inside = (columns < D)[:, None] & (columns < D)[None, :]
    offsets = columns[:, None] * D + columns[None, :]
    state = tl.load(initial + (pair * segments + segment) * D * D + offsets, mask=inside, other=0.0)
    fixed = tl.load(decay + head)
    for chunk in range(segment * SEGMENT, tl.minimum(chunks, (segment + 1) * SEGMENT)):
        start = chunk * CHUNK
        rows = start + tl.arange(0, CHUNK)
        starts, here = load_first(first, rows, T, PACKED), tl.maximum(start, 1)
        x = load_tile(k, rows, columns, T, KV * D, D).to(tl.float32)
        values = load_tile(v, rows, columns, T, KV * D, D)
        next_query = load_tile(q, rows, columns, T, H * D, D)  # well before its use, which then does not wait
        key, log_g = key_and_gate(x, rows < T, columns, fixed, rate, lower, D, GATE, FEATURE)
        total = tl.where(columns < D, tl.sum(log_g, 0), 0.0)
        tl.store(totals + (pair * chunks + chunk) * D + columns, total, mask=columns < D)
        for_query, for_key = decays(
            log_g, total, k, rows, columns, T, fixed, rate, lower, KV * D, D, GATE, FEATURE, SCALAR
        )
        key = (key * for_key).to(DTYPE)
        readable = read_mask(rows, starts, total)
        half, whole = state_factors(total)
        state *= half[:, None]
        before = state.to(DTYPE)
        for group in range(GROUPS):
            at, y = output + group * D, next_query
            if GROUPS > 1:
                next_query = load_tile(q + tl.minimum(group + 1, GROUPS - 1) * D, rows, columns, T, H * D, D)
            out = load_tile(at, rows, columns, T, H * D, D).to(tl.float32)
            query = feature(y.to(tl.float32), columns, D, FEATURE)
            query = (tl.load(mixing + group) * query * for_query).to(DTYPE)
            within = tl.where(readable, product(query, tl.trans(key), DTYPE), 0.0)
            if PACKED:
                query = tl.where((starts < here)[:, None], query, 0.0)  # a document that began here has no state
            out += product(within, values, DTYPE) + product(query, before, DTYPE)
            store_tile(at, rows, columns, out, T, H * D, D)
        if PACKED:
            last_first = load_one_first(first, tl.minimum(start + CHUNK, T) - 1, PACKED)
            key = tl.where((rows >= last_first)[:, None], key, 0.0)  # what the chunk's last token still sees
            whole = tl.where(last_first < here, whole, 0.0)
        state = (state * whole[:, None] + product(tl.trans(key), values, DTYPE)) * half[:, None]
    if segment == segments - 1:
        tl.store(final + pair * D * D + offsets, state, mask=inside)
