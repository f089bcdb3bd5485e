"""The kernel of a decoding step: RoPE, window, sinks, feature map, gate, state, readout and mixing in one.

A program has one key/value head of one sequence, with all its query heads, and BV of the value channels (all of them
where the readout needs their root mean square): it reads the whole window's keys, and its own columns of the values and
of the state, which it updates in place. What it reads at the new token's places among window and sinks it makes
nothing of, since another program may have written them already.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.ops.dispatch import overlaps
from linearize.ops.liger import DELTA, Rope, Settings
from linearize.ops.liger_triton import feature, key_and_gate, log_sigmoid, partner_of, sigmoid
from linearize.ops.step import NOTHING, Beyond, Clock, Held


@triton.jit
def load_angles(cos, sin, start, columns, R: tl.constexpr):
    """Cosine, and sine with the sign that rotate-half gives it; 1 and 0 past R."""
    c = tl.load(cos + start + columns, mask=columns < R, other=1.0).to(tl.float32)
    s = tl.load(sin + start + columns, mask=columns < R, other=0.0).to(tl.float32)
    return c, tl.where(columns < R // 2, -s, s)


@triton.jit
def load_map(down, up, head, columns, D: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr):
    """A head's learned map `[DP, RP]` and `[RP, DP]`; zeros where maps are not learned and have no RANK."""
    first, second = 0.0, 0.0
    if RANK > 0:
        ranks = tl.arange(0, RP)
        inside = (columns < D)[:, None] & (ranks < RANK)[None, :]
        first = tl.load(down + (head * D + columns[:, None]) * RANK + ranks[None, :], mask=inside, other=0.0)
        inside = (ranks < RANK)[:, None] & (columns < D)[None, :]
        second = tl.load(up + (head * RANK + ranks[:, None]) * D + columns[None, :], mask=inside, other=0.0)
        first, second = first.to(tl.float32), second.to(tl.float32)
    return first, second


@triton.jit
def mapped(x, first, second, columns, D: tl.constexpr, FEATURE: tl.constexpr, RANK: tl.constexpr):
    """x `[1, DP]` after the feature map, or after the learned one, x + x first second."""
    if RANK > 0:
        low = tl.sum(tl.trans(x) * first, 0)
        x = x + tl.sum(low[:, None] * second, 0)[None, :]
    else:
        x = feature(x, columns, D, FEATURE)
    return x


@triton.jit
def load_query(q, head, columns, partner, D: tl.constexpr, R: tl.constexpr):
    """A head's query, and the channels that each is rotated with."""
    x = tl.load(q + head * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    other = x
    if R > 0:
        other = tl.load(q + head * D + partner, mask=columns < D, other=0.0).to(tl.float32)
    return x, other


@triton.jit
def of_length_one(x):
    """x `[1, DP]` divided by its length; 0 stays 0."""
    return x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)[:, None]


@triton.jit
def step_kernel(
    q, k, v, stride, cos, sin, rope_stride, sink_cos, sink_sin, sink_rope_stride,
    mixing, decay, time, real, valid, sink_time, keys, values, ring_valid, state, output,
    down_q, up_q, down_k, up_k, gate, gate_stride, logits, logits_stride, low, low_stride, opening,
    KV, scale, rate, lower, strength, epsilon,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, SINKS: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    GATE: tl.constexpr, FEATURE: tl.constexpr, ERASE: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
    GATES: tl.constexpr, LOGITS: tl.constexpr, RMS: tl.constexpr, OPENING: tl.constexpr, MOST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token of one key/value head; see the module and `ops.step`."""
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = pair // KV, pair % KV
    columns, mine = tl.arange(0, DP), part * BV + tl.arange(0, BV)
    wide, narrow = columns < D, mine < D
    partner = partner_of(columns, R)
    t, before, fresh = tl.load(time), tl.load(real + b), tl.load(valid + b).to(tl.int32)
    kept_type = keys.dtype.element_ty

    # what was there before this step, so that no kernel need have ended for it
    slot = (t % W).to(tl.int32)
    rows = tl.arange(0, WP)
    here = (rows < W)[:, None]
    ring = (pair * (M + W) + M + rows)[:, None] * D
    window_k = tl.load(keys + ring + columns[None, :], mask=here & wide[None, :], other=0.0).to(tl.float32)
    window_v = tl.load(values + ring + mine[None, :], mask=here & narrow[None, :], other=0.0).to(tl.float32)
    seen = tl.load(ring_valid + b * W + rows, mask=rows < W, other=0) != 0
    seen = (seen | (rows == slot)) & (rows < W)
    if SINKS > 0:
        sinks = tl.arange(0, MP)
        place = (pair * (M + W) + sinks)[:, None] * D
        there = (sinks < M)[:, None]
        sink_k = tl.load(keys + place + columns[None, :], mask=there & wide[None, :], other=0.0).to(tl.float32)
        sink_v = tl.load(values + place + mine[None, :], mask=there & narrow[None, :], other=0.0).to(tl.float32)
        gone = tl.load(sink_time + b * M + sinks, mask=sinks < SINKS, other=t) <= t - W
    if GATE != "none":
        cell = pair * D * D + columns[:, None] * D + mine[None, :]
        within = wide[:, None] & narrow[None, :]
        memory = tl.load(state + cell, mask=within, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    # the new token, which takes its place in the window
    new_k = tl.load(k + b * stride + h * D + columns, mask=wide, other=0.0).to(tl.float32)
    new_v = tl.load(v + b * stride + h * D + mine, mask=narrow, other=0.0).to(tl.float32)
    turned = new_k
    if R > 0:
        c, s = load_angles(cos, sin, b * rope_stride, columns, R)
        other = tl.load(k + b * stride + h * D + partner, mask=wide, other=0.0).to(tl.float32)
        turned = (new_k * c + other * s).to(kept_type).to(tl.float32)
        if SINKS > 0:
            sink_c, sink_s = load_angles(sink_cos, sink_sin, b * sink_rope_stride, columns, R)
    window_k = tl.where((rows == slot)[:, None], turned[None, :], window_k)
    window_v = tl.where((rows == slot)[:, None], new_v[None, :], window_v)

    # the first query; a load waits long, so what is read begins while something else is worked on
    x, other = load_query(q + b * stride, h * G, columns, partner, D, R)
    first, second = load_map(down_q, up_q, h * G, columns, D, RANK, RP)
    if OPENING > 0:
        ranks = tl.arange(0, OPENING)
        for_opening = tl.load(low + b * low_stride + ranks).to(tl.float32)

    # the recurrence
    if GATE != "none":
        if ERASE:
            key_first, key_second = load_map(down_k, up_k, h, columns, D, RANK, RP)
            if GATES > 0:
                given = gate + b * gate_stride + h * GATES
                for_decay, for_write = tl.load(given).to(tl.float32), tl.load(given + GATES - 1).to(tl.float32)
            else:
                for_decay = tl.sum(new_k, 0) / D
                for_write = for_decay
            key = of_length_one(mapped(new_k[None, :], key_first, key_second, columns, D, FEATURE, RANK))
            if GATE == "gated_deltanet":
                memory = memory * tl.exp(tl.where(fresh != 0, log_sigmoid(for_decay) * rate, 0.0))
            beta = tl.where(fresh != 0, strength * sigmoid(for_write), 0.0)
            written = beta * (new_v - tl.sum(tl.trans(key) * memory, 0))
            memory = memory + tl.trans(key) * written[None, :]
        else:
            inside = (tl.zeros((1,), tl.int32) + fresh) != 0
            fixed = 0.0
            if GATE == "lightning":
                fixed = tl.load(decay + h)
            key, log_g = key_and_gate(new_k[None, :], inside, columns, fixed, rate, lower, D, GATE, FEATURE)
            memory = memory * tl.trans(tl.exp(log_g)) + tl.trans(key) * new_v[None, :]
        kept = memory
        if MOST > 0:
            kept = tl.clamp(kept, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(state + cell, kept.to(state.dtype.element_ty), mask=within)

    for g in tl.static_range(G):
        head = h * G + g
        if g + 1 < G:
            next_x, next_other = load_query(q + b * stride, head + 1, columns, partner, D, R)
            next_first, next_second = load_map(down_q, up_q, head + 1, columns, D, RANK, RP)
        w = tl.load(mixing + head).to(tl.float32)
        if LOGITS:
            w = sigmoid(w + tl.load(logits + b * logits_stride + head).to(tl.float32))
        if OPENING > 0:
            rows_of = (head * D + mine[:, None]) * OPENING + ranks[None, :]
            opens = tl.load(opening + rows_of, mask=narrow[:, None], other=0.0).to(tl.float32)
        near, far = x, x
        if R > 0:
            near = x * c + other * s
            if SINKS > 0:
                far = x * sink_c + other * sink_s
        score = tl.where(seen, tl.sum(window_k * near[None, :], 1) * scale, -float("inf"))
        highest = tl.max(score, 0)
        if SINKS > 0:
            sink_score = tl.where(gone, tl.sum(sink_k * far[None, :], 1) * scale, -float("inf"))
            highest = tl.maximum(highest, tl.max(sink_score, 0))
        weight = tl.exp(score - highest)
        total, result = tl.sum(weight, 0), tl.sum(weight[:, None] * window_v, 0)
        if SINKS > 0:
            sink_weight = tl.exp(sink_score - highest)
            total += tl.sum(sink_weight, 0)
            result += tl.sum(sink_weight[:, None] * sink_v, 0)
        result = result / total
        if GATE != "none":
            query = mapped(x[None, :], first, second, columns, D, FEATURE, RANK)
            if ERASE:
                query = of_length_one(query)
            recurrent = tl.sum(tl.trans(query) * memory, 0)
            if RMS:
                recurrent = recurrent / tl.sqrt(tl.sum(recurrent * recurrent, 0) / D + epsilon)
            if OPENING > 0:
                recurrent = recurrent * 2.0 * sigmoid(tl.sum(opens * for_opening[None, :], 1))
            result = w * recurrent + (1.0 - w) * result
        tl.store(output + (b * KV * G + head) * D + mine, result.to(output.dtype.element_ty), mask=narrow)
        if g + 1 < G:
            x, other, first, second = next_x, next_other, next_first, next_second

    # what stays: values by columns, keys once
    token = (pair * (M + W) + M + slot) * D
    sink = (pair * (M + W) + before) * D
    is_sink = (before < M) & (fresh != 0)
    tl.store(values + token + mine, new_v.to(kept_type), mask=narrow)
    if is_sink:
        tl.store(values + sink + mine, new_v.to(kept_type), mask=narrow)
    if part == 0:
        tl.store(keys + token + columns, turned.to(kept_type), mask=wide)
        if is_sink:
            tl.store(keys + sink + columns, turned.to(kept_type), mask=wide)
        if h == 0:
            tl.store(ring_valid + b * W + slot, fresh.to(tl.uint8))


def program(pairs: int, D: int, whole: bool) -> tuple[int, int]:
    """Value channels and warps of a program: many channels, but for few heads as few as fill the GPU; all of them if it
    needs the `whole` head."""
    size = triton.next_power_of_2(D)
    if whole:
        return size, 4 if size <= 32 else 8
    while size > 16 and (size > 64 or pairs * triton.cdiv(D, size) < 256):
        size //= 2
    return size, 4


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
    """As `step.step`; `launch`, in place of what `program` says, is for tuning."""
    heads = heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()
    (B, rows, D), KV, M = heads.shape, held.keys.shape[1], clock.sink_time.shape[1]
    H = rows - 2 * KV
    q, k, v = heads.split([H, KV, KV], dim=1)
    output = torch.empty(B, H, D, dtype=heads.dtype, device=heads.device)
    cos, sin = (mixing, mixing) if rope is None else rope  # an argument that nothing reads
    sink_cos, sink_sin = (cos, sin) if sink_rope is None else sink_rope
    block, warps = launch or program(B * KV, D, beyond.epsilon is not None)
    rank, overlap = 0 if beyond.maps is None else beyond.maps[0].shape[-1], overlaps(heads)
    step_kernel[(B * KV, triton.cdiv(D, block))](
        q, k, v, heads.stride(0),
        cos, sin, 0 if rope is None else cos.stride(0), sink_cos, sink_sin, 0 if rope is None else sink_cos.stride(0),
        mixing, mixing if decay is None else decay, clock.time, clock.real, clock.valid, clock.sink_time,
        held.keys, held.values, held.valid, held.state, output, *given(beyond, mixing),
        KV, settings.scale, 1.0 / settings.temperature, settings.lower, settings.strength, beyond.epsilon or 0.0,
        G=H // KV, D=D, DP=triton.next_power_of_2(D), BV=block, R=0 if rope is None else cos.shape[-1], M=M,
        MP=triton.next_power_of_2(max(M, 1)), SINKS=min(settings.sinks, M), W=settings.window,
        WP=triton.next_power_of_2(settings.window), GATE=settings.gate, FEATURE=settings.feature_map,
        ERASE=settings.gate in DELTA, RANK=rank, RP=triton.next_power_of_2(max(rank, 1)),
        GATES=0 if beyond.gate is None else beyond.gate.shape[-1], LOGITS=beyond.mixing is not None,
        RMS=beyond.epsilon is not None, OPENING=0 if beyond.opening is None else beyond.opening[1].shape[-1],
        MOST=torch.finfo(torch.float16).max if held.state.dtype == torch.float16 else 0.0,
        OVERLAP=overlap, num_warps=warps, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return output


def given(beyond: Beyond, unread: Tensor) -> tuple[Tensor | int, ...]:
    """The kernel's arguments of what is `beyond`; `unread` in place of what is not there."""
    gate, logits = (unread if x is None else x for x in (beyond.gate, beyond.mixing))
    low, opening = (unread, unread) if beyond.opening is None else beyond.opening
    maps = (unread,) * 4 if beyond.maps is None else beyond.maps
    return *maps, gate, gate.stride(0), logits, logits.stride(0), low, low.stride(0), opening
