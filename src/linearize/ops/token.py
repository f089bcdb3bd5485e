"""What a decoding step does besides its layers: before the first, the token's embedding and RoPE's angles, after the
last, the clock. On a GPU two kernels, which are some twenty small ones by PyTorch's operations."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linearize.ops import dispatch
from linearize.ops.dispatch import may_look
from linearize.ops.liger import Rope
from linearize.ops.step import Clock
from linearize.ops.step import advance as advance_clock


class Rings(NamedTuple):
    """Where RoPE had the tokens of each window whose keys are turned back, side by side: token t at t % window."""

    positions: Tensor  # [B, sum of windows], int32
    windows: tuple[int, ...]

    def parts(self) -> Sequence[Tensor]:
        """Each window's own, `[B, window]`."""
        return self.positions.split(self.windows, dim=1)


class Token(NamedTuple):
    """What the first layer begins with."""

    hidden: Tensor  # [B, hidden]
    rope: Rope  # cos and sin [B, R] at the token's position
    sinks: Rope | None  # with which queries see the sinks; None where as they see the window
    leaving: list[Rope]  # those that turn back the key that leaves each of the rings' windows


def why_not_fused(embedding: Any, rotary: Any) -> str | None:
    """What the kernel lacks for these modules; None if nothing."""
    unsupported = {
        f"{type(embedding).__name__} as embeddings": type(embedding) is not nn.Embedding
        or "forward" in vars(embedding)
        or embedding.max_norm is not None,
        f"{type(rotary).__name__} as RoPE": not _is_own(rotary, embedding.weight.device),
    }
    return dispatch.why_no_kernel(embedding.weight, unsupported)


def _is_own(rotary: Any, device: torch.device) -> bool:
    """Whether RoPE is as transformers has it, with frequencies that a kernel can read."""
    if not type(rotary).__module__.startswith("transformers.") or "forward" in vars(rotary):
        return False
    speeds = getattr(rotary, "inv_freq", None)
    return isinstance(speeds, Tensor) and speeds.device == device and speeds.is_contiguous()


def begin(embedding: Any, rotary: Any, ids: Tensor, position: Tensor, limit: int, clock: Clock, rings: Rings) -> Token:
    """Of ids and position `[B, 1]`; queries see the sinks from within the `limit` of positions."""
    if why_not_fused(embedding, rotary) is None:
        from linearize.ops.token_triton import begin as kernel

        with torch.cuda.device_of(ids):
            return kernel(embedding.weight, rotary, ids, position, limit, clock, rings)
    hidden = embedding(ids[:, 0])
    each = zip(rings.parts(), rings.windows, strict=True)
    places = [ring.index_select(1, clock.time % window) for ring, window in each]
    clamps = not may_look(position) or bool((position >= limit).any())
    places += [position.clamp(max=limit - 1)] * clamps
    cos, sin = rotary(hidden, position_ids=torch.cat([position, *places], 1))
    rope, *others = zip(cos.unbind(1), sin.unbind(1), strict=True)
    return Token(hidden, rope, others.pop() if clamps else None, others)


def advance(clock: Clock, position: Tensor, rings: Rings) -> None:
    """After every layer took in the token, at `position` `[B, 1]`."""
    if dispatch.no_device(position) is None:
        from linearize.ops.token_triton import advance as kernel

        with torch.cuda.device_of(position):
            kernel(clock, position, rings)
        clock.shared.clear()
        return
    for ring, window in zip(rings.parts(), rings.windows, strict=True):
        ring.index_copy_(1, clock.time % window, position.int())
    advance_clock(clock)
