"""Backward kernels of the delta rule for keys of more than 128 channels, with gates that are given.

`delta_query_gradients_kernel` holds three sums as wide as keys at once, which at 256 channels are more than registers
hold. Here all that is as large as a chunk's tokens by its tokens, or as values, comes first, and then what is as wide
as keys, in blocks of channels that know nothing of each other. Names as in `liger_delta_backward_triton`.
"""

import triton
import triton.language as tl

from linearize.ops.liger_delta_triton import (
    decay_mask,
    load_matrix,
    load_square,
    load_sums,
    reached,
    store_matrix,
    store_square,
)
from linearize.ops.liger_triton import (
    CHUNK,
    document_mask,
    exp,
    load_first,
    load_tile,
    product,
    split_product,
    store_tile,
)


@triton.jit(do_not_specialize=["T"])
def delta_score_gradients_kernel(
    q, key, residual, solved, first, log_g, states, doutput, dscores, dresidual, dsums, T,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """The gradients of the products of one chunk's queries with its keys, `dscores` `[B * H, chunks, C, C]`; and, from
    the chunk's own queries alone, those of r and, where there is a decay, of b `[B * KV, T]`."""
    chunk, chunks, H = tl.program_id(0), tl.num_programs(0), KV * GROUPS
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // KV, pair % KV
    theirs = batch * T * KV + head
    start = chunk * CHUNK
    rows, columns = start + tl.arange(0, CHUNK), tl.arange(0, VP)
    starts = load_first(first + batch * T, rows, T, PACKED)
    to_query, _ = load_sums(log_g + pair * T, rows, T, GATED)
    between = decay_mask(log_g + pair * T, to_query, rows, T, GATED)
    between = tl.where(document_mask(rows, rows, starts), between, 0.0)
    reaching = reached(exp(to_query), starts, start, PACKED)
    gain = load_tile(residual + theirs * V, rows, columns, T, KV * V, V)
    inverted = load_square(solved, pair * chunks + chunk)
    dgain, dsum = tl.zeros([CHUNK, VP], tl.float32), tl.zeros([CHUNK], tl.float32)
    for group in tl.range(0, GROUPS, disable_licm=True):  # as in `delta_query_gradients_kernel`
        index = batch * H + head * GROUPS + group
        ours = batch * T * H + head * GROUPS + group
        dout = load_tile(doutput + ours * V, rows, columns, T, H * V, V)
        p, read = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, VP], tl.float32)
        for first_channel in range(0, D, BLOCK):
            channels = first_channel + tl.arange(0, BLOCK)
            query = load_tile(q + ours * D, rows, channels, T, H * D, D)
            p += product(query, tl.trans(load_tile(key + theirs * D, rows, channels, T, KV * D, D)), DTYPE)
            if GATED:
                state = load_matrix(states, pair * chunks + chunk, channels, columns, D, V)
                read += product(query, state, DTYPE)
        p = (between * p).to(FINE)
        m = product(p, inverted, FINE)
        dgain += product(tl.trans(m.to(DTYPE)), dout, DTYPE)
        dp = split_product(product(dout, tl.trans(gain), DTYPE), tl.trans(inverted), DTYPE)
        if GATED:
            change = p.to(tl.float32) * dp
            dsum += tl.sum(change, 1) - tl.sum(change, 0)
            dsum += reaching * tl.sum(read * dout.to(tl.float32), 1)
        store_square(dscores, index * chunks + chunk, between * dp)
    store_tile(dresidual + theirs * V, rows, columns, dgain, T, KV * V, V)
    if GATED:
        tl.store(dsums + pair * T + rows, dsum, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def delta_channel_gradients_kernel(
    q, key, first, log_g, states, doutput, dscores, dq, dread, dkey, T,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of one block of channels: the gradients of a chunk's queries of one key/value head; and, from these queries
    alone, those of keys and of the state that they read, `dread` `[B * KV, chunks, D, V]`."""
    chunk, chunks, H = tl.program_id(0), tl.num_programs(0), KV * GROUPS
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // KV, pair % KV
    theirs = batch * T * KV + head
    start = chunk * CHUNK
    rows, columns = start + tl.arange(0, CHUNK), tl.arange(0, VP)
    channels = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    starts = load_first(first + batch * T, rows, T, PACKED)
    to_query, _ = load_sums(log_g + pair * T, rows, T, GATED)
    reaching = reached(exp(to_query), starts, start, PACKED)[:, None]
    unit_key = load_tile(key + theirs * D, rows, channels, T, KV * D, D)
    state = load_matrix(states, pair * chunks + chunk, channels, columns, D, V)
    dunit_key, dstate = tl.zeros([CHUNK, BLOCK], tl.float32), tl.zeros([BLOCK, VP], tl.float32)
    for group in tl.range(0, GROUPS, disable_licm=True):  # as in `delta_query_gradients_kernel`
        ours = batch * T * H + head * GROUPS + group
        dout = load_tile(doutput + ours * V, rows, columns, T, H * V, V)
        query = load_tile(q + ours * D, rows, channels, T, H * D, D)
        dp = load_square(dscores, (batch * H + head * GROUPS + group) * chunks + chunk)
        dstate += product(tl.trans(query), reaching * dout.to(tl.float32), DTYPE)
        dunit_key += product(tl.trans(dp), query, DTYPE)
        dquery = reaching * product(dout, tl.trans(state), DTYPE) + product(dp, unit_key, DTYPE)
        store_tile(dq + ours * D, rows, channels, dquery, T, H * D, D)
    store_tile(dkey + theirs * D, rows, channels, dunit_key, T, KV * D, D)
    store_matrix(dread, pair * chunks + chunk, channels, columns, dstate, D, V)
