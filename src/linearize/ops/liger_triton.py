"""What the kernels of Liger Attention share.

A program works on one chunk of 64 tokens of one head. Tensors are contiguous: q, o `[B, T, H, D]`; k, v
`[B, T, KV, D]`; states `[B * KV, chunks, D, D]`. In `[C, K]` below, K is D, or 1 where a gate has one decay for each
head. DP is D rounded up to a power of two. `first` `[B, T]` is the index of the first token of each token's document.

Decay within a chunk. Let b be the log decay up to and with each token. While a chunk decays by no more than LIMIT, it
is `mild`: near queries, query · exp(b), and near keys, key · exp(-b), are in range, and one product of them is the
chunk's scores. In other chunks near keys are keys decayed to the chunk's end, and what a chunk's queries read of its
own keys is added by `liger_steep_triton`. Near queries read the state before the chunk.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
LEVELS = tl.constexpr(6)  # 2^6 tokens in a chunk
SINK_ROWS = tl.constexpr(16)  # the smallest side of a matrix product
GONE = tl.constexpr(-100.0)  # a log decay that leaves nothing of what rounding does not hide, and has no gradient
NEVER = tl.constexpr(2**31 - 1)  # later than every token
LOG2_E = tl.constexpr(1.4426950408889634)
# of a chunk's summed log decay, for one product to serve the whole chunk: keys grow by up to e^60 = 1e26, their
# gradients shrink by as much, and bf16 has 1e±38
LIMIT = tl.constexpr(-60.0)


# --- tiles ---


@triton.jit
def program():
    """The chunk that a program has, of how many, and its head, or group of heads, among all sequences. All heads of a
    chunk come before the next chunk: in memory, which is read by long rows, they are neighbours."""
    index = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    return tl.program_id(1), tl.num_programs(1), index.to(tl.int64)


@triton.jit
def query_rows(chunk, index, KV: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr):
    """Where the queries of a chunk and of HEADS heads of one key/value head are, one head's rows below the other's:
    their sequence, their key/value head among all sequences, and of each row the head, the token, and the row in a
    sequence's queries `[T * H, D]`. `index` counts such heads among all sequences."""
    i, H = tl.arange(0, HEADS * CHUNK), KV * GROUPS
    query_head = index * HEADS
    batch, heads = (query_head // H).to(tl.int64), query_head % H + i // CHUNK
    rows = chunk * CHUNK + i % CHUNK
    return batch, (query_head // GROUPS).to(tl.int64), heads, rows, rows * H + heads


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
def load_gate(base, batch, head, rows, columns, T, KV: tl.constexpr, D: tl.constexpr, SCALAR: tl.constexpr):
    """A chunk of what is as large as log decays, `[B, T, KV, K]`, as `[C, K]`."""
    if SCALAR:
        x = tl.load(base + (batch * T + rows[:, None]) * KV + head, mask=(rows < T)[:, None], other=0.0)
    else:
        x = load_tile(base + (batch * T * KV + head) * D, rows, columns, T, KV * D, D)
    return x


@triton.jit
def store_gate(base, batch, head, rows, columns, x, T, KV: tl.constexpr, D: tl.constexpr, SCALAR: tl.constexpr):
    """As `load_gate` reads it."""
    if SCALAR:
        tl.store(base + (batch * T + rows[:, None]) * KV + head, x, mask=(rows < T)[:, None])
    else:
        store_tile(base + (batch * T * KV + head) * D, rows, columns, x, T, KV * D, D)


@triton.jit
def load_state(states, place, columns, D: tl.constexpr):
    """One state `[DP, DP]`, or its gradient, 0 outside the head."""
    inside = (columns < D)[:, None] & (columns < D)[None, :]
    return tl.load(states + place * D * D + columns[:, None] * D + columns[None, :], mask=inside, other=0.0)


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
def load_last_first(first, start, T, PACKED: tl.constexpr):
    """As `load_first`, of the last token of the chunk that begins at `start`."""
    return load_one_first(first, tl.minimum(start + CHUNK, T) - 1, PACKED)


@triton.jit
def product(x, y, DTYPE: tl.constexpr):
    """x y, from operands in DTYPE, summed in fp32; fp32 itself by three products in tf32."""
    return tl.dot(x.to(DTYPE), y.to(DTYPE), input_precision="tf32x3")


@triton.jit
def split_product(x, y, DTYPE: tl.constexpr):
    """x y of a y that has more digits than DTYPE: in bf16 it is split in two; x is rounded."""
    if tl.float32 == DTYPE:
        z = product(x, y, DTYPE)
    else:
        y = y.to(tl.float32)
        # cut off, not rounded, which would take conversions that GPUs make at a quarter of their speed
        high = (y.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        z = tl.dot(x.to(DTYPE), (y - high).to(DTYPE), product(x, high, DTYPE))
    return z


@triton.jit
def exp(x):
    """e^x; what is below 2^-126 is 0, for which `tl.exp` takes three times as many instructions."""
    return tl.exp2(x * LOG2_E)


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
def rotated(x, partner, c, s):
    """A tile after RoPE, from itself, the channels that each is rotated with, and `load_rope`."""
    return x.to(tl.float32) * c + partner.to(tl.float32) * s


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
def document_mask(rows, keys, first):
    """The tokens of a query's document up to and with itself `[rows, keys]`; `first` as `load_first`, of each query."""
    return (rows[:, None] >= keys[None, :]) & (keys[None, :] >= first[:, None])


@triton.jit
def continues(first, start):
    """Whether a document with this first token has a state before the chunk that begins at `start`: it began earlier,
    or with the sequence, whose first state may be a given one."""
    return first < tl.maximum(start, 1)


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


@triton.jit
def read_mask(rows, keys, first, total):
    """Whom the recurrence of a mild chunk reads; in a steep one, nobody."""
    return document_mask(rows, keys, tl.where(tl.min(total) > LIMIT, first, NEVER))


@triton.jit
def store_by_sink(base, weights, x, columns, SINKS: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    """What a chunk's queries give its sinks: weightsᵀ x `[SINKS, D]`, of `[rows, SINK_ROWS]` and `[rows, DP]`."""
    # sinks as rows: with them as 16 columns of a transposed product, Triton 3.6 reads past its shared memory
    sums = product(tl.trans(weights), x, DTYPE)
    store_tile(base, tl.arange(0, SINK_ROWS), columns, sums, SINKS, D, D)


# --- feature map, gate and key ---


@triton.jit
def feature(x, columns, D: tl.constexpr, FEATURE: tl.constexpr):
    """Softmax over the head, or nothing."""
    if FEATURE == "softmax":
        x = tl.where((columns < D)[None, :], x, -float("inf"))
        x = exp(x - tl.max(x, 1)[:, None])
        x = x * (1.0 / tl.sum(x, 1))[:, None]
    return x


@triton.jit
def feature_backward(x, dy, paired, columns, D: tl.constexpr, FEATURE: tl.constexpr):
    """The gradient of `feature`'s input, from that of the result, or, for softmax, from result · gradient, `paired`:
    what decays a key or query divides its gradient, so that the product needs no decay."""
    if FEATURE == "softmax":
        dx = paired - feature(x, columns, D, FEATURE) * tl.sum(paired, 1)[:, None]
    else:
        dx = dy
    return dx


@triton.jit
def log_of_one_and(x):
    """log(1 + x) of 0 ≤ x ≤ 1, to 2e-7 of itself, also where 1 + x rounds to 1: x times a polynomial (least squares at
    Chebyshev points), in a third of the instructions of `tl.log`."""
    y = 0.005253457796951799 * x - 0.029588507392940357
    y = y * x + 0.07836166801955272
    y = y * x - 0.13674769705687365
    y = y * x + 0.19111431080712105
    y = y * x - 0.24844369892523777
    y = y * x + 0.3331927134251262
    y = y * x - 0.4999950151678805
    return (y * x + 0.9999999705406566) * x


@triton.jit
def log_sigmoid(x):
    """log σ(x), without overflow."""
    return tl.minimum(x, 0.0) - log_of_one_and(exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """σ(x), without overflow."""
    return 1.0 / (1.0 + exp(tl.minimum(-x, 80.0)))


@triton.jit
def key_and_gate(k, inside, columns, decay, rate, lower, D: tl.constexpr, GATE: tl.constexpr, FEATURE: tl.constexpr):
    """The recurrence's key `[C, DP]` and log decay `[C, K]` from the key projection, both 0 past the sequence and the
    head; `rate` is one over the gate's temperature."""
    if GATE == "hgrn2":
        key = (1.0 - lower) * (1.0 - exp(log_sigmoid(k) * rate))
    else:
        key = feature(k, columns, D, FEATURE)
    if GATE == "gla":
        log_g = log_sigmoid(k) * rate
    elif GATE == "rwkv6":
        log_g = -exp(tl.minimum(k, 10.0)) * rate
    elif GATE == "hgrn2":
        if lower > 0.0:
            log_g = tl.log(1.0 - key)
        else:  # the key may round to 1
            log_g = log_sigmoid(k) * rate
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
    inside = inside[:, None]
    if log_g.shape[1] > D:  # zeros past the head would make a decay whose inverse may overflow
        inside = inside & (columns < D)[None, :]
    return tl.where(inside, key, 0.0), tl.where(inside, log_g, 0.0)


@triton.jit
def key_and_gate_backward(
    k, dkey, paired, dlog_g, columns, rate, lower, D: tl.constexpr, GATE: tl.constexpr, FEATURE: tl.constexpr
):
    """The gradient of the key projection; `paired` is key · dkey, as in `feature_backward`. That of a log decay that is
    GONE is none, whatever rounding has left in a sum. (So low, at temperatures of 1 and more, log σ(x) is x.)"""
    if GATE == "gla":
        slope = tl.where(k * rate > GONE, sigmoid(-k) * rate, 0.0)
        dk = feature_backward(k, dkey, paired, columns, D, FEATURE) + dlog_g * slope
    elif GATE == "rwkv6":
        log_g = -exp(tl.minimum(k, 10.0)) * rate  # its own slope
        slope = tl.where((k <= 10.0) & (log_g > GONE), log_g, 0.0)
        dk = feature_backward(k, dkey, paired, columns, D, FEATURE) + dlog_g * slope
    elif GATE == "hgrn2":
        slope, kept = sigmoid(-k) * rate, (1.0 - lower) * exp(log_sigmoid(k) * rate)
        dlog_g = tl.where(k * rate > GONE, dlog_g, 0.0)
        if lower > 0.0:
            dlog_g *= kept / (lower + kept)
        dk = (dlog_g - dkey * kept) * slope
    elif GATE == "lightning":
        dk = feature_backward(k, dkey, paired, columns, D, FEATURE)
    else:
        pooled = tl.sum(k, 1, keep_dims=True) / D
        if GATE == "mlstm":
            dpooled = dlog_g * tl.where(pooled * rate > GONE, sigmoid(-pooled) * rate, 0.0)
        else:  # mamba2
            step = -log_sigmoid(-pooled)
            dstep = tl.where(step > 0.0, tl.sum(paired, 1, keep_dims=True) / step, 0.0)
            dstep -= tl.where(step * rate < -GONE, dlog_g * rate, 0.0)
            dpooled = dstep * sigmoid(pooled)
            dkey = dkey * step
        dk = feature_backward(k, dkey, paired, columns, D, FEATURE) + dpooled / D
    return dk


# --- decay within a chunk ---


@triton.jit
def running_sum(x, DTYPE: tl.constexpr, SCALAR: tl.constexpr, REVERSE: tl.constexpr = False):
    """The sum of x `[rows, K]` up to and with each token, or from it on: of a tile as a product, since a scan that goes
    across warps has each of them add up what all others have."""
    if SCALAR:
        sums = tl.cumsum(tl.sum(x, 1), 0, reverse=REVERSE)[:, None]
    else:
        i, t = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[0])[None, :]
        sums = split_product(tl.where(t >= i if REVERSE else t <= i, 1.0, 0.0), x, DTYPE)
    return sums


@triton.jit
def scan(x, SCALAR: tl.constexpr):
    """The sum of x `[rows, K]` up to and with each row, in a program of one warp, which needs no memory for it."""
    if SCALAR:  # Triton cannot scan a tile of width 1
        sums = tl.cumsum(tl.sum(x, 1), 0)[:, None]
    else:
        sums = tl.cumsum(x, 0)
    return sums


@triton.jit
def log_decay_after(
    k, rows, columns, T, fixed, rate, lower, STRIDE: tl.constexpr, D: tl.constexpr, GATE: tl.constexpr,
    FEATURE: tl.constexpr,
):  # fmt: skip
    """Of each token the log decay of the next one in its chunk `[rows, K]`: summed up from the chunk's end, those after
    each token. (Large sums are not subtracted: one -1e4 would swallow its neighbours.)"""
    later = rows + 1
    raw = load_tile(k, later, columns, T, STRIDE, D).to(tl.float32)
    inside = (later < T) & (later % CHUNK != 0)
    return key_and_gate(raw, inside, columns, fixed, rate, lower, D, GATE, FEATURE)[1]


@triton.jit
def load_total(totals, pair, chunks, chunk, columns, D: tl.constexpr):
    """The log decay of a chunk `[DP]`, 0 past the head."""
    return tl.load(totals + (pair * chunks + chunk) * D + columns, mask=columns < D, other=0.0)


@triton.jit
def state_factors(total):
    """Two factors `[DP]` from a chunk's log decay: the state after it is after · (whole · state before + near keysᵀ
    values)."""
    mild = tl.min(total) > LIMIT
    return exp(tl.where(mild, 0.0, total)), exp(tl.where(mild, total, 0.0))
