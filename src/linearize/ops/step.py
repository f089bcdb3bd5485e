"""Liger Attention for the next token of each sequence, in place: a window, sinks and a state at fixed addresses.

The equations are those of `ops.liger`, one token at a time, the delta rule's among them, and what `Beyond` adds.
`heads` `[B, H + 2 KV, D]` are the token's q, k and v, one after the other, before RoPE. Nothing here asks a GPU for a
value or makes a tensor of varying size, so that a CUDA graph can hold it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.cache import Memory
from linearize.features import products
from linearize.ops import dispatch
from linearize.ops.dispatch import may_look, narrowed, why_no_kernel
from linearize.ops.liger import DELTA, FEATURES, GATES, Rope, Settings, inverse, warn_once, wide
from linearize.ops.local import Past

WIDEST = 128  # window that the kernel takes
WHOLE = 128  # largest head that one program can have whole
STATE = 2**16  # bytes of the largest state of products that it can have, as an operand


class Marks(NamedTuple):
    """What `plain` works out once for all layers of one window and as many sinks."""

    place: Tensor  # [1]: where in `Held` the new token goes
    mask: Tensor  # [B * KV, 1, M + W]: 0 where a token is seen, else -inf
    sink: Tensor | None  # [B, 1, M, 1]: whether the new token is this sink; None if known to be none


class Leaving(NamedTuple):
    """What is worked out once for all layers whose recurrence is behind one window."""

    slot: Tensor  # [1]: of the ring, where a token leaves and the new one comes
    place: Tensor  # [1]: the same in `Held`
    real: Tensor | None  # [B], bool: whether the one that leaves is to be taken in; None if known of all
    wanted: Tensor | None  # [B, 1, 1], bool: whether the new one will be; None if known of all
    back: Rope | None  # cos and sin, as `_turned` takes them, that turn back the key that leaves


class Clock(NamedTuple):
    """What all layers know of the tokens so far; `advance` moves it on."""

    time: Tensor  # [1], int64: the index of the next token, padding counted
    real: Tensor  # [B], int64: real tokens seen
    valid: Tensor  # [B], bool: False where the next token is padding
    sink_time: Tensor  # [B, M], int64: the index of each sink, `NEVER` of those still to come
    shared: dict[tuple, Any]  # what layers of this step share, by what it depends on: made by the first that asks;
    # a tensor in a key, told from others by being itself, lives as long as the key


class Held(NamedTuple):
    """What one layer keeps: M sinks, then a ring of W tokens, of which token t is at M + t % W; keys are rotated. Then
    what a recurrence carries, as `cache.Memory` has it, but that gates that wait are a ring too."""

    keys: Tensor  # [B, KV, M + W, D]; neither sinks nor ring where there is no window
    values: Tensor  # [B, KV, M + W, D]
    valid: Tensor  # [B, W], uint8: 1 where the ring has a real token; one tensor for all layers of this window
    state: Tensor  # [B, KV, K, D], K = D but of products, or another structure's; [0] without a recurrence
    recent: Tensor | None = None
    late_gates: Tensor | None = None
    positions: Tensor | None = None  # [B, W], int32: where RoPE had the ring's tokens, for whoever makes
    # `Beyond.leaving` of them; one tensor for all layers of this window whose keys are turned back


class Beyond(NamedTuple):
    """What a layer has and Liger Attention as published has not; None where this one has not either. What depends on
    the token was made of the layer's input, by matrix products."""

    maps: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # of "linear" and "products", q's [H, D, R] and
    # [H, R, D], then k's
    gate: Tensor | None = None  # [B, KV, P]: of the delta rule's decay, if it has one, and of β
    mixing: Tensor | None = None  # [B, H]: with the layer's own added, through σ, the weights
    epsilon: float | None = None  # of the root mean square that divides the recurrence's output
    opening: tuple[Tensor, Tensor] | None = None  # [B, R] and [H * D, R], whose product then multiplies it, 2 σ of it
    leaving: Rope | None = None  # cos and sin [B, R] of the token that leaves the window, if its key is turned back
    floor: Tensor | None = None  # [H]: log ε, ε² being added to the mean square besides


NOTHING = Beyond()


def advance(clock: Clock) -> None:
    """After every layer took in the token."""
    slot = torch.arange(clock.sink_time.shape[1], device=clock.time.device)
    filled = (slot == clock.real[:, None]) & clock.valid[:, None]
    clock.sink_time.copy_(torch.where(filled, clock.time, clock.sink_time))
    clock.real.add_(clock.valid)
    clock.time.add_(1)
    clock.shared.clear()


def why_not_fused(
    heads: Tensor, settings: Settings, rope: Rope | None, held: Held, beyond: Beyond = NOTHING
) -> str | None:
    """What the kernel lacks for these inputs; None if nothing."""
    if (reason := dispatch.no_device(heads)) is not None:
        return reason  # before the names of all else are made
    D = heads.shape[-1]
    R = 0 if rope is None else rope[0].shape[-1]
    K, size = keys_of(settings, held, D), 2 if reads_in_fp16(settings, heads, held) else 4
    unsupported = {
        f"a window of {settings.window}": settings.window > WIDEST,
        f"head size {D}": D > 256,
        f"{R} rotated channels": R % 2 == 1 or R > D,
        f"a root mean square over {D} channels": D > WHOLE and beyond.epsilon is not None,
        f"{D} channels behind the window": D > WHOLE and held.late_gates is not None and settings.gate != "none",
        f"{K} keys of {D} channels in {held.state.dtype}": K > D and size * padded(K) * padded(D) > STATE,
        f"{heads.dtype} and a cache in {held.keys.dtype}": heads.dtype != held.keys.dtype,
    }
    return why_no_kernel(heads, unsupported)


def padded(length: int) -> int:
    """To a power of two, as a kernel has it."""
    return 2 ** (length - 1).bit_length()


def keys_of(settings: Settings, held: Held, head_dim: int) -> int:
    """K of the recurrence that the kernel has; D where it has the window alone."""
    return head_dim if settings.gate == "none" else held.state.shape[-2]


def reads_in_fp16(settings: Settings, heads: Tensor, held: Held) -> bool:
    """Whether the state is an operand of the kernel as it is stored: no query is longer than 1, so that fp16 holds
    it."""
    short = settings.gate in DELTA or settings.feature_map == "softmax"
    return short and heads.dtype != torch.float32 and held.state.dtype == torch.float16


def step(
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
    """`[B, H, D]` in the dtype of `heads`, by the fastest code there is; `held` takes in the token, `clock` stays as it
    is.

    `mixing` is `[H]`; `rope` is cos and sin `[B, R]` of the token, `sink_rope` those with which queries meet the sinks
    (the same, but where distances are clamped); `decay` is lightning's log decay of each head. A gate of "none" leaves
    the window alone.
    """
    fixed = rope, sink_rope, clock, held, decay
    if (reason := why_not_fused(heads, settings, rope, held, beyond)) is None:
        from triton.runtime.errors import OutOfResources

        from linearize.ops.step_triton import run

        try:
            with torch.cuda.device_of(heads):  # kernels run on the current device
                return run(heads, mixing, settings, *fixed, beyond)
        except OutOfResources as error:  # before anything ran
            reason = str(error)
    if heads.is_cuda:
        warn_once(f"decoding steps of Liger Attention run unfused, several times slower: {reason}")
    if settings.gate == "none":
        return plain(heads, mixing, settings, *fixed)
    taken = taken_in(heads, settings, rope, clock, held, beyond)
    windowed = step(heads, mixing, settings._replace(gate="none"), *fixed)  # perhaps by the kernel
    return with_recurrence(windowed, taken, mixing, settings, clock, held, decay, beyond)


def plain(
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
    """In PyTorch."""
    (B, KV, _, D), M = held.keys.shape, clock.sink_time.shape[1]
    H, pairs = heads.shape[1] - 2 * KV, B * KV
    q, k, v = heads.split([H, KV, KV], dim=1)
    near = heads if rope is None else _turned(heads[:, : H + KV], *_angles(clock, rope, heads.dtype))
    near_q, near_k = near[:, :H].reshape(pairs, -1, D), near[:, H : H + KV]
    taken = taken_in(heads, settings, rope, clock, held, beyond)
    mask = keep(near_k, v, settings.window, settings.sinks, clock, held).mask

    keys = held.keys.view(pairs, -1, D).mT
    scores = torch.baddbmm(mask, near_q, keys, alpha=settings.scale)
    if rope is not None and sink_rope is not None and sink_rope is not rope:
        far_q = _turned(q, *_angles(clock, sink_rope, q.dtype)).reshape(pairs, -1, D)
        scores[..., :M] = torch.baddbmm(mask[..., :M], far_q, keys[..., :M], alpha=settings.scale)
    windowed = torch.bmm(scores.softmax(-1), held.values.view(pairs, -1, D)).view(B, H, D)
    if settings.gate == "none":
        return windowed
    return with_recurrence(windowed, taken, mixing, settings, clock, held, decay, beyond)


class Taken(NamedTuple):
    """What a recurrence reads with and takes in."""

    q: Tensor  # [B, H, D]
    k: Tensor  # [B, KV, D], in fp32 at least, as v
    v: Tensor  # [B, KV, D]
    gate: Tensor | None  # [B, KV, P]
    real: Tensor | None  # [B], bool; None if known to be so in all rows


def taken_in(
    heads: Tensor, settings: Settings, rope: Rope | None, clock: Clock, held: Held, beyond: Beyond
) -> Taken | None:
    """The new token; behind the window that which leaves it now, while what the new one keeps for then comes into
    `held`. Nothing without a recurrence."""
    if settings.gate == "none":
        return None
    KV = held.keys.shape[1]
    q, k, v = heads.split([heads.shape[1] - 2 * KV, KV, KV], dim=1)
    if held.late_gates is None:
        return Taken(wide(q), wide(k), wide(v), beyond.gate, _unless_all(clock.valid, clock, "valid"))
    assert beyond.gate is not None
    key = "leaving", settings.window, settings.sinks, KV, beyond.leaving and beyond.leaving[0]
    known: Leaving = clock.shared.get(key) or clock.shared.setdefault(key, _leaving(settings, clock, held, beyond))
    leaving, v = (x.index_select(2, known.place)[:, :, 0] for x in (held.keys, held.values))
    if known.back is not None:  # rounded, most are again what they were
        leaving = _turned(wide(leaving), *known.back).to(leaving.dtype)
    elif rope is not None:
        q = _turned(q, *_angles(clock, rope, q.dtype))
    late, waits = held.late_gates.index_select(1, known.slot)[:, 0], beyond.gate
    late = late if known.real is None else late.nan_to_num()
    waits = waits if known.wanted is None else torch.where(known.wanted, waits, torch.nan)
    held.late_gates.index_copy_(1, known.slot, narrowed(waits, late.dtype)[:, None])
    return Taken(wide(q), wide(leaving), wide(v), wide(late), known.real)


def _leaving(settings: Settings, clock: Clock, held: Held, beyond: Beyond) -> Leaving:
    """Made by the first layer of this window that asks."""
    assert held.late_gates is not None
    slot = clock.time % settings.window
    real = ~held.late_gates.index_select(1, slot)[:, 0, 0, 0].isnan()
    wanted = _unless_all(clock.valid & (clock.real >= settings.sinks), clock, "wanted", settings.sinks)
    back = None
    if beyond.leaving is not None:
        cos, sin = inverse(beyond.leaving)
        back = _signed(cos, sin, cos.dtype)
    return Leaving(
        slot,
        slot + clock.sink_time.shape[1],
        _unless_all(real, clock, "real", settings.window, settings.sinks),
        None if wanted is None else wanted[:, None, None],
        back,
    )


def _unless_all(rows: Tensor, clock: Clock, *name: Any) -> Tensor | None:
    """rows `[B]`, or None where they are known to be all True."""
    if not may_look(rows):
        return rows
    if name not in clock.shared:
        clock.shared[name] = None if bool(rows.all()) else rows
    return clock.shared[name]


def with_recurrence(
    windowed: Tensor,
    taken: Taken | None,
    mixing: Tensor,
    settings: Settings,
    clock: Clock,
    held: Held,
    decay: Tensor | None,
    beyond: Beyond,
) -> Tensor:
    """The recurrence takes in a token, in PyTorch, and its output is mixed with the window's `[B, H, D]`."""
    assert taken is not None
    q, k, v, given, real = taken
    (B, H, D), KV = q.shape, k.shape[1]
    K, maps = held.state.shape[-2], beyond.maps
    query = _mapped(q, settings, maps and maps[:2])
    if settings.gate in DELTA:
        both = torch.cat([query, _mapped(k, settings, maps and maps[2:])], dim=1)
        both = products(both, K // D - 1) if settings.feature_map == "products" else both
        query, key = F.normalize(both, dim=-1).split([H, KV], dim=1)
        gate = k.mean(-1, keepdim=True) if given is None else wide(given)
        log_g = F.logsigmoid(gate[..., :1])
        log_g = log_g / settings.temperature if settings.gate == "gated_deltanet" else torch.zeros_like(log_g)
    else:
        key, log_g = (x[:, 0] for x in GATES[settings.gate](k[:, None], settings, decay))  # [B, KV, D or 1]
    if real is not None:
        key, log_g = (x * real[:, None, None] for x in (key, log_g))
    state = wide(held.state)
    pairs = state.view(B * KV, K, D)
    pairs.mul_(log_g.exp().reshape(B * KV, -1, 1))
    key, v = key.reshape(B * KV, 1, K), v.reshape(B * KV, 1, D)
    if settings.gate in DELTA:
        beta = gate[..., -1:].sigmoid().view(B * KV, 1, 1)
        v = (beta if settings.strength == 1 else settings.strength * beta) * (v - torch.bmm(key, pairs))
    pairs.baddbmm_(key.mT, v)
    read = torch.bmm(query.reshape(B * KV, -1, K), pairs).view(B, H, D)
    if state is not held.state:  # held within what its dtype can say
        most = torch.finfo(held.state.dtype).max
        held.state.copy_(state.clamp_(-most, most))
    if beyond.floor is not None:
        floor = wide(beyond.floor).exp()[:, None]
        square = torch.addcmul(read.square().mean(-1, keepdim=True), floor, floor)
        read = read * (square + beyond.epsilon if beyond.epsilon else square).rsqrt()
    elif beyond.epsilon is not None:
        read = F.rms_norm(read, (D,), eps=beyond.epsilon)
    if beyond.opening is not None:
        read = read * 2 * wide(F.linear(*beyond.opening)).sigmoid().view(B, H, D)
    weights = mixing if beyond.mixing is None else (wide(mixing) + wide(beyond.mixing)).sigmoid()
    return torch.lerp(windowed, read.to(windowed.dtype), weights[..., None].to(windowed.dtype))


def _mapped(x: Tensor, settings: Settings, maps: tuple[Tensor, ...] | None) -> Tensor:
    """x `[B, heads, D]` after the feature map, but for the products that it may end with."""
    if maps is None:
        return FEATURES[settings.feature_map](x)
    down, up = (wide(weight).to(x.dtype) for weight in maps)
    x = x.transpose(0, 1)
    return torch.baddbmm(x, torch.bmm(x, down), up).transpose(0, 1)


def past_of(clock: Clock, held: Held) -> tuple[Past, tuple[Tensor, Tensor]]:
    """The window before the token, oldest first, and keys and values of the sinks, as the ordinary forward has them."""
    M, W = clock.sink_time.shape[1], held.valid.shape[1]
    order = _order(clock, W)
    keys, values = (x[:, :, M:].index_select(2, order).transpose(1, 2) for x in (held.keys, held.values))
    past = Past(keys, values, held.valid.index_select(1, order).bool())
    return past, (held.keys[:, :, :M].transpose(1, 2), held.values[:, :, :M].transpose(1, 2))


def memory_of(clock: Clock, held: Held) -> Memory:
    """What a recurrence carries, as the ordinary forward has it."""
    late = held.late_gates
    return Memory(held.state, held.recent, None if late is None else late.index_select(1, _order(clock, late.shape[1])))


def keep_memory(memory: Memory, clock: Clock, held: Held) -> None:
    """What it carries on comes into `held`."""
    for kept, new in ((held.state, memory.state), (held.recent, memory.recent)):
        if kept is not None and new is not None:
            kept.copy_(new)
    if held.late_gates is not None and memory.late_gates is not None:
        held.late_gates.index_copy_(1, clock.time % held.late_gates.shape[1], memory.late_gates[:, -1:])


def _order(clock: Clock, window: int) -> Tensor:
    """Where a ring has its tokens, the oldest first."""
    return (clock.time + torch.arange(window, device=clock.time.device)) % window


def keep(near_k: Tensor, v: Tensor, window: int, sinks: int, clock: Clock, held: Held) -> Marks:
    """The window and the sinks take in the token: its value and, near_k `[B, KV, D]`, its key after RoPE."""
    key = "marks", window, sinks, held.keys.shape[1]
    marks: Marks = clock.shared.get(key) or clock.shared.setdefault(key, _marks(clock, held, window, sinks))
    M = clock.sink_time.shape[1]
    for kept, x in ((held.keys, near_k[:, :, None]), (held.values, v[:, :, None])):
        kept.index_copy_(2, marks.place, x)
        if marks.sink is not None:
            kept[:, :, :M] = torch.where(marks.sink, x, kept[:, :, :M])
    return marks


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over the first R channels of x `[B, H, D]`, as `rotate_half` has it, by angles as `_signed` makes them."""
    R = cos.shape[-1]
    first = x if x.shape[-1] == R else x[..., :R]
    turned = torch.addcmul(first * cos, first.roll(R // 2, -1), sin)
    return turned if first is x else torch.cat([turned, x[..., R:]], dim=-1)


def _signed(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Rope:
    """`[B, 1, R]` each, of `[B, R]`, the sine with the sign that rotate-half gives it."""
    left, right = sin.chunk(2, dim=-1)
    return cos.to(dtype)[:, None], torch.cat([-left, right], dim=-1).to(dtype)[:, None]


def _angles(clock: Clock, rope: Rope, dtype: torch.dtype) -> Rope:
    """As `_turned` takes them, for all layers that have the same."""
    key = "angles", rope[0], dtype
    return clock.shared.get(key) or clock.shared.setdefault(key, _signed(*rope, dtype))


def _marks(clock: Clock, held: Held, window: int, own_sinks: int) -> Marks:
    """Made by the first layer that asks; the ring's `valid` takes in the token here."""
    device, M = held.keys.device, clock.sink_time.shape[1]
    slot, sinks = clock.time % window, torch.arange(M, device=device)
    gone = (clock.sink_time <= clock.time - window) & (sinks < own_sinks)
    seen = torch.cat([gone, held.valid.bool() | (torch.arange(window, device=device) == slot)], dim=1)
    held.valid.index_copy_(1, slot, clock.valid[:, None].to(torch.uint8))
    mask = torch.zeros(seen.shape, device=device, dtype=held.keys.dtype).masked_fill_(~seen, -torch.inf)
    sink: Tensor | None = ((sinks == clock.real[:, None]) & clock.valid[:, None])[:, None, :, None]
    if may_look(clock.time):
        sink = sink if bool((clock.real < M).any()) else None
    mask = mask.repeat_interleave(held.keys.shape[1], dim=0)[:, None]
    return Marks(slot + M, mask, sink)
