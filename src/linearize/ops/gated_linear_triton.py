"""Kernels of gated linear attention with gates that are given; shapes and what decays within a chunk as in
`liger_triton`, and the passes over the states are Liger Attention's.

What is written is x yᵀ with one decay for each channel of x: x is the key, y the value. `read_kernel` reads by what
decays, `read_gradients_kernel` by what does not. With decays by value channel x is the value and y the key, and the two
change places: what is read forward is the one's gradient of the other. So queries and the output's gradients do:

    read:             p, q decayed by `for_reading` or its gradient;   (p xᵀ) y + p S
    read_gradients:   r, the output's gradient or q;                   ((r yᵀ) x + r Sᵀ) · for_reading
"""

import triton
import triton.language as tl

from linearize.ops.liger_backward_triton import gradients_of_state
from linearize.ops.liger_steep_triton import scores, scores_backward
from linearize.ops.liger_triton import (
    CHUNK,
    GONE,
    LIMIT,
    continues,
    document_mask,
    exp,
    load_first,
    load_gate,
    load_state,
    load_tile,
    load_total,
    product,
    program,
    query_rows,
    running_sum,
    store_gate,
    store_tile,
)


@triton.jit
def load_decay(log_g, batch, head, rows, columns, T, KV: tl.constexpr, D: tl.constexpr, SCALAR: tl.constexpr):
    """A chunk's log decays `[C, K]`; what leaves nothing is no smaller than it need be, for sums to keep the others."""
    x = load_gate(log_g, batch, head, rows, columns, T, KV, D, SCALAR).to(tl.float32)
    return tl.maximum(x, 2.0 * GONE)


@triton.jit
def decay_of_writing(
    sums, total, log_g, batch, head, rows, columns, T, KV: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr,
    SCALAR: tl.constexpr,
):  # fmt: skip
    """What makes near x of x `[C, K]`, from the sums of log decays up to and with each token."""
    if tl.min(total) > LIMIT:
        decay = exp(-sums)
    else:  # to the chunk's end; large sums are not subtracted
        later = rows + 1
        after = load_decay(log_g, batch, head, later, columns, T, KV, D, SCALAR)
        decay = exp(running_sum(tl.where((later % CHUNK != 0)[:, None], after, 0.0), DTYPE, SCALAR, True))
    return decay


@triton.jit(do_not_specialize=["T"])
def given_kernel(
    x, log_g, near_x, totals, for_reading, T,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SCALAR: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of one chunk, x as it is written, the log decay over it, `totals` `[B * KV, chunks, D]`, and what readers are
    decayed by, `for_reading` `[B, T, KV, K]`."""
    chunk, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pair // KV, pair % KV
    rows, columns, at = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP), (batch * T * KV + head) * D
    decay = load_decay(log_g, batch, head, rows, columns, T, KV, D, SCALAR)
    total = tl.where(columns < D, tl.sum(decay, 0), 0.0)
    tl.store(totals + (pair * tl.num_programs(0) + chunk) * D + columns, total, mask=columns < D)
    sums = running_sum(decay, DTYPE, SCALAR)
    store_gate(for_reading, batch, head, rows, columns, exp(sums), T, KV, D, SCALAR)
    for_writing = decay_of_writing(sums, total, log_g, batch, head, rows, columns, T, KV, D, DTYPE, SCALAR)
    raw = load_tile(x + at, rows, columns, T, KV * D, D).to(tl.float32)
    store_tile(near_x + at, rows, columns, raw * for_writing, T, KV * D, D)


@triton.jit(do_not_specialize=["T"])
def near_kernel(
    p, for_reading, near_p, T,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """`near_p`, p times `for_reading`, of one chunk and all heads of one key/value head."""
    chunk, _, pair = program()
    batch, head = pair // KV, pair % KV
    rows, columns = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    decay = load_gate(for_reading, batch, head, rows, columns, T, KV, D, SCALAR)
    for group in range(GROUPS):
        ours = ((batch * T * KV + head) * GROUPS + group) * D
        near = load_tile(p + ours, rows, columns, T, KV * GROUPS * D, D).to(tl.float32) * decay
        store_tile(near_p + ours, rows, columns, near, T, KV * GROUPS * D, D)


@triton.jit(do_not_specialize=["T"])
def read_kernel(
    p, near_p, x, near_x, y, log_g, first, totals, states, output, T,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SCALAR: tl.constexpr,
    PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What one chunk of one query head reads; `near_p` is p times `for_reading`."""
    chunk, chunks, H = tl.program_id(0), tl.num_programs(0), KV * GROUPS
    batch, pair, _, rows, places = query_rows(chunk, tl.program_id(1), KV, GROUPS, 1)
    ours, theirs = batch * T * H * D, (batch * T * KV + pair % KV) * D
    start, columns = chunk * CHUNK, tl.arange(0, DP)
    keys = start + tl.arange(0, CHUNK)
    starts = load_first(first + batch * T, rows, T, PACKED)
    seen = document_mask(rows, keys, starts)
    near = load_tile(near_p + ours, places, columns, T * H, D, D)
    if tl.min(load_total(totals, pair, chunks, chunk, columns, D)) > LIMIT:
        written = load_tile(near_x + theirs, keys, columns, T, KV * D, D)
        a = tl.where(seen, product(near, tl.trans(written), DTYPE), 0.0)
    else:
        query = load_tile(p + ours, places, columns, T * H, D, D).to(tl.float32)
        raw = load_tile(x + theirs, keys, columns, T, KV * D, D).to(tl.float32)
        decay = load_decay(log_g, batch, pair % KV, keys, columns, T, KV, D, SCALAR)
        a = scores(query, raw, decay, seen, DTYPE, SCALAR)
    out = product(a, load_tile(y + theirs, keys, columns, T, KV * D, D), DTYPE)
    if PACKED:  # a document that began here has no state
        near = tl.where(continues(starts, start)[:, None], near, 0.0)
    out += product(near, load_state(states, pair * chunks + chunk, columns, D), DTYPE)
    store_tile(output + ours, places, columns, out, T * H, D, D)


@triton.jit(do_not_specialize=["T"])
def read_gradients_kernel(
    near_p, x, near_x, y, log_g, for_reading, first, totals, states, r, output, terms, T,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SCALAR: tl.constexpr,
    PACKED: tl.constexpr, DTYPE: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """What r reads, of a chunk and all heads of one key/value head. With TERMS, the sum over these heads of near p ·
    what it is read with, which the gate's gradient takes, goes to `terms` `[B, T, KV, K]`."""
    chunk, chunks, H = tl.program_id(0), tl.num_programs(0), KV * GROUPS
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // KV, pair % KV
    theirs, start = (batch * T * KV + head) * D, chunk * CHUNK
    rows, columns = start + tl.arange(0, CHUNK), tl.arange(0, DP)
    starts = load_first(first + batch * T, rows, T, PACKED)
    seen = document_mask(rows, rows, starts)
    mild = tl.min(load_total(totals, pair, chunks, chunk, columns, D)) > LIMIT
    state = load_state(states, pair * chunks + chunk, columns, D)
    values = load_tile(y + theirs, rows, columns, T, KV * D, D)
    decay = load_gate(for_reading, batch, head, rows, columns, T, KV, D, SCALAR)
    gathered = tl.zeros([CHUNK, 1 if SCALAR else DP], tl.float32)
    for group in range(GROUPS):
        ours = (batch * T * H + head * GROUPS + group) * D
        reader = load_tile(r + ours, rows, columns, T, H * D, D)
        a = tl.where(seen, product(reader, tl.trans(values), DTYPE), 0.0)
        if PACKED:
            reader = tl.where(continues(starts, start)[:, None], reader, 0.0)
        found = product(reader, tl.trans(state), DTYPE)
        inside = tl.zeros([CHUNK, DP], tl.float32)
        if mild:
            found += product(a, load_tile(near_x + theirs, rows, columns, T, KV * D, D), DTYPE)
        else:
            raw = load_tile(x + theirs, rows, columns, T, KV * D, D).to(tl.float32)
            log_decay = load_decay(log_g, batch, head, rows, columns, T, KV, D, SCALAR)
            _, inside, _, _ = scores_backward(a, raw, raw, log_decay, seen, DTYPE, SCALAR)
        if TERMS:
            paired = load_tile(near_p + ours, rows, columns, T, H * D, D).to(tl.float32) * found
            gathered += tl.sum(paired, 1, keep_dims=True) if SCALAR else paired
        store_tile(output + ours, rows, columns, found * decay + inside, T, H * D, D)
    if TERMS:
        store_gate(terms, batch, head, rows, columns, gathered, T, KV, D, SCALAR)


@triton.jit(do_not_specialize=["T"])
def write_gradients_kernel(
    p, near_p, x, near_x, y, log_g, first, totals, states, dstates, r, terms, dx, dy, dlog_g, T,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SCALAR: tl.constexpr,
    PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's x, y and gates, from its own readers and from the state after it; `terms` as
    `read_gradients_kernel` leaves them."""
    chunk, chunks, H = tl.program_id(0), tl.num_programs(0), KV * GROUPS
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // KV, pair % KV
    theirs, start = (batch * T * KV + head) * D, chunk * CHUNK
    rows, columns = start + tl.arange(0, CHUNK), tl.arange(0, DP)
    starts = load_first(first + batch * T, rows, T, PACKED)
    seen = document_mask(rows, rows, starts)
    total = load_total(totals, pair, chunks, chunk, columns, D)
    mild = tl.min(total) > LIMIT
    written = load_tile(near_x + theirs, rows, columns, T, KV * D, D)
    values = load_tile(y + theirs, rows, columns, T, KV * D, D)

    dwritten, dvalues, last = gradients_of_state(
        written, values, states, dstates, pair * chunks + chunk, first + batch * T, start, total, columns, T, D, DTYPE,
        SCALAR, PACKED,
    )  # fmt: skip
    gathered = load_gate(terms, batch, head, rows, columns, T, KV, D, SCALAR)
    inside = tl.zeros([CHUNK, DP], tl.float32)  # of x itself, where decays are steep
    for group in range(GROUPS):
        ours = (batch * T * H + head * GROUPS + group) * D
        reader = load_tile(r + ours, rows, columns, T, H * D, D)
        if mild:
            near = load_tile(near_p + ours, rows, columns, T, H * D, D)
            a = tl.where(tl.trans(seen), product(written, tl.trans(near), DTYPE), 0.0)
            da = tl.where(tl.trans(seen), product(values, tl.trans(reader), DTYPE), 0.0)
            dvalues += product(a, reader, DTYPE)
            dwritten += product(da, near, DTYPE)
        else:
            query = load_tile(p + ours, rows, columns, T, H * D, D).to(tl.float32)
            raw = load_tile(x + theirs, rows, columns, T, KV * D, D).to(tl.float32)
            log_decay = load_decay(log_g, batch, head, rows, columns, T, KV, D, SCALAR)
            da = tl.where(seen, product(reader, tl.trans(values), DTYPE), 0.0)
            a, _, dx_here, terms_here = scores_backward(da, query, raw, log_decay, seen, DTYPE, SCALAR)
            dvalues += product(tl.trans(a), reader, DTYPE)
            inside += dx_here
            gathered += terms_here
    store_tile(dy + theirs, rows, columns, dvalues, T, KV * D, D)
    paired = written.to(tl.float32) * dwritten
    gathered -= tl.sum(paired, 1, keep_dims=True) if SCALAR else paired
    log_decay = load_decay(log_g, batch, head, rows, columns, T, KV, D, SCALAR)
    dgate = tl.where(log_decay > GONE, running_sum(gathered, DTYPE, SCALAR, True) + last, 0.0)
    store_gate(dlog_g, batch, head, rows, columns, dgate, T, KV, D, SCALAR)
    sums = running_sum(log_decay, DTYPE, SCALAR)
    for_writing = decay_of_writing(sums, total, log_g, batch, head, rows, columns, T, KV, D, DTYPE, SCALAR)
    store_tile(dx + theirs, rows, columns, dwritten * for_writing + inside, T, KV * D, D)
