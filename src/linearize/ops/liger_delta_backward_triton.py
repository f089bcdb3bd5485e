"""Backward kernels of the delta rule; names as in `liger_delta_forward_triton`, shapes as in `liger_delta_triton`.

z = Mᵀ do + left dS is the gradient of r, -z uᵀ that of A, dM Xᵀ that of D · q kᵀ. First for every chunk at once the
gradients of its queries, and from them the first term of z; then, from the last chunk to the first, those of the
states, with the second; then for every chunk at once those of its keys, values and gates.
"""

import triton
import triton.language as tl

from linearize.ops.liger_delta_triton import (
    decay_mask,
    entering,
    kept,
    lasting,
    load_matrix,
    load_square,
    load_sums,
    reach,
    reached,
    store_effect,
    store_matrix,
    unit,
    unit_backward,
)
from linearize.ops.liger_triton import (
    CHUNK,
    GONE,
    document_mask,
    exp,
    load_first,
    load_tile,
    product,
    sigmoid,
    split_product,
    store_tile,
)

FAINT = tl.constexpr(1e-4)  # a β with which entries of X, in fp16, have few digits left


@triton.jit(do_not_specialize=["T"])
def delta_query_gradients_kernel(
    q, key, residual, solved, mixing, first, log_g, states, doutput, dq, dmixing, dread, dresidual, dkey, dsums, T,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr,
    FEATURE: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk's queries of one key/value head, added to `dq` and `dmixing`; and from its own queries
    alone those of r, of keys, of the state that they read, `dread` `[B * KV, chunks, D, V]`, and, where there is a
    decay, of b `[B * KV, T]`."""
    chunk, chunks, H = tl.program_id(0), tl.num_programs(0), KV * GROUPS
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // KV, pair % KV
    theirs = batch * T * KV + head
    start = chunk * CHUNK
    rows, channels, columns = start + tl.arange(0, CHUNK), tl.arange(0, DP), tl.arange(0, VP)
    starts = load_first(first + batch * T, rows, T, PACKED)
    to_query, _ = load_sums(log_g + pair * T, rows, T, GATED)
    between = decay_mask(log_g + pair * T, to_query, rows, T, GATED)
    reaching = reached(exp(to_query), starts, start, PACKED)[:, None]
    unit_key = load_tile(key + theirs * D, rows, channels, T, KV * D, D)
    gain = load_tile(residual + theirs * V, rows, columns, T, KV * V, V)
    inverted = load_square(solved, pair * chunks + chunk)
    state = load_matrix(states, pair * chunks + chunk, channels, columns, D, V)
    between = tl.where(document_mask(rows, rows, starts), between, 0.0)
    dgain, dunit_key = tl.zeros([CHUNK, VP], tl.float32), tl.zeros([CHUNK, DP], tl.float32)
    dstate, dsum = tl.zeros([DP, VP], tl.float32), tl.zeros([CHUNK], tl.float32)
    for group in tl.range(0, GROUPS, disable_licm=True):  # offsets and masks, made anew, need no registers meanwhile
        index = batch * H + head * GROUPS + group
        ours = batch * T * H + head * GROUPS + group
        w = 1.0 if FEATURE == "given" else tl.load(mixing + head * GROUPS + group)
        dout = load_tile(doutput + ours * V, rows, columns, T, H * V, V)
        x = load_tile(q + ours * D, rows, channels, T, H * D, D).to(tl.float32)
        query, scale = unit(x, channels, D, FEATURE)
        query = query.to(DTYPE)
        dstate += product(tl.trans(query), w * reaching * dout.to(tl.float32), DTYPE)
        dout = dout.to(DTYPE)
        p = (between * product(query, tl.trans(unit_key), DTYPE)).to(FINE)
        m = product(p, inverted, FINE)
        dgain += product(tl.trans((w * m).to(DTYPE)), dout, DTYPE)
        dm = product(dout, tl.trans(gain), DTYPE)
        read = tl.sum(m * dm, 1)
        dp = split_product(dm, tl.trans(inverted), DTYPE)
        if GATED:
            change = w * p.to(tl.float32) * dp
            dsum += tl.sum(change, 1) - tl.sum(change, 0)
        dp *= between
        dunit_key += product(tl.trans((w * dp).to(DTYPE)), query, DTYPE)
        dquery = reaching * product(dout, tl.trans(state), DTYPE)
        y = query.to(tl.float32)
        before = tl.sum(y * dquery, 1)
        dsum += w * before
        if FEATURE != "given":
            place = dmixing + index * chunks + chunk
            tl.store(place, tl.load(place) + tl.sum(read + before, 0))
        within = product(dp, unit_key, DTYPE)
        if DP > 64:  # a bare sum would become one product's start, and each half of 8 warps would make the whole of it
            within = tl.where((rows < T)[:, None], within, 0.0)
        dquery += within
        draw = w * unit_backward(y, scale, dquery, FEATURE)
        if FEATURE != "given":
            draw += load_tile(dq + ours * D, rows, channels, T, H * D, D).to(tl.float32)
        store_tile(dq + ours * D, rows, channels, draw, T, H * D, D)
    store_tile(dresidual + theirs * V, rows, columns, dgain, T, KV * V, V)
    store_tile(dkey + theirs * D, rows, channels, dunit_key, T, KV * D, D)
    store_matrix(dread, pair * chunks + chunk, channels, columns, dstate, D, V)
    if GATED:
        tl.store(dsums + pair * T + rows, dsum, mask=rows < T)


@triton.jit(do_not_specialize=["T", "SEGMENT"])
def delta_state_gradients_kernel(
    key, left, first, beta, log_g, dread, dfinal, dresidual, dstates, dinitial, T, SEGMENT,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, STAGES: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """`delta_states_kernel` backwards: the gradient of the state after every chunk, and from it the rest of r's. The
    first segment is the one at the end."""
    block, segment, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments, chunks = tl.num_programs(1), tl.cdiv(T, CHUNK)
    at = pair // KV * T * KV + pair % KV
    first += pair // KV * T
    beta += pair * T
    log_g += pair * T
    channels, columns = tl.arange(0, DP), block * BV + tl.arange(0, BV)
    dstate = entering(dfinal, pair * segments + segment, channels, columns, D, V, VP, STORE)
    begin, end = segment * SEGMENT, tl.minimum(chunks, (segment + 1) * SEGMENT)
    for n in tl.range(begin, end, num_stages=STAGES if STAGES > 2 else None):
        chunk = chunks - 1 - n
        start = chunk * CHUNK
        rows = start + tl.arange(0, CHUNK)
        unit_key = load_tile(key + at * D, rows, channels, T, KV * D, D)
        remainder = load_tile(left + at * D, rows, channels, T, KV * D, D)
        dgain = load_tile(dresidual + at * V, rows, columns, T, KV * V, V).to(tl.float32)
        read = load_matrix(dread, pair * chunks + chunk, channels, columns, D, V).to(tl.float32)
        write = tl.load(beta + rows, mask=rows < T, other=0.0)
        if STORE:
            store_matrix(dstates, pair * chunks + chunk, channels, columns, dstate, D, V)
        dgain += product(remainder, dstate, DTYPE)
        if STORE:
            store_tile(dresidual + at * V, rows, columns, dgain, T, KV * V, V)
        dgain *= (write * reach(log_g, first, rows, start, T, GATED, PACKED))[:, None]
        dstate *= kept(log_g, first, rows, start, T, GATED, PACKED)
        dstate += read - product(tl.trans(unit_key), dgain, DTYPE)
    if not STORE:
        store_effect(dinitial, pair * segments + segment, channels, columns, dstate, D, V, VP)
    elif segment == segments - 1:
        store_matrix(dinitial, pair, channels, columns, dstate, D, V)


@triton.jit(do_not_specialize=["T"])
def delta_key_gradients_kernel(
    k, v, key, residual, solved, first, beta, log_g, states, dstates, dresidual, dkey, dsums, dk, dv, dbeta, dlog_g, T,
    rate, strength,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, VP: tl.constexpr, FEATURE: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """To the gradients of a chunk's keys and values, those as keys, values and gates of the recurrence; where those are
    given, their gradients, `dbeta` and `dlog_g` `[B * KV, T]` too."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // KV
    at = batch * T * KV + pair % KV
    first += batch * T
    log_g += pair * T
    start = chunk * CHUNK
    rows, channels, columns = start + tl.arange(0, CHUNK), tl.arange(0, DP), tl.arange(0, VP)
    starts = load_first(first, rows, T, PACKED)
    to_query, to_end = load_sums(log_g, rows, T, GATED)
    between = decay_mask(log_g, to_query, rows, T, GATED)
    write = tl.load(beta + pair * T + rows, mask=rows < T, other=0.0)
    z = load_tile(dresidual + at * V, rows, columns, T, KV * V, V).to(tl.float32)

    values = load_tile(v + at * V, rows, columns, T, KV * V, V).to(tl.float32)
    dwrite = tl.sum(z * values, 1)
    dvalues = write[:, None] * z
    if FEATURE != "given":
        dvalues += load_tile(dv + at * V, rows, columns, T, KV * V, V).to(tl.float32)
    store_tile(dv + at * V, rows, columns, dvalues, T, KV * V, V)

    unit_key = load_tile(key + at * D, rows, channels, T, KV * D, D)
    gain = load_tile(residual + at * V, rows, columns, T, KV * V, V)
    written = product(load_square(solved, pair * chunks + chunk), gain, DTYPE)
    # β's gradient as one sum; `dwrite` is several, which nearly cancel
    direct = tl.sum(z * written, 1) / tl.maximum(write, FAINT)
    seen = (rows[:, None] > rows[None, :]) & (rows[None, :] >= starts[:, None])
    between = tl.where(seen, between, 0.0)
    da = -product(z, tl.trans(written), DTYPE)
    a = da * between * product(unit_key, tl.trans(unit_key), DTYPE)
    dwrite += tl.sum(a, 1)
    dsum = tl.zeros([CHUNK], tl.float32)
    if GATED:
        a *= write[:, None]
        dsum = tl.load(dsums + pair * T + rows, mask=rows < T, other=0.0) + tl.sum(a, 1) - tl.sum(a, 0)
    da *= between * write[:, None]
    dunit_key = load_tile(dkey + at * D, rows, channels, T, KV * D, D).to(tl.float32)
    dunit_key += product(da, unit_key, DTYPE) + product(tl.trans(da), unit_key, DTYPE)

    state = load_matrix(states, pair * chunks + chunk, channels, columns, D, V)
    reaching = reached(exp(to_query), starts, start, PACKED)
    derased = product(z, tl.trans(state), DTYPE)
    dread = reaching * tl.sum(unit_key.to(tl.float32) * derased, 1)
    dwrite -= dread
    dunit_key -= (write * reaching)[:, None] * derased

    dstate = load_matrix(dstates, pair * chunks + chunk, channels, columns, D, V)
    last = tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1), 0)
    ending = lasting(exp(to_end), first, rows, start, T, PACKED)
    dended = ending[:, None] * product(written, tl.trans(dstate), DTYPE)
    dunit_key += dended

    ddecay = tl.zeros([CHUNK], tl.float32)
    if GATED:
        held = tl.sum(unit_key.to(tl.float32) * dended, 1)
        dsum -= write * dread + held
        last = last * kept(log_g, first, rows, start, T, GATED, PACKED) + tl.sum(held, 0)
        decay = tl.load(log_g + rows, mask=rows < T, other=0.0)
        ddecay = tl.where(decay > GONE, tl.cumsum(dsum, 0, reverse=True) + last, 0.0)
    if FEATURE == "given":
        tl.store(dbeta + pair * T + rows, tl.where(write > FAINT, direct, dwrite), mask=rows < T)
        if GATED:
            tl.store(dlog_g + pair * T + rows, ddecay, mask=rows < T)
    else:
        x = load_tile(k + at * D, rows, channels, T, KV * D, D).to(tl.float32)
        share = sigmoid(tl.sum(x, 1) / D)
        dpooled = (dwrite * strength * share + ddecay * rate) * (1.0 - share)
        y, scale = unit(x, channels, D, FEATURE)
        dunit_key = unit_backward(y, scale, dunit_key, FEATURE) + (dpooled / D)[:, None]
        dunit_key += load_tile(dk + at * D, rows, channels, T, KV * D, D).to(tl.float32)
    store_tile(dk + at * D, rows, channels, dunit_key, T, KV * D, D)
