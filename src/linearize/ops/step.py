"""Liger Attention for the next token of each sequence, in place: a window, sinks and a state at fixed addresses.

The equations are those of `ops.liger`, one token at a time. Shapes: q `[B, H, D]`; k, v `[B, KV, D]`, before RoPE.
Nothing here asks the device for a value or makes a tensor of varying size, so that a CUDA graph can hold it.
"""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from linearize.ops.liger import FEATURES, GATES, Rope, Settings, rotate, warn_once, wide

WIDEST = 128  # window that the kernel takes


class Clock(NamedTuple):
    """What all layers know of the tokens so far; `advance` moves it on."""

    time: Tensor  # [1], int64: the index of the next token, padding counted
    real: Tensor  # [B], int64: real tokens seen
    valid: Tensor  # [B], bool: False where the next token is padding
    sink_time: Tensor  # [B, M], int64: the index of each sink, `NEVER` of those still to come


class Held(NamedTuple):
    """What one layer keeps: M sinks, then a ring of W tokens, of which token t is at M + t % W; keys are rotated."""

    keys: Tensor  # [B, KV, M + W, D]
    values: Tensor  # [B, KV, M + W, D]
    valid: Tensor  # [B, W], uint8: 1 where the ring has a real token
    state: Tensor  # [B, KV, D, D] in fp32; [0] without a recurrence


def advance(clock: Clock) -> None:
    """After every layer took in the token."""
    slot = torch.arange(clock.sink_time.shape[1], device=clock.time.device)
    filled = (slot == clock.real[:, None]) & clock.valid[:, None]
    clock.sink_time.copy_(torch.where(filled, clock.time, clock.sink_time))
    clock.real.add_(clock.valid)
    clock.time.add_(1)


def why_not_fused(q: Tensor, k: Tensor, v: Tensor, settings: Settings, rope: Rope | None) -> str | None:
    """What the kernel lacks for these inputs; None if nothing."""
    D = q.shape[-1]
    R = 0 if rope is None else rope[0].shape[-1]
    if find_spec("triton") is None:
        return "triton is not installed"
    if not q.is_cuda:
        return "the tensors are not on a CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the device is older than compute capability 8.0"
    unsupported = {
        f"a window of {settings.window}": settings.window > WIDEST,
        f"head size {D}": D > 256,
        f"value heads of size {v.shape[-1]} with key heads of size {D}": v.shape[-1] != D,
        f"{R} rotated channels": R % 2 == 1 or R > D,
        f"{q.dtype}, {k.dtype} and {v.dtype} together": not q.dtype == k.dtype == v.dtype,
    }
    reasons = [name for name, true in unsupported.items() if true]
    return f"no kernel for {', '.join(reasons)}" if reasons else None


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    settings: Settings,
    rope: Rope | None,
    sink_rope: Rope | None,
    clock: Clock,
    held: Held,
    decay: Tensor | None = None,
) -> Tensor:
    """`[B, H, D]` in q's dtype, by the fastest code there is; `held` takes in the token, `clock` stays as it is.

    `mixing` is `[H]`; `rope` is cos and sin `[B, R]` of the token, `sink_rope` those with which queries meet the sinks
    (the same, but where distances are clamped); `decay` is lightning's log decay of each head. A gate of "none" leaves
    the window alone.
    """
    run = plain
    if (reason := why_not_fused(q, k, v, settings, rope)) is None:
        from linearize.ops.step_triton import run
    elif q.is_cuda:
        warn_once(f"decoding steps of Liger Attention run unfused, several times slower: {reason}")
    return run(q, k, v, mixing, settings, rope, sink_rope, clock, held, decay)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Tensor,
    settings: Settings,
    rope: Rope | None,
    sink_rope: Rope | None,
    clock: Clock,
    held: Held,
    decay: Tensor | None = None,
) -> Tensor:
    """In PyTorch."""
    B, KV, D = k.shape
    W, M = settings.window, clock.sink_time.shape[1]
    near_q, near_k = (x if rope is None else rotate(x, *rope) for x in (q, k))
    far_q = q if sink_rope is None else rotate(q, *sink_rope)
    slot = clock.time % W
    _keep_sink(near_k, v, clock, held)
    held.keys.index_copy_(2, M + slot, near_k[:, :, None])
    held.values.index_copy_(2, M + slot, v[:, :, None])
    held.valid.index_copy_(1, slot, clock.valid[:, None].to(torch.uint8))

    gone = (clock.sink_time <= clock.time - W) & (torch.arange(M, device=k.device) < settings.sinks)
    seen = torch.cat([gone, held.valid.bool() | (torch.arange(W, device=k.device) == slot)], dim=1)
    near, far = (x.reshape(B, KV, -1, D) for x in (near_q, far_q))
    scores = torch.cat([far @ held.keys[:, :, :M].mT, near @ held.keys[:, :, M:].mT], dim=-1)
    scores = (wide(scores) * settings.scale).masked_fill(~seen[:, None, None], -torch.inf)
    windowed = scores.softmax(-1).to(q.dtype) @ held.values
    if settings.gate == "none":
        return windowed.reshape(q.shape)

    key, log_g = (x[:, 0] for x in GATES[settings.gate](wide(k)[:, None], settings, decay))  # [B, KV, D or 1]
    key, log_g = (x * clock.valid[:, None, None] for x in (key, log_g))
    held.state.mul_(log_g.exp()[..., None]).add_(key[..., None] * wide(v)[..., None, :])
    recurrent = FEATURES[settings.feature_map](wide(q)).reshape(B, KV, -1, D) @ held.state
    w = mixing.view(KV, -1, 1).to(windowed.dtype)
    return torch.lerp(windowed, recurrent.to(windowed.dtype), w).reshape(q.shape)


def _keep_sink(k: Tensor, v: Tensor, clock: Clock, held: Held) -> None:
    """The token is a sink of its row while there are free places."""
    M = clock.sink_time.shape[1]
    new = (torch.arange(M, device=k.device) == clock.real[:, None]) & clock.valid[:, None]
    for kept, x in ((held.keys, k), (held.values, v)):
        kept[:, :, :M] = torch.where(new[:, None, :, None], x[:, :, None], kept[:, :, :M])
