"""A decoding step of many sequences by two kernels, in place of the one of `step_triton`.

There a program does all of one head of one sequence, one thing after the other, and memory waits while it does. Where
sequences are many, others can wait for it: the first kernel makes what a head reads with and takes in, of a tile of
sequences at once, so that its maps are read once for all of them, and has windows take in their tokens; a program of
the second has one window, which it computes with, or a part of one state, which it reads and writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.ops.dispatch import can_overlap
from linearize.ops.liger import DELTA, Rope, Settings
from linearize.ops.liger_triton import exp, feature, key_and_gate, log_sigmoid, partner_of, product, sigmoid
from linearize.ops.step import NOTHING, Beyond, Clock, Held, keys_of, reads_in_fp16
from linearize.ops.step_triton import (
    TURNED_BACK,
    given,
    load_floor,
    of_length_one,
    one_row,
    products_of,
    read_out,
    side,
    weights_of,
)

VECTORS = ("gla", "hgrn2", "rwkv6")  # gates whose decay is by channel
TILE = 16  # sequences of a program of the first kernel
STATE = 64  # value channels of a program of the second


@triton.jit
def turned(x, other, cos, sin, place, inside, columns, R: tl.constexpr, BACK: tl.constexpr):
    """A tile after RoPE, or before it again, in its dtype; `other` are the channels that each is rotated with, `place`
    where the angles of a row begin."""
    known = inside[:, None] & (columns < R)
    c = tl.load(cos + place[:, None] + columns, mask=known, other=1.0).to(tl.float32)
    s = tl.load(sin + place[:, None] + columns, mask=known, other=0.0).to(tl.float32)
    s = tl.where(columns < R // 2, -s, s)
    y, z = x.to(tl.float32), other.to(tl.float32)
    y = (y * c - z * s) / (c * c + s * s) if BACK else y * c + z * s
    return y.to(x.dtype)


@triton.jit
def mapped(
    x, down, up, head, columns, D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, FEATURE: tl.constexpr,
    ERASE: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """A tile after this head's feature map, `[C, KP]` in fp32."""
    y, low, wide = x.to(tl.float32), tl.arange(0, RP), columns < D
    if RANK > 0:
        inside = low < RANK
        first = tl.load(down + (head * D + columns[:, None]) * RANK + low, mask=wide[:, None] & inside, other=0.0)
        second = tl.load(up + (head * RANK + low[:, None]) * D + columns, mask=inside[:, None] & wide, other=0.0)
        y += product(product(x, first, x.dtype), second, x.dtype)
        if FEATURE == "products":
            y = products_of(y, D, K, KP)
    else:
        y = feature(y, columns, D, FEATURE)
    return of_length_one(y) if ERASE else y


@triton.jit(do_not_specialize=["B"])
def inputs_kernel(
    heads, stride, cos, sin, rope_stride, sink_cos, sink_sin, sink_rope_stride, back_cos, back_sin, back_rope_stride,
    decay, time, real, valid, keys, values, ring_valid, late_gates, down_q, up_q, down_k, up_k, gate, gate_stride,
    near, far, reads, kept, writes, taken_values, arrived, B, KV, rate, lower, strength,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, R: tl.constexpr,
    M: tl.constexpr, SINKS: tl.constexpr, W: tl.constexpr, GATE: tl.constexpr, FEATURE: tl.constexpr,
    ERASE: tl.constexpr, VECTOR: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, GATES: tl.constexpr,
    BEHIND: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of some sequences. Of a query head, what it meets the window and the sinks with, `near` and `far`
    `[B, H, D]`, and what it reads the state with, a row of `reads` `[B, KV, G + 1, K]`. Of a key/value head, the
    last of those rows, its key; how much of a state is `kept`, `[B, KV, K or 1]`, and of what is written, `writes`
    `[B, KV]`, and the value, `[B, KV, D]`; none of its programs has `arrived` yet, `[B, KV]`. Then the window, its
    sinks and the gates that wait take in the token."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head, rows = tl.program_id(0), (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there, columns, features = rows < B, tl.arange(0, DP), tl.arange(0, KP)
    held, within = there[:, None] & (columns < D), there[:, None] & (features < K)
    own, partner = heads + rows[:, None] * stride, partner_of(columns, R)
    x = tl.load(own + head * D + columns, mask=held, other=0.0)
    here = x
    if R > 0:
        other = tl.load(own + head * D + partner, mask=held, other=0.0)
        here = turned(x, other, cos, sin, rows * rope_stride, there, columns, R, False)
    if head < KV * G:
        place = ((rows * KV * G + head) * D)[:, None] + columns
        tl.store(near + place, here, mask=held)
        if R > 0 and SINKS > 0:
            x_far = turned(x, other, sink_cos, sink_sin, rows * sink_rope_stride, there, columns, R, False)
            tl.store(far + place, x_far, mask=held)
        if GATE != "none":
            asks = here if BEHIND == 1 else x
            query = mapped(asks, down_q, up_q, head, columns, D, K, KP, FEATURE, ERASE, RANK, RP)
            place = ((rows * KV + head // G) * (G + 1) + head % G) * K
            tl.store(reads + place[:, None] + features, query, mask=within)
    else:
        h = head - KV * G
        pair, slot = rows * KV + h, tl.load(time) % W
        v = tl.load(own + (KV * (G + 1) + h) * D + columns, mask=held, other=0.0)
        fresh, before = tl.load(valid + rows, mask=there, other=0) != 0, tl.load(real + rows, mask=there, other=0)
        ring = (pair * (M + W) + M + slot)[:, None] * D + columns
        if GATE != "none":
            taken, key_input, value = fresh, x, v
            if GATES > 0:
                given = gate + rows * gate_stride + h * GATES
                for_decay = tl.load(given, mask=there, other=0.0).to(tl.float32)
                for_write = tl.load(given + GATES - 1, mask=there, other=0.0).to(tl.float32)
            elif ERASE:
                for_decay = tl.sum(x.to(tl.float32), 1) / D
                for_write = for_decay
            if BEHIND:
                late = late_gates + ((rows * W + slot) * KV + h) * GATES
                new_decay, new_write = for_decay, for_write
                for_decay = tl.load(late, mask=there, other=0.0).to(tl.float32)
                for_write = tl.load(late + GATES - 1, mask=there, other=0.0).to(tl.float32)
                taken = there & (for_write == for_write)
                leaves = taken[:, None] & (columns < D)
                value = tl.load(values + ring, mask=leaves, other=0.0)
                key_input = tl.load(keys + ring, mask=leaves, other=0.0)
                if BEHIND == TURNED_BACK:
                    other = tl.load(keys + (ring - columns + partner), mask=leaves, other=0.0)
                    back_rows = rows * back_rope_stride
                    key_input = turned(key_input, other, back_cos, back_sin, back_rows, there, columns, R, True)
                tl.debug_barrier()  # all threads have read what goes now
                wanted = fresh & (before >= SINKS)
                late_type = late_gates.dtype.element_ty
                tl.store(late, tl.where(wanted, new_decay, float("nan")).to(late_type), mask=there)
                tl.store(late + GATES - 1, tl.where(wanted, new_write, float("nan")).to(late_type), mask=there)
            if ERASE:
                key = mapped(key_input, down_k, up_k, h, columns, D, K, KP, FEATURE, ERASE, RANK, RP)
                log_g = tl.zeros((ROWS, 1), tl.float32)
                if GATE == "gated_deltanet":
                    log_g += tl.where(taken, log_sigmoid(for_decay) * rate, 0.0)[:, None]
                tl.store(writes + pair, tl.where(taken, strength * sigmoid(for_write), 0.0), mask=there)
            else:
                fixed = 0.0
                if GATE == "lightning":
                    fixed = tl.load(decay + h)
                key_input = key_input.to(tl.float32)
                key, log_g = key_and_gate(key_input, taken, columns, fixed, rate, lower, D, GATE, FEATURE)
            tl.store(reads + ((pair * (G + 1) + G) * K)[:, None] + features, key, mask=within)
            if VECTOR:
                tl.store(kept + (pair * K)[:, None] + features, tl.exp(log_g), mask=within)
            else:
                tl.store(kept + pair, tl.exp(tl.sum(log_g, 1)), mask=there)
            tl.store(taken_values + (pair * D)[:, None] + columns, value, mask=held)
            tl.store(arrived + pair, 0, mask=there)
        tl.store(keys + ring, here, mask=held)
        tl.store(values + ring, v, mask=held)
        is_sink = held & (fresh & (before < M))[:, None]
        sink = (pair * (M + W) + before)[:, None] * D + columns
        tl.store(keys + sink, here, mask=is_sink)
        tl.store(values + sink, v, mask=is_sink)
        if h == 0:
            tl.store(ring_valid + rows * W + slot, fresh.to(tl.uint8), mask=there)


@triton.jit
def read_state(
    reads, kept, writes, taken_values, state, remembered, pair, part,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    ERASE: tl.constexpr, VECTOR: tl.constexpr, MOST: tl.constexpr, READ: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BV columns of one state: what the group reads in it, `remembered`, and what it becomes, in place."""
    mine, rows, features = part * BV + tl.arange(0, BV), tl.arange(0, ROWS), tl.arange(0, KP)
    narrow, within = mine < D, features < K
    own = state + pair * K * D + (features[:, None] * D + mine)
    before = tl.load(own, mask=within[:, None] & narrow, other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = reads + pair * (G + 1) * K
    key = tl.load(place + G * K + features, mask=within, other=0.0)
    written = tl.load(taken_values + pair * D + mine, mask=narrow, other=0.0).to(tl.float32)
    decay = tl.load(kept + pair * K + features, mask=within, other=0.0) if VECTOR else tl.load(kept + pair)
    beta = tl.load(writes + pair) if ERASE else 1.0
    query = tl.load(place + rows[:, None] * K + features, mask=(rows <= G)[:, None] & within, other=0.0)
    read = product(query * decay, before, READ)
    if ERASE:
        written = beta * (written - one_row(read, rows, G))
    read += tl.sum(query * key[None, :], 1)[:, None] * written[None, :]
    after = before.to(tl.float32) * (decay[:, None] if VECTOR else decay) + key[:, None] * written[None, :]
    if MOST > 0:
        after = tl.clamp(after, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(own, after.to(state.dtype.element_ty), mask=within[:, None] & narrow)
    tl.store(remembered + (pair * G + rows)[:, None] * D + mine, read, mask=(rows < G)[:, None] & narrow)


@triton.jit
def read_window(
    near, far, time, sink_time, keys, values, ring_valid, output, pair, KV, scale,
    G: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    SINKS: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """What the group reads in its window and sinks. Its heads are columns of tiles, of which products need eight (and
    sixteen rows). Tiles are loaded first: what is in one dimension changes its layout, for which threads wait."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    heads, channels, places, sinks = tl.arange(0, COLUMNS), tl.arange(0, DP), tl.arange(0, WP), tl.arange(0, MP)
    wide, inside = channels < D, places < W
    kept_type = keys.dtype.element_ty
    spot, own = (pair * G + heads) * D + channels[:, None], (heads < G) & wide[:, None]
    ring, first = pair * (M + W) * D + (M + places) * D, pair * (M + W) * D + sinks * D
    window_k = tl.load(keys + (ring[:, None] + channels), mask=inside[:, None] & wide, other=0.0)
    window_v = tl.load(values + (ring + channels[:, None]), mask=inside & wide[:, None], other=0.0)
    if SINKS > 0:
        sink_k = tl.load(keys + (first[:, None] + channels), mask=(sinks < M)[:, None] & wide, other=0.0)
        sink_v = tl.load(values + (first + channels[:, None]), mask=(sinks < M) & wide[:, None], other=0.0)
        far_query = tl.load(far + spot, mask=own, other=0.0)
    query = tl.load(near + spot, mask=own, other=0.0)
    t, b = tl.load(time), pair // KV
    seen = tl.load(ring_valid + b * W + places, mask=inside, other=0) != 0
    seen = (seen | (places == (t % W).to(tl.int32))) & inside  # padding sees itself, so that it is a number
    score = tl.where(seen[:, None], product(window_k, query, kept_type) * scale, -float("inf"))
    highest = tl.max(score, 0)
    if SINKS > 0:
        gone = tl.load(sink_time + b * M + sinks, mask=sinks < SINKS, other=t) <= t - W
        sink_score = tl.where(gone[:, None], product(sink_k, far_query, kept_type) * scale, -float("inf"))
        highest = tl.maximum(highest, tl.max(sink_score, 0))
    weight = exp(score - highest)
    if DP > 64:  # else they would lie in shared memory beside the keys, where fewer programs fit
        window_v = tl.where(seen, window_v, 0.0)
    result = product(window_v, weight, kept_type)
    total = product(tl.full((DP, WP), 1.0, kept_type), weight, kept_type)  # no sum for which threads wait
    if SINKS > 0:
        sink_weight = exp(sink_score - highest)
        result += product(sink_v, sink_weight, kept_type)
        total += product(tl.full((DP, MP), 1.0, kept_type), sink_weight, kept_type)
    tl.store(output + spot, (result / total).to(output.dtype.element_ty), mask=own)


@triton.jit
def attention_kernel(
    near, far, reads, kept, writes, taken_values, remembered, attended, arrived, mixing, logits, logits_stride,
    low, low_stride, opening, floor, time, sink_time, keys, values, ring_valid, state, output, KV, scale, epsilon,
    G: tl.constexpr, GP: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, SINKS: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, PARTS: tl.constexpr, ERASE: tl.constexpr, VECTOR: tl.constexpr,
    LOGITS: tl.constexpr, RMS: tl.constexpr, FLOOR: tl.constexpr, OPENING: tl.constexpr, MOST: tl.constexpr,
    READ: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One of the PARTS of a key/value head: the window, or some columns of the state. While those of windows compute,
    those of states move bytes. Who comes last mixes what the window gave, `attended`, and the state, `remembered`,
    both `[B, H, D]`; `arrived` `[B, KV]` counts."""
    part, pair = tl.program_id(0) % PARTS, (tl.program_id(0) // PARTS).to(tl.int64)
    if part == 0:
        read_window(
            near, far, time, sink_time, keys, values, ring_valid, output if PARTS == 1 else attended, pair, KV, scale,
            G, COLUMNS, D, DP, M, MP, SINKS, W, WP, OVERLAP,
        )  # fmt: skip
    else:
        read_state(
            reads, kept, writes, taken_values, state, remembered, pair, part - 1,
            G, ROWS, D, K, KP, BV, ERASE, VECTOR, MOST, READ, OVERLAP,
        )  # fmt: skip
    if PARTS > 1:
        tl.debug_barrier()  # all threads have stored what they know
        if tl.atomic_add(arrived + pair, 1) == PARTS - 1:
            group, columns = tl.arange(0, GP), tl.arange(0, DP)
            heads, b = (pair % KV).to(tl.int32) * G + group, pair // KV
            spot, own = (pair * G + group)[:, None] * D + columns, (group < G)[:, None] & (columns < D)
            recurrent = tl.load(remembered + spot, mask=own, other=0.0)
            result = tl.load(attended + spot, mask=own, other=0.0)
            w = weights_of(mixing, logits + b * logits_stride, heads, group < G, LOGITS)
            least = load_floor(floor, heads, group < G, FLOOR)
            recurrent = read_out(
                recurrent, heads, columns, own, opening, low + b * low_stride, least, epsilon, D, RMS, OPENING
            )
            result = w[:, None] * recurrent + (1.0 - w)[:, None] * result
            tl.store(output + spot, result.to(output.dtype.element_ty), mask=own)


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
) -> Tensor:
    """As `step_triton.run`; heads are contiguous but for their rows."""
    (B, total, D), KV, M = heads.shape, held.keys.shape[1], clock.sink_time.shape[1]
    recurs, erase, vector = settings.gate != "none", settings.gate in DELTA, settings.gate in VECTORS
    G, K = total // KV - 2, keys_of(settings, held, D)
    behind = 0
    if recurs and held.late_gates is not None:
        behind = 1 if beyond.leaving is None else TURNED_BACK.value
    output, near, far = (heads.new_empty(B, KV * G, D) for _ in range(3))
    reads, kept, writes, remembered, attended = (
        torch.empty(shape, dtype=torch.float32, device=heads.device)
        for shape in ((B, KV, G + 1, K), (B, KV, K if vector else 1), (B, KV), output.shape, output.shape)
    )
    taken, arrived = heads.new_empty(B, KV, D), torch.empty(B, KV, dtype=torch.int32, device=heads.device)
    turn = (mixing, mixing) if rope is None else rope  # without one, arguments that nothing reads
    angles = [turn if x is None else x for x in (rope, sink_rope, beyond.leaving)]
    strides = [0 if rope is None else cos.stride(0) for cos, _ in angles]
    far = near if rope is None else far
    maps, gate, gate_stride, *others = given(beyond, mixing)
    rank, overlap = 0 if beyond.maps is None else beyond.maps[0].shape[-1], can_overlap(heads)
    shared = {
        "G": G, "D": D, "DP": side(D), "K": K, "KP": side(K), "M": M, "SINKS": min(settings.sinks, M),
        "W": settings.window, "ERASE": erase, "VECTOR": vector, "OVERLAP": overlap, "num_warps": 4,
        **({"launch_pdl": True} if overlap else {}),
    }  # fmt: skip
    inputs_kernel[(total - KV, triton.cdiv(B, TILE))](
        heads, heads.stride(0), *(x for pair, n in zip(angles, strides, strict=True) for x in (*pair, n)),
        mixing if decay is None else decay, clock.time, clock.real, clock.valid,
        held.keys, held.values, held.valid, mixing if held.late_gates is None else held.late_gates,
        *maps, gate, gate_stride, near, far, reads, kept, writes, taken, arrived,
        B, KV, 1.0 / settings.temperature, settings.lower, settings.strength,
        R=0 if rope is None else rope[0].shape[-1], GATE=settings.gate, FEATURE=settings.feature_map,
        RANK=rank, RP=side(rank), GATES=0 if beyond.gate is None else beyond.gate.shape[-1], BEHIND=behind, ROWS=TILE,
        **shared,
    )  # fmt: skip
    block, most = min(side(D), STATE), torch.finfo(torch.float16).max
    parts = 1 + triton.cdiv(D, block) * recurs
    attention_kernel[(B * KV * parts,)](
        near, far, reads, kept, writes, taken, remembered, attended, arrived, mixing, *others,
        clock.time, clock.sink_time, held.keys, held.values, held.valid, held.state, output,
        KV, settings.scale, beyond.epsilon or 0.0,
        GP=triton.next_power_of_2(G), COLUMNS=max(8, triton.next_power_of_2(G)), ROWS=side(G + 1), BV=block,
        MP=side(M), WP=side(settings.window), PARTS=parts, LOGITS=beyond.mixing is not None,
        RMS=beyond.epsilon is not None, FLOOR=beyond.floor is not None,
        OPENING=0 if beyond.opening is None else beyond.opening[1].shape[-1],
        MOST=most if held.state.dtype == torch.float16 else 0.0,
        READ=tl.float16 if reads_in_fp16(settings, heads, held) else tl.float32, **shared,
    )  # fmt: skip
    return output
