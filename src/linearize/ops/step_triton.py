"""The kernel of a decoding step: RoPE, window, sinks, feature map, gate, state, readout and mixing in one.

A program has one key/value head of one sequence, with all its query heads, and BV of the value channels (all of them
where the readout needs their root mean square, or the recurrence is behind the window): it reads the whole window's
keys, and its own columns of the values and of the state, which it updates in place. What it reads at the new token's
places among window and sinks it makes nothing of where another program may have written them already.

The group's queries are rows of one tile, the key the row after them, so that what they are multiplied with passes once
through matrix products: with keys and values as these are stored, probabilities rounded to their dtype, and with the
state as it was before the step. Behind the window, that row is the key of the token whose place the new one takes: as
the window has it, queries too being rotated, or turned back to what it was before RoPE. With a the decay, k the key and
u what is written, S = a S' + k uᵀ is read as q S = (a q) S' + (q · k) u, and nothing waits for the new state.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.features import EPSILON
from linearize.ops.dispatch import can_overlap
from linearize.ops.liger import DELTA, Rope, Settings
from linearize.ops.liger_triton import exp, feature, key_and_gate, log_sigmoid, partner_of, product, sigmoid
from linearize.ops.step import NOTHING, Beyond, Clock, Held, keys_of, reads_in_fp16

SMALLEST = 16  # side of a matrix product
LEAST = tl.constexpr(EPSILON)  # of the mean square that products divide by
TURNED_BACK = tl.constexpr(2)  # for a recurrence behind the window; 1 where it reads keys as the window has them
WIDEST = 128  # ranks of learned maps that one product has
MANY = 192  # sequences times key/value heads from which on `step_many_triton` is the faster
LARGEST = 128, 256, 31, 64  # channels, keys, query heads of a group and sinks that its two
# kernels take in 16 bits: both fit, or none runs


@triton.jit
def load_angles(cos, sin, start, columns, R: tl.constexpr):
    """Cosine, and sine with the sign that rotate-half gives it; 1 and 0 past R."""
    c = tl.load(cos + start + columns, mask=columns < R, other=1.0).to(tl.float32)
    s = tl.load(sin + start + columns, mask=columns < R, other=0.0).to(tl.float32)
    return c, tl.where(columns < R // 2, -s, s)


@triton.jit
def rotated(x, other, c, s, held):
    """A tile after RoPE, from itself, the channels that each is rotated with, and `load_angles`; 0 where nothing is
    `held`, as before: without a mask Triton rotates all of the tile in every warp."""
    return tl.where(held, x.to(tl.float32) * c + other.to(tl.float32) * s, 0.0)


@triton.jit
def load_maps(down, up, head, columns, COUNT: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr):
    """The learned maps of COUNT heads from `head` on, side by side: `[DP, RP]` and `[RP, DP]`, 0 past them; zeros where
    maps are not learned and have no RANK."""
    first, second = 0.0, 0.0
    if RANK > 0:
        low = tl.arange(0, RP)
        wide, inside = columns < D, low < COUNT * RANK
        place = (low // RANK * D + columns[:, None]) * RANK + low % RANK
        first = tl.load(down + head * D * RANK + place, mask=wide[:, None] & inside, other=0.0)
        place = low[:, None] * D + columns
        second = tl.load(up + head * RANK * D + place, mask=inside[:, None] & wide, other=0.0)
    return first, second


@triton.jit
def add_mapped(result, x, owner, first, second, RANK: tl.constexpr):
    """`result` plus, of each row of x, what the map makes of it that is the `owner`-th of those side by side. One
    product has the maps of all; what it makes of a row by those of others is left out."""
    low = tl.arange(0, first.shape[1])
    between = tl.where(owner[:, None] == low // RANK, product(x, first, x.dtype), 0.0)
    return result + product(between, second, x.dtype)


@triton.jit
def products_of(x, D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """As `features.products`: K numbers of each row's D, side by side, 0 past them."""
    x = x / tl.sqrt(tl.sum(x * x, 1) / D + LEAST)[:, None]
    places = tl.arange(0, KP)
    channel, moved = places % D, (places % D - places // D + K) % D  # + K: nothing is below 0
    own = tl.gather(x, tl.broadcast_to(channel[None, :], (x.shape[0], KP)), 1)
    other = tl.gather(x, tl.broadcast_to(moved[None, :], (x.shape[0], KP)), 1)
    return tl.where(places < K, own * tl.where(places < D, 1.0, other), 0.0)


@triton.jit
def of_length_one(x):
    """Rows of x divided by their length; 0 stays 0."""
    return x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)[:, None]


@triton.jit
def one_row(x, rows, row):
    """Row `row` of a tile."""
    return tl.sum(tl.where((rows == row)[:, None], x, 0.0), 0)


@triton.jit
def weights_of(mixing, logits, heads, inside, LOGITS: tl.constexpr):
    """What the recurrence weighs in the mixing of these heads."""
    w = tl.load(mixing + heads, mask=inside, other=0.0).to(tl.float32)
    if LOGITS:
        w = sigmoid(w + tl.load(logits + heads, mask=inside, other=0.0).to(tl.float32))
    return w


@triton.jit
def load_floor(floor, heads, inside, FLOOR: tl.constexpr):
    """What is added to these heads' mean squares, 0 without."""
    least = 0.0  # loaded with all else: where it is used, threads would wait for it
    if FLOOR:
        least = tl.exp(2.0 * tl.load(floor + heads, mask=inside, other=0.0).to(tl.float32))
    return least


@triton.jit
def read_out(
    x, heads, columns, inside, opening, low, least, epsilon,
    D: tl.constexpr, RMS: tl.constexpr, OPENING: tl.constexpr,
):  # fmt: skip
    """What a group's heads have read, a row each, after the readout; `least` as `load_floor`."""
    if RMS:
        x = x / tl.sqrt(tl.sum(x * x, 1) / D + epsilon + least)[:, None]
    if OPENING > 0:
        ranks = tl.arange(0, OPENING)
        place = (heads[:, None] * D + columns)[:, :, None] * OPENING + ranks
        opens = tl.load(opening + place, mask=inside[:, :, None], other=0.0)
        for_opening = tl.load(low + ranks).to(tl.float32)
        x *= 2.0 * sigmoid(tl.sum(opens.to(tl.float32) * for_opening, 2))
    return x


@triton.jit
def step_kernel(
    heads, stride, cos, sin, rope_stride, sink_cos, sink_sin, sink_rope_stride, back_cos, back_sin, back_rope_stride,
    mixing, decay, time, real, valid, sink_time, keys, values, ring_valid, late_gates, state, output,
    down_q, up_q, down_k, up_k, gate, gate_stride, logits, logits_stride, low, low_stride, opening, floor,
    KV, scale, rate, lower, strength, epsilon,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BV: tl.constexpr, R: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, SINKS: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    GATE: tl.constexpr, FEATURE: tl.constexpr, ERASE: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
    RP1: tl.constexpr, AT_ONCE: tl.constexpr, EARLY: tl.constexpr, GATES: tl.constexpr, LOGITS: tl.constexpr,
    RMS: tl.constexpr, FLOOR: tl.constexpr, OPENING: tl.constexpr, BEHIND: tl.constexpr, MOST: tl.constexpr,
    READ: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token of one key/value head; see the module and `ops.step`."""
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = pair // KV, pair % KV
    columns, mine = tl.arange(0, DP), part * BV + tl.arange(0, BV)
    wide, narrow = columns < D, mine < D
    partner = partner_of(columns, R)
    t, before, fresh = tl.load(time), tl.load(real + b), tl.load(valid + b).to(tl.int32)
    kept_type = keys.dtype.element_ty
    own_keys, own_values = keys + pair * (M + W) * D, values + pair * (M + W) * D

    # what was there before this step, so that no kernel need have ended for it; all loads come before the first
    # product, since none begins while a program's threads wait for each other
    slot = (t % W).to(tl.int32)
    places = tl.arange(0, WP)
    here = (places < W)[:, None]
    window_k = tl.load(own_keys + (M + places[:, None]) * D + columns, mask=here & wide, other=0.0)
    window_v = tl.load(own_values + (M + places[:, None]) * D + mine, mask=here & narrow, other=0.0)
    seen = tl.load(ring_valid + b * W + places, mask=places < W, other=0) != 0
    if GATE != "none":
        features = tl.arange(0, KP)  # rows of the state; K = D but of products
        own_state = state + pair * K * D + (features[:, None] * D + mine)
        within = (features < K)[:, None] & narrow
        memory = tl.load(own_state, mask=within, other=0.0)
        if EARLY:  # else they would take too much of the memory that a program's threads share
            first, second = load_maps(down_q, up_q, h * G, columns, AT_ONCE, D, RANK, RP)
            first_k, second_k = load_maps(down_k, up_k, h, columns, 1, D, RANK, RP1)
        if BEHIND:
            leaving_k = own_keys + (M + slot) * D
            own_late = late_gates + ((b * W + slot) * KV + h) * GATES
            late_decay, late_write = tl.load(own_late).to(tl.float32), tl.load(own_late + GATES - 1).to(tl.float32)
            leaves = (late_write == late_write).to(tl.int32)  # 1, or 0 where no token is taken in
            late_k = tl.load(leaving_k + columns, mask=columns < D * leaves, other=0.0).to(tl.float32)
            if BEHIND == TURNED_BACK:
                late_other = tl.load(leaving_k + partner, mask=columns < D * leaves, other=0.0).to(tl.float32)
            late_v = tl.load(own_values + (M + slot) * D + mine, mask=mine < D * leaves, other=0.0).to(tl.float32)
    if SINKS > 0:
        sinks = tl.arange(0, MP)
        there = sinks < M
        gone = tl.load(sink_time + b * M + sinks, mask=sinks < SINKS, other=t) <= t - W
        sink_v = tl.load(own_values + sinks[:, None] * D + mine, mask=there[:, None] & narrow, other=0.0)
        sink_k = tl.load(own_keys + sinks * D + columns[:, None], mask=there & wide[:, None], other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    # the group's queries and, in the row after them, the key
    rows = tl.arange(0, ROWS)
    token = heads + b * stride
    from_head = tl.where(rows < G, h.to(tl.int32) * G + rows, KV * G + h.to(tl.int32))[:, None] * D
    held = (rows <= G)[:, None] & wide
    own_k, own_v = token + (KV * G + h) * D, token + (KV * G + KV + h) * D
    new_k, new_v = tl.load(own_k + columns, mask=wide, other=0.0), tl.load(own_v + mine, mask=narrow, other=0.0)
    if R > 0:
        other = tl.load(token + (from_head + partner), mask=held, other=0.0)
        other_k = tl.load(own_k + partner, mask=wide, other=0.0)
        c, s = load_angles(cos, sin, b * rope_stride, columns, R)
        if SINKS > 0:
            sink_c, sink_s = load_angles(sink_cos, sink_sin, b * sink_rope_stride, columns, R)
        if BEHIND == TURNED_BACK:
            back_c, back_s = load_angles(back_cos, back_sin, b * back_rope_stride, columns, R)
            late_k = (late_k * back_c - late_other * back_s) / (back_c * back_c + back_s * back_s)
    query_heads = h.to(tl.int32) * G + rows
    if GATE != "none":
        w = weights_of(mixing, logits + b * logits_stride, query_heads, rows < G, LOGITS)
        least = load_floor(floor, query_heads, rows < G, FLOOR)
        if GATES > 0:
            given = gate + b * gate_stride + h * GATES
            for_decay, for_write = tl.load(given).to(tl.float32), tl.load(given + GATES - 1).to(tl.float32)
    x = tl.load(token + (from_head + columns), mask=held, other=0.0)  # last: threads then wait for each other

    # the window, in which the new token takes its place
    near, far, turned = x, x, new_k
    if R > 0:
        near = rotated(x, other, c, s, held).to(kept_type)
        turned = (new_k.to(tl.float32) * c + other_k.to(tl.float32) * s).to(kept_type)
        if SINKS > 0:
            far = rotated(x, other, sink_c, sink_s, held).to(kept_type)
    window_k = tl.where((places == slot)[:, None], turned, window_k)
    window_v = tl.where((places == slot)[:, None], new_v, window_v)
    seen = (seen | (places == slot)) & (places < W)
    score = tl.where(seen, product(near, tl.trans(window_k), kept_type) * scale, -float("inf"))
    highest = tl.max(score, 1)
    if SINKS > 0:
        sink_score = tl.where(gone, product(far, sink_k, kept_type) * scale, -float("inf"))
        highest = tl.maximum(highest, tl.max(sink_score, 1))
    weight = exp(score - highest[:, None])
    result = product(weight, window_v, kept_type)
    total = product(weight, tl.full((WP, BV), 1.0, kept_type), kept_type)  # no sum for which threads wait
    if SINKS > 0:
        sink_weight = exp(sink_score - highest[:, None])
        result += product(sink_weight, sink_v, kept_type)
        total += product(sink_weight, tl.full((MP, BV), 1.0, kept_type), kept_type)
    result = result / total

    # the recurrence
    new_k, new_v = new_k.to(tl.float32), new_v.to(tl.float32)
    if GATE != "none":
        taken_v, taken = new_v, fresh != 0
        if BEHIND:
            asked = x if BEHIND == TURNED_BACK else near
            x = tl.where((rows == G)[:, None], late_k[None, :], asked).to(x.dtype)
            taken_v, taken = late_v, leaves != 0
        query = x.to(tl.float32)
        if RANK > 0:
            if not EARLY:
                first, second = load_maps(down_q, up_q, h * G, columns, AT_ONCE, D, RANK, RP)
                first_k, second_k = load_maps(down_k, up_k, h, columns, 1, D, RANK, RP1)
            query = add_mapped(query, x, rows, first, second, RANK)
            for begin in tl.static_range(AT_ONCE, G, AT_ONCE):
                first, second = load_maps(
                    down_q, up_q, h * G + begin, columns, AT_ONCE if begin + AT_ONCE <= G else G - begin, D, RANK, RP
                )
                query = add_mapped(query, x, rows - begin, first, second, RANK)
            if ERASE:
                query = add_mapped(query, x, rows - G, first_k, second_k, RANK)
            if FEATURE == "products":
                query = products_of(query, D, K, KP)
        else:
            query = feature(query, columns, D, FEATURE)
        if ERASE:
            if GATES == 0:
                for_decay = tl.sum(new_k, 0) / D
                for_write = for_decay
            if BEHIND:
                new_decay, new_write = for_decay, for_write
                for_decay, for_write = late_decay, late_write
            query = of_length_one(query)
            key = one_row(query, rows, G)
            recurrent = product(query, memory, READ)
            kept = 1.0
            if GATE == "gated_deltanet":
                kept = tl.exp(tl.where(taken, log_sigmoid(for_decay) * rate, 0.0))
                recurrent *= kept
            beta = tl.where(taken, strength * sigmoid(for_write), 0.0)
            written = beta * (taken_v - one_row(recurrent, rows, G))
            memory = memory.to(tl.float32) * kept
        else:
            inside = (tl.zeros((1,), tl.int32) + fresh) != 0
            fixed = 0.0
            if GATE == "lightning":
                fixed = tl.load(decay + h)
            key, log_g = key_and_gate(new_k[None, :], inside, columns, fixed, rate, lower, D, GATE, FEATURE)
            kept, key, written = tl.exp(log_g), tl.sum(key, 0), taken_v
            recurrent = product(query * kept, memory, READ)
            memory = memory.to(tl.float32) * tl.trans(kept)
        recurrent += tl.sum(query * key[None, :], 1)[:, None] * written[None, :]
        memory += key[:, None] * written[None, :]
        if MOST > 0:
            memory = tl.clamp(memory, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(own_state, memory.to(state.dtype.element_ty), mask=within)
        recurrent = read_out(
            recurrent, query_heads, mine, (rows < G)[:, None] & narrow, opening, low + b * low_stride, least, epsilon,
            D, RMS, OPENING,
        )  # fmt: skip
        result = w[:, None] * recurrent + (1.0 - w)[:, None] * result
    place = output + b * KV * G * D + (query_heads[:, None] * D + mine)
    tl.store(place, result.to(output.dtype.element_ty), mask=(rows < G)[:, None] & narrow)

    # what stays: values by columns, keys once
    is_sink = (before < M) & (fresh != 0)
    tl.store(own_values + (M + slot) * D + mine, new_v.to(kept_type), mask=narrow)
    if is_sink:
        tl.store(own_values + before * D + mine, new_v.to(kept_type), mask=narrow)
    if part == 0:
        tl.store(own_keys + (M + slot) * D + columns, turned, mask=wide)
        if is_sink:
            tl.store(own_keys + before * D + columns, turned, mask=wide)
        if h == 0:
            tl.store(ring_valid + b * W + slot, fresh.to(tl.uint8))
        if BEHIND:
            wanted = (fresh != 0) & (before >= SINKS)
            late_type = late_gates.dtype.element_ty
            tl.store(own_late, tl.where(wanted, new_decay, float("nan")).to(late_type))
            tl.store(own_late + GATES - 1, tl.where(wanted, new_write, float("nan")).to(late_type))


def program(pairs: int, K: int, D: int, whole: bool) -> tuple[int, int]:
    """Value channels and warps of a program: many channels, but for few heads as few as fill the GPU; all of them if it
    needs the `whole` head. Fewer than 32 channels would have all warps work out the same scores. Eight warps are the
    faster where large heads are few, four where a multiprocessor has several to work on, but they cannot hold a state
    of very many keys."""
    size = side(D)
    while not whole and size > 32 and (size > 64 or pairs * triton.cdiv(D, size) < 256):
        size //= 2
    return size, 4 if K <= 64 or (pairs >= 512 and K * size <= 2**14) else 8


def run(
    heads: Tensor,
    mixing: Tensor,
    settings: Settings,
    rope: Rope | None,
    sink_rope: Rope | None,
    clock: Clock,
    held: Held,
    decay: Tensor | None = None,
    beyond: Beyond = NOTHING,
    launch: tuple[int, int] | None = None,
) -> Tensor:
    """As `step.step`; `launch`, in place of what `program` says, is for tuning. The kernel directly ahead must write
    nothing of `clock` and `held`, which are read before it has ended."""
    heads = heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()
    (B, rows, D), KV, M = heads.shape, held.keys.shape[1], clock.sink_time.shape[1]
    H, state = rows - 2 * KV, held.state.dtype
    K = keys_of(settings, held, D)
    fits = heads.dtype.itemsize == 2 and all(x <= most for x, most in zip((D, K, H // KV, M), LARGEST, strict=True))
    if launch is None and B * KV >= MANY and fits:
        from linearize.ops.step_many_triton import run as run_many

        return run_many(heads, mixing, settings, rope, sink_rope, clock, held, decay, beyond)
    cos, sin = (mixing, mixing) if rope is None else rope  # an argument that nothing reads
    sink_cos, sink_sin = (cos, sin) if sink_rope is None else sink_rope
    back_cos, back_sin = (cos, sin) if beyond.leaving is None else beyond.leaving
    output, behind, late_gates = heads.new_empty(B, H, D), 0, mixing
    if settings.gate != "none" and held.late_gates is not None:
        behind, late_gates = 1 if beyond.leaving is None else TURNED_BACK.value, held.late_gates
    block, warps = launch or program(B * KV, K, D, beyond.epsilon is not None or behind > 0)
    assert behind == 0 or block >= D, "behind the window, a program has the whole head"
    rank, overlap = 0 if beyond.maps is None else beyond.maps[0].shape[-1], can_overlap(heads)
    at_once = min(H // KV, WIDEST // max(rank, 1))
    maps, *others = given(beyond, mixing)
    step_kernel[(B * KV, triton.cdiv(D, block))](
        heads, heads.stride(0),
        cos, sin, 0 if rope is None else cos.stride(0), sink_cos, sink_sin, 0 if rope is None else sink_cos.stride(0),
        back_cos, back_sin, 0 if rope is None else back_cos.stride(0),
        mixing, mixing if decay is None else decay, clock.time, clock.real, clock.valid, clock.sink_time,
        held.keys, held.values, held.valid, late_gates, held.state, output,
        *maps, *others,
        KV, settings.scale, 1.0 / settings.temperature, settings.lower, settings.strength, beyond.epsilon or 0.0,
        G=H // KV, ROWS=side(H // KV + 1), D=D, DP=side(D), K=K, KP=side(K),
        BV=block, R=0 if rope is None else cos.shape[-1],
        M=M, MP=side(M), SINKS=min(settings.sinks, M), W=settings.window, WP=side(settings.window),
        GATE=settings.gate, FEATURE=settings.feature_map, ERASE=settings.gate in DELTA,
        RANK=rank, RP=side(at_once * rank), RP1=side(rank), AT_ONCE=at_once, EARLY=D <= 64,
        GATES=0 if beyond.gate is None else beyond.gate.shape[-1], LOGITS=beyond.mixing is not None,
        RMS=beyond.epsilon is not None, FLOOR=beyond.floor is not None,
        OPENING=0 if beyond.opening is None else beyond.opening[1].shape[-1],
        BEHIND=behind, MOST=torch.finfo(torch.float16).max if state == torch.float16 else 0.0,
        READ=tl.float16 if reads_in_fp16(settings, heads, held) else tl.float32, OVERLAP=overlap, num_warps=warps,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return output


def side(length: int) -> int:
    """That of a matrix product's operand that has as much."""
    return max(SMALLEST, triton.next_power_of_2(length))


def given(beyond: Beyond, unread: Tensor) -> tuple[Any, ...]:
    """The kernel's arguments of what is `beyond`, its maps together; `unread` in place of what is not there."""
    gate, logits = (unread if x is None else x for x in (beyond.gate, beyond.mixing))
    low, opening = (unread, unread) if beyond.opening is None else beyond.opening
    floor = unread if beyond.floor is None else beyond.floor
    maps = (unread,) * 4 if beyond.maps is None else beyond.maps
    return maps, gate, gate.stride(0), logits, logits.stride(0), low, low.stride(0), opening, floor
