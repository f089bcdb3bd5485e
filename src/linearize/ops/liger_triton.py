"""Kernels of Liger Attention: what the forward and backward kernels share, and the forward ones.

A program works on the queries and keys of one chunk of 64 tokens and one key/value head, with all query heads of its
group, so that nothing is repeated for a group. Tensors are contiguous: q, o `[B, T, H, D]`; k, v `[B, T, KV, D]`;
states `[B * KV, chunks, D, D]`. In `[C, K]` below, K is D, or 1 where a gate has one decay for each head. DP is D
rounded up to a power of two. `first` `[B, T]` is the index of the first token of each token's document.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
LEVELS = tl.constexpr(6)  # 2^6 tokens in a chunk
SINK_ROWS = tl.constexpr(16)  # the smallest side of a matrix product
GONE = tl.constexpr(-100.0)  # a log decay that leaves nothing in fp32, and has no gradient
LIMIT = tl.constexpr(-60.0)  # of a chunk's summed log decay, for one product to serve the whole chunk


# --- tiles ---


@triton.jit
def load_tile(base, rows, columns, T, STRIDE: tl.constexpr, D: tl.constexpr):
    """`[rows, columns]`, 0 outside the sequence and the head."""
    inside = ((rows >= 0) & (rows < T))[:, None] & (columns < D)[None, :]
    return tl.load(base + rows[:, None] * STRIDE + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(base, rows, columns, values, T, STRIDE: tl.constexpr, D: tl.constexpr):
    """Rows past the sequence are left out."""
    inside = (rows < T)[:, None] & (columns < D)[None, :]
    tl.store(base + rows[:, None] * STRIDE + columns[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_first(first, rows, T, PACKED: tl.constexpr):
    """The first token of each row's document."""
    starts = tl.zeros_like(rows)
    if PACKED:
        starts = tl.load(first + rows, mask=rows < T, other=0).to(tl.int32)
    return starts


@triton.jit
def load_one_first(first, row, PACKED: tl.constexpr):
    """As `load_first`, of one row."""
    start = row * 0
    if PACKED:
        start = tl.load(first + row).to(tl.int32)
    return start


@triton.jit
def product(x, y, DTYPE: tl.constexpr):
    """x y, from operands in DTYPE, summed in fp32; fp32 itself by three products in tf32."""
    return tl.dot(x.to(DTYPE), y.to(DTYPE), input_precision="tf32x3")


@triton.jit
def masked_sums(mask, x, DTYPE: tl.constexpr):
    """mask x with fp32's precision: in bf16, the mask is exact and x is split in two."""
    if tl.float32 == DTYPE:
        sums = product(mask, x, DTYPE)
    else:
        high = x.to(DTYPE)
        sums = product(mask, high, DTYPE) + product(mask, x - high.to(tl.float32), DTYPE)
    return sums


# --- rotary position embedding, as rotate-half over the first R channels ---


@triton.jit
def partner_of(columns, R: tl.constexpr):
    """The channel that each is rotated with; itself past R."""
    return tl.where(columns < R // 2, columns + R // 2, tl.where(columns < R, columns - R // 2, columns))


@triton.jit
def load_rope(cos, sin, rows, columns, T, R: tl.constexpr):
    """Cosine, and sine with the sign that rotate-half gives it; 1 and 0 past R."""
    inside = ((rows >= 0) & (rows < T))[:, None] & (columns < R)[None, :]
    offsets = rows[:, None] * R + columns[None, :]
    c = tl.load(cos + offsets, mask=inside, other=1.0).to(tl.float32)
    s = tl.load(sin + offsets, mask=inside, other=0.0).to(tl.float32)
    return c, tl.where((columns < R // 2)[None, :], -s, s)


@triton.jit
def load_rotated(base, rows, columns, cos, sin, T, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """A tile after RoPE, in fp32: x cos + partner(x) sin."""
    x = load_tile(base, rows, columns, T, STRIDE, D).to(tl.float32)
    if R > 0:
        c, s = load_rope(cos, sin, rows, columns, T, R)
        x = x * c + load_tile(base, rows, partner_of(columns, R), T, STRIDE, D).to(tl.float32) * s
    return x


@triton.jit
def rotate_back(dx, rows, columns, cos, sin, T, R: tl.constexpr):
    """The gradient before RoPE, from that after it: the rotation by the negative angle."""
    if R > 0:
        c, s = load_rope(cos, sin, rows, columns, T, R)
        index = tl.broadcast_to(partner_of(columns, R)[None, :], dx.shape)
        dx = dx * c - tl.gather(dx, index, 1) * s
    return dx


# --- who sees whom ---


@triton.jit
def window_mask(rows, keys, first, W: tl.constexpr):
    """The last W tokens of the query's document, itself included."""
    age = rows[:, None] - keys[None, :]
    return (age >= 0) & (age < W) & (keys[None, :] >= first[:, None])


@triton.jit
def sink_rows(first, SINKS: tl.constexpr):
    """Where the sinks are that a chunk's queries see: all in the document of the chunk's first token, since a
    document that begins inside the chunk has none yet that have left the window. -1 where there is none."""
    slots = tl.arange(0, SINK_ROWS)
    return tl.where(slots < SINKS, first + slots, -1)


@triton.jit
def sink_mask(rows, sinks, first, chunk_first, W: tl.constexpr):
    """A sink is seen once it has left the window."""
    gone = (rows[:, None] - sinks[None, :] >= W) & (sinks >= 0)[None, :]
    return gone & (first == chunk_first)[:, None]


# --- feature map, gate and key ---


@triton.jit
def feature(x, columns, D: tl.constexpr, FEATURE: tl.constexpr):
    """Softmax over the head, or nothing."""
    if FEATURE == "softmax":
        x = tl.where((columns < D)[None, :], x, -float("inf"))
        x = tl.exp(x - tl.max(x, 1)[:, None])
        x = x / tl.sum(x, 1)[:, None]
    return x


@triton.jit
def feature_backward(x, dy, columns, D: tl.constexpr, FEATURE: tl.constexpr):
    """The gradient of `feature`'s input."""
    if FEATURE == "softmax":
        y = feature(x, columns, D, FEATURE)
        dy = y * (dy - tl.sum(y * dy, 1)[:, None])
    return dy


@triton.jit
def log_sigmoid(x):
    """log σ(x), without overflow."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def key_and_gate(k, inside, columns, decay, rate, lower, D: tl.constexpr, GATE: tl.constexpr, FEATURE: tl.constexpr):
    """The recurrence's key `[C, DP]` and log decay `[C, K]` from the key projection, both 0 past the sequence;
    `rate` is one over the gate's temperature."""
    if GATE == "hgrn2":
        key = (1.0 - lower) * (1.0 - tl.exp(log_sigmoid(k) * rate))
    else:
        key = feature(k, columns, D, FEATURE)
    if GATE == "gla":
        log_g = log_sigmoid(k) * rate
    elif GATE == "rwkv6":
        log_g = -tl.exp(tl.minimum(k, 10.0)) * rate
    elif GATE == "hgrn2":
        log_g = tl.log(1.0 - key)
    elif GATE == "lightning":
        log_g = tl.zeros_like(tl.sum(k, 1, keep_dims=True)) + decay
    else:
        pooled = tl.sum(k, 1, keep_dims=True) / D
        if GATE == "mlstm":
            log_g = log_sigmoid(pooled) * rate
        else:  # mamba2
            step = -log_sigmoid(-pooled)
            log_g = -step * rate
            key = key * step
    return tl.where(inside[:, None], key, 0.0), tl.where(inside[:, None], log_g, 0.0)


@triton.jit
def key_and_gate_backward(
    k, dkey, dlog_g, columns, rate, lower, D: tl.constexpr, GATE: tl.constexpr, FEATURE: tl.constexpr
):
    """The gradient of the key projection."""
    if GATE == "gla":
        dk = feature_backward(k, dkey, columns, D, FEATURE) + dlog_g * tl.exp(log_sigmoid(-k)) * rate
    elif GATE == "rwkv6":
        slope = tl.where(k <= 10.0, -tl.exp(tl.minimum(k, 10.0)) * rate, 0.0)
        dk = feature_backward(k, dkey, columns, D, FEATURE) + dlog_g * slope
    elif GATE == "hgrn2":
        kept = tl.exp(log_sigmoid(k) * rate)
        slope = -(1.0 - lower) * kept * tl.exp(log_sigmoid(-k)) * rate
        dk = (dkey - dlog_g / (1.0 - (1.0 - lower) * (1.0 - kept))) * slope
    elif GATE == "lightning":
        dk = feature_backward(k, dkey, columns, D, FEATURE)
    else:
        pooled = tl.sum(k, 1, keep_dims=True) / D
        if GATE == "mlstm":
            dpooled = dlog_g * tl.exp(log_sigmoid(-pooled)) * rate
        else:  # mamba2
            dstep = tl.sum(feature(k, columns, D, FEATURE) * dkey, 1, keep_dims=True) - dlog_g * rate
            dpooled = dstep * tl.exp(log_sigmoid(pooled))
            dkey = dkey * -log_sigmoid(-pooled)
        dk = feature_backward(k, dkey, columns, D, FEATURE) + dpooled / D
    return dk


# --- decay within a chunk ---


@triton.jit
def running_sum(x, SCALAR: tl.constexpr, REVERSE: tl.constexpr = False):
    """The sum of x `[C, K]` up to and with each token, or from it on. (Triton cannot scan a tile of width 1.)"""
    if SCALAR:
        i, t = tl.arange(0, CHUNK)[None, :], tl.arange(0, CHUNK)[:, None]
        sums = tl.sum(tl.where(t >= i if REVERSE else t <= i, x, 0.0), 0)[:, None]
    else:
        sums = tl.cumsum(x, 0, reverse=REVERSE)
    return sums


@triton.jit
def decay_to_end(log_g, to_query, fast, DTYPE: tl.constexpr, SCALAR: tl.constexpr):
    """The log decay from each key to the end of its chunk, of the tokens after it."""
    if SCALAR:
        i = tl.arange(0, CHUNK)
        later = i[:, None] > i[None, :]  # [token, key]
        to_end = tl.sum(tl.where(later, log_g, 0.0), 0)[:, None]
    elif fast:
        to_end = tl.sum(log_g, 0)[None, :] - to_query
    else:  # large sums are not subtracted: one -1e4 would swallow its neighbours
        i = tl.arange(0, CHUNK)
        to_end = masked_sums(i[None, :] > i[:, None], log_g, DTYPE)
    return to_end


@triton.jit
def decay_between(log_g):
    """exp(log decay from key j to query i) `[C, C]` for one decay a head; each sum starts from its own key."""
    i = tl.arange(0, CHUNK)
    return tl.exp(tl.cumsum(tl.where(i[:, None] > i[None, :], log_g, 0.0), 0))


@triton.jit
def decay_to_boundary(log_g, size, DTYPE: tl.constexpr):
    """For the merge of neighbouring blocks of `size` tokens: the decay from the boundary to each query of the right
    blocks and from each key of the left ones to it, both at most 1, and which tokens are in right blocks `[C, 1]`."""
    i, t = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    right = (i & size) != 0
    between = (i // size == t // size) & ((right & (t <= i)) | ((right == 0) & (t > i)))
    return tl.exp(masked_sums(between, log_g, DTYPE)), right


@triton.jit
def merged_at(size):
    """The pairs that one merge serves `[C, C]`: both tokens in one pair of blocks."""
    i = tl.arange(0, CHUNK)
    return i[:, None] // (2 * size) == i[None, :] // (2 * size)


@triton.jit
def scores(query, key, near_key, log_g, centred, fast, seen, DTYPE: tl.constexpr, SCALAR: tl.constexpr):
    """query_i · exp(sum of log_g over (j, i]) key_j where j is seen `[C, C]`.

    `centred` is the log decay up to each token, less half of the chunk's, and near_key the keys divided by it: while
    a chunk decays by no more than LIMIT, one product of query · exp(centred) and near_key serves it (`fast`). Else
    blocks merge pairwise, 1 + 1 tokens, 2 + 2 ..., as in `gated_linear.chunked`: no exponent is positive.
    """
    if SCALAR:
        a = product(query, tl.trans(key), DTYPE) * decay_between(log_g)
    elif fast:
        a = product(query * tl.exp(centred), tl.trans(near_key), DTYPE)
    else:
        i = tl.arange(0, CHUNK)
        a = tl.where(i[:, None] == i[None, :], product(query, tl.trans(key), DTYPE), 0.0)
        for level in range(LEVELS):
            decay, right = decay_to_boundary(log_g, 1 << level, DTYPE)
            right_query, left_key = tl.where(right, query * decay, 0.0), tl.where(right, 0.0, key * decay)
            a += tl.where(merged_at(1 << level), product(right_query, tl.trans(left_key), DTYPE), 0.0)
    return tl.where(seen, a, 0.0)


# --- forward ---


@triton.jit(do_not_specialize=["T", "SEGMENT"])
def states_kernel(
    k, v, first, decay, initial, states, final, products, T, SEGMENT, rate, lower,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, FEATURE: tl.constexpr,
    SCALAR: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """S ← exp(total of log_g) S + (key decayed to the chunk's end)ᵀ v, over one segment of chunks.

    From `initial` `[B * KV, segments, D, D]` to `final`, likewise; the state before every chunk goes to `states`.
    Without STORE, the decay over the segment goes to `products` `[B * KV, segments, D]` instead.
    """
    block, segment, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments, chunks = tl.num_programs(1), tl.cdiv(T, CHUNK)
    k += (pair // KV * T * KV + pair % KV) * D
    v += (pair // KV * T * KV + pair % KV) * D
    first += pair // KV * T
    channels, columns = tl.arange(0, DP), block * BV + tl.arange(0, BV)
    inside = (channels < D)[:, None] & (columns < D)[None, :]
    offsets = channels[:, None] * D + columns[None, :]
    fixed = tl.load(decay + pair % KV)
    state = tl.load(initial + (pair * segments + segment) * D * D + offsets, mask=inside, other=0.0)
    kept = tl.full([DP], 1.0, tl.float32)
    for chunk in range(segment * SEGMENT, tl.minimum(chunks, (segment + 1) * SEGMENT)):
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        if STORE:
            tl.store(states + (pair * chunks + chunk) * D * D + offsets, state.to(states.dtype.element_ty), mask=inside)
        x = load_tile(k, rows, channels, T, KV * D, D).to(tl.float32)
        values = load_tile(v, rows, columns, T, KV * D, D)
        key, log_g = key_and_gate(x, rows < T, channels, fixed, rate, lower, D, GATE, FEATURE)
        total = tl.sum(log_g, 0)
        to_end = decay_to_end(log_g, running_sum(log_g, SCALAR), tl.min(total) > LIMIT, DTYPE, SCALAR)
        passed = tl.exp(total)
        last_first = load_one_first(first, tl.minimum(chunk * CHUNK + CHUNK, T) - 1, PACKED)
        if PACKED:  # what the chunk's last token still sees
            key = tl.where((rows >= last_first)[:, None], key, 0.0)
            passed = tl.where(last_first < tl.maximum(chunk * CHUNK, 1), passed, 0.0)
        state = state * passed[:, None] + product(tl.trans(key * tl.exp(to_end)), values, DTYPE)
        kept *= passed
    tl.store(final + (pair * segments + segment) * D * D + offsets, state, mask=inside)
    if not STORE:
        tl.store(products + (pair * segments + segment) * D + channels, kept, mask=channels < D)


@triton.jit(do_not_specialize=["SEGMENTS"])
def carry_kernel(
    initial, finals, products, starts, last, SEGMENTS, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """What enters each segment, `starts` `[B * KV, segments, D, D]`, from what each makes of nothing, `finals`, and
    the decay over it, `products` `[B * KV, segments, D]`; from the last to the first if REVERSE."""
    block, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channels, columns = tl.arange(0, DP), block * BV + tl.arange(0, BV)
    inside = (channels < D)[:, None] & (columns < D)[None, :]
    offsets = channels[:, None] * D + columns[None, :]
    state = tl.load(initial + pair * D * D + offsets, mask=inside, other=0.0)
    for n in range(SEGMENTS):
        place = pair * SEGMENTS + (SEGMENTS - 1 - n if REVERSE else n)
        tl.store(starts + place * D * D + offsets, state, mask=inside)
        kept = tl.load(products + place * D + channels, mask=channels < D, other=0.0)
        state = state * kept[:, None] + tl.load(finals + place * D * D + offsets, mask=inside, other=0.0)
    tl.store(last + pair * D * D + offsets, state, mask=inside)


@triton.jit(do_not_specialize=["T", "rope_stride"])
def output_kernel(
    q, k, v, cos, sin, mixing, first, decay, states, output, lse, T, rope_stride, rate, lower, scale,
    KV: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    SINKS: tl.constexpr, GATE: tl.constexpr, FEATURE: tl.constexpr, SCALAR: tl.constexpr, PACKED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """output = w · recurrence + (1 - w) · window, for one chunk and all query heads of one key/value head, and the
    log-sum-exp of each query's window `[B, H, T]`."""
    chunk, pair = tl.program_id(0), tl.program_id(1)
    batch, head, H = (pair // KV).to(tl.int64), pair % KV, KV * GROUPS
    k += (batch * T * KV + head) * D
    v += (batch * T * KV + head) * D
    cos += batch * rope_stride
    sin += batch * rope_stride
    first += batch * T
    start = chunk * CHUNK
    rows, before, columns = start + tl.arange(0, CHUNK), start - CHUNK + tl.arange(0, CHUNK), tl.arange(0, DP)
    starts, chunk_first = load_first(first, rows, T, PACKED), load_one_first(first, start, PACKED)

    x = load_tile(k, rows, columns, T, KV * D, D).to(tl.float32)
    key, log_g = key_and_gate(x, rows < T, columns, tl.load(decay + head), rate, lower, D, GATE, FEATURE)
    to_query, total = running_sum(log_g, SCALAR), tl.sum(log_g, 0)
    fast = tl.min(total) > LIMIT
    centred = to_query - 0.5 * total[None, :]
    near_key = (key * tl.exp(tl.minimum(-centred, -LIMIT))).to(DTYPE)  # not clamped where `fast`
    key = key.to(DTYPE)
    values = load_tile(v, rows, columns, T, KV * D, D).to(DTYPE)
    values_before = load_tile(v, before, columns, T, KV * D, D).to(DTYPE)
    own_key = load_rotated(k, rows, columns, cos, sin, T, KV * D, D, R).to(DTYPE)
    key_before = load_rotated(k, before, columns, cos, sin, T, KV * D, D, R).to(DTYPE)
    sinks = sink_rows(chunk_first, SINKS)
    if SINKS > 0:
        sink_key = load_rotated(k, sinks, columns, cos, sin, T, KV * D, D, R).to(DTYPE)
        sink_values = load_tile(v, sinks, columns, T, KV * D, D).to(DTYPE)
    causal = (rows[:, None] >= rows[None, :]) & (rows[None, :] >= starts[:, None])
    own_seen, before_seen = window_mask(rows, rows, starts, W), window_mask(rows, before, starts, W)
    reads = (starts < tl.maximum(start, 1)).to(tl.float32)[:, None]  # from the state: not if the document began here
    inside = (columns < D)[:, None] & (columns < D)[None, :]
    state = tl.load(
        states + (pair.to(tl.int64) * tl.num_programs(0) + chunk) * D * D + columns[:, None] * D + columns[None, :],
        mask=inside, other=0.0,
    )  # fmt: skip

    for group in range(GROUPS):
        query_head = head * GROUPS + group
        q_head = q + (batch * T * H + query_head) * D
        w = tl.load(mixing + query_head)
        rotated = load_rotated(q_head, rows, columns, cos, sin, T, H * D, D, R).to(DTYPE)
        own = tl.where(own_seen, product(rotated, tl.trans(own_key), DTYPE) * scale, -float("inf"))
        past = tl.where(before_seen, product(rotated, tl.trans(key_before), DTYPE) * scale, -float("inf"))
        largest = tl.maximum(tl.max(own, 1), tl.max(past, 1))
        if SINKS > 0:
            kept = sink_mask(rows, sinks, starts, chunk_first, W)
            far = tl.where(kept, product(rotated, tl.trans(sink_key), DTYPE) * scale, -float("inf"))
            largest = tl.maximum(largest, tl.max(far, 1))
            far = tl.exp(far - largest[:, None])
        own, past = tl.exp(own - largest[:, None]), tl.exp(past - largest[:, None])
        weight = tl.sum(own, 1) + tl.sum(past, 1)
        if SINKS > 0:
            weight += tl.sum(far, 1)
        share = ((1.0 - w) / weight)[:, None]

        query = feature(load_tile(q_head, rows, columns, T, H * D, D).to(tl.float32), columns, D, FEATURE)
        within = scores(query, key, near_key, log_g, centred, fast, causal, DTYPE, SCALAR)
        out = product(w * within + share * own, values, DTYPE) + product(share * past, values_before, DTYPE)
        out += product(query * tl.exp(to_query) * (w * reads), state, DTYPE)
        if SINKS > 0:
            out += product(share * far, sink_values, DTYPE)
        store_tile(output + (batch * T * H + query_head) * D, rows, columns, out, T, H * D, D)
        tl.store(lse + (batch * H + query_head) * T + rows, largest + tl.log(weight), mask=rows < T)
