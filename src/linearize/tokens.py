"""What every mixer has to know of a batch, worked out once for each forward pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from linearize.cache import MixerCacheLayer
from linearize.errors import LinearizeError
from linearize.ops.liger import first_tokens, warn_once
from linearize.ops.local import NEVER
from linearize.ops.step import Clock


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a call are real, which document each belongs to, and which of them are attention sinks.

    A slot holds one sink; there are `sinks` of them for each document (M in all). Times are indices into the row,
    counted from the first token that the cache saw, padding included.
    """

    valid: Bool[Tensor, "B T"] | None  # None: no padding
    document: Int[Tensor, "B T"] | None  # None: one document a row
    sink_index: Int[Tensor, "B M"] | None  # the token of this call that fills a slot; None: no slot is filled
    sink_new: Bool[Tensor, "B M"] | None  # whether the slot is filled in this call; None: all are
    sink_time: Int[Tensor, "B M"]
    sink_document: Int[Tensor, "B M"] | None
    real: Int[Tensor, "B"]  # real tokens in the row up to the end of this call
    start: int  # time of the first token of this call
    length: int  # tokens of this call, T
    sinks: int  # slots of a document
    sink_rope: Sequence[Any] | None = None  # where distances are clamped: cos and sin of each converted layer
    rope_position: Int[Tensor, "B T"] | None = None  # where RoPE has them; None without a cache
    # cos and sin of the tokens that leave the window in this call, of each layer that turns their keys back
    leaving_rope: Sequence[tuple[Tensor, Tensor] | None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_made", {})

    @property
    def position(self) -> Int[Tensor, "B T"]:
        """Real tokens before this one in its row or document; at padding anything from 0."""
        return self._once("position", self._position)

    @property
    def first(self) -> Int[Tensor, "B T"] | None:
        """The first token of each token's document, as `ops.liger` takes it."""
        return self._once("first", lambda: first_tokens(self.document, self.valid))

    @property
    def in_one_piece(self) -> bool:
        """Whether no row has padding between its tokens, behind which kernels would begin another document."""
        valid = self.valid
        return valid is None or self._once("in_one_piece", lambda: not bool(within_tokens(valid).any()))

    @property
    def sink_time_from_start(self) -> Int[Tensor, "B M"]:
        """As the operators count: from the first token of this call."""
        return self._once(
            "sink_time", lambda: (self.sink_time - self.start).masked_fill(self.sink_time == NEVER, NEVER)
        )

    def worked_out(self) -> "Tokens":
        """Itself, with all that layers share made already: those that are compiled only look it up."""
        for made in (self.position, self.first, self.sink_time_from_start):
            del made
        return self

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """As `functools.cached_property`, which `torch.compile` does not go into."""
        made: dict[str, Any] = getattr(self, "_made")  # noqa: B009
        if name not in made:
            made[name] = make()
        return made[name]

    def _position(self) -> Int[Tensor, "B T"]:
        if self.document is not None:
            index = torch.arange(self.document.shape[1], device=self.document.device)
            begins = torch.nn.functional.pad(self.document[:, 1:] != self.document[:, :-1], (1, 0))
            return index - (index * begins).cummax(dim=1).values
        ones = torch.ones_like(self.real)[:, None].expand(-1, self.length) if self.valid is None else self.valid.long()
        return (self.real[:, None] - ones.sum(1, keepdim=True) + ones.cumsum(1) - 1).clamp(min=0)


def behind_tokens(valid: Bool[Tensor, "B T"], real: Int[Tensor, "B"] | None = None) -> Bool[Tensor, "B T"]:
    """Padding that tokens of its row come before, of this call or, `real` of them, before it."""
    before = valid.cumsum(1) if real is None else valid.cumsum(1) + real[:, None]
    return ~valid & (before > 0)


def within_tokens(valid: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Padding between tokens of its row, of this call."""
    return behind_tokens(valid) & (valid.flip(1).cumsum(1).flip(1) > 0)


def most_sinks(plan: Mapping[str, Any]) -> int:
    """The sinks of a document, of the layer that has most, from a converted model's `config.linearize`."""
    sinks = plan["mixer"]["sinks"]
    return max(sinks) if isinstance(sinks, list | tuple) else sinks


def describe(
    shape: Sequence[int],
    sinks: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past: MixerCacheLayer | None = None,
    documents: int | None = None,
) -> Tokens:
    """The tokens of a call of `shape` (B, T), after those that `past` saw.

    `attention_mask` is 2-D, 0 at padding. Packed documents are known, as in transformers, by position ids that start
    over where there is neither a padding mask nor a cache. Whoever knows how many `documents` a row has at most says
    so, and nothing here waits for the GPU; what layers share is then made at once.
    """
    tokens = _describe(shape, sinks, device, attention_mask, position_ids, past, documents)
    return tokens if documents is None else tokens.worked_out()


def _describe(
    shape: Sequence[int],
    sinks: int,
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past: MixerCacheLayer | None,
    documents: int | None,
) -> Tokens:
    B, T = shape
    start = past.get_seq_length() if past is not None else 0
    if attention_mask is not None and attention_mask.dim() != 2:
        raise LinearizeError(
            f"the attention mask has shape {tuple(attention_mask.shape)}; "
            "a linearized model takes a [batch, tokens] mask with 0 at padding, or none"
        )
    if attention_mask is not None and attention_mask.shape[1] != start + T:
        raise LinearizeError(
            f"the attention mask has {attention_mask.shape[1]} columns; "
            f"it must have one for each token so far, {start} before this call and {T} in it"
        )
    valid = None if attention_mask is None else attention_mask[:, -T:].to(torch.bool)
    if valid is not None and bool(valid.all()):
        valid = None
    if valid is not None:
        before = past.real if past is not None and start > 0 else None
        padding = within_tokens(valid) if past is None else behind_tokens(valid, before)
        if bool(padding.any()):
            warn_once("padding behind tokens of its row takes up places of their window: pad batches on the left")
    if start > 0:
        assert past is not None
        return _continue(T, past, valid)
    if attention_mask is None and position_ids is not None and T > 1 and documents != 1:
        document = (position_ids[:, 1:] != position_ids[:, :-1] + 1).cumsum(1)
        documents = int(document.max()) + 1 if documents is None else documents
        if documents > 1:
            document = torch.nn.functional.pad(document, (1, 0)).expand(B, T).contiguous()
            return _packed(document, sinks, documents)
    time = torch.arange(sinks, device=device).expand(B, sinks)
    if valid is None and sinks <= T:
        real = torch.full((B,), T, device=device)
        return Tokens(None, None, time, None, time, None, real, 0, T, sinks)
    return _fill_slots(T, torch.zeros(B, dtype=torch.long, device=device), torch.full_like(time, NEVER), valid, 0)


def of_step(
    clock: Clock,
    sink_rope: Sequence[Any] | None = None,
    leaving_rope: Sequence[tuple[Tensor, Tensor] | None] | None = None,
) -> Tokens:
    """The one token of each row that `clock` is at; times are counted from it."""
    sink_time = torch.where(clock.sink_time == NEVER, clock.sink_time, clock.sink_time - clock.time)
    valid, real, sinks = clock.valid[:, None], clock.real + clock.valid, sink_time.shape[1]
    return Tokens(valid, None, None, None, sink_time, None, real, 0, 1, sinks, sink_rope, None, leaving_rope)


def _continue(T: int, past: MixerCacheLayer, valid: Tensor | None) -> Tokens:
    if valid is None and bool((past.real >= past.sink_time.shape[1]).all()):
        start, sinks = past.get_seq_length(), past.sink_time.shape[1]
        return Tokens(None, None, None, None, past.sink_time, None, past.real + T, start, T, sinks)
    return _fill_slots(T, past.real, past.sink_time, valid, past.get_seq_length())


def _fill_slots(T: int, real_before: Tensor, sink_time: Tensor, valid: Tensor | None, start: int) -> Tokens:
    """Slot s holds the real token number s of its row, as soon as there is one."""
    B, sinks = sink_time.shape
    slot = torch.arange(sinks, device=sink_time.device).expand(B, sinks)
    ones = torch.ones(B, T, dtype=torch.long, device=sink_time.device) if valid is None else valid.long()
    count = real_before[:, None] + ones.cumsum(1)
    index = torch.searchsorted(count, slot + 1)
    new = (slot >= real_before[:, None]) & (index < T)
    time = torch.where(new, start + index, sink_time)
    return Tokens(valid, None, index.clamp(max=T - 1), new, time, None, count[:, -1], start, T, sinks)


def _packed(document: Tensor, sinks: int, documents: int) -> Tokens:
    """Each document of a row has sinks of its own; rows with fewer documents leave slots empty."""
    B, T = document.shape
    number = torch.arange(documents, device=document.device).expand(B, -1).contiguous()
    first, end = torch.searchsorted(document, number), torch.searchsorted(document, number, right=True)
    index = first[..., None] + torch.arange(sinks, device=document.device)
    there = index < end[..., None]
    time = torch.where(there, index, NEVER).flatten(1)
    owner = number[..., None].expand_as(index).flatten(1)
    real = torch.full((B,), T, device=document.device)
    return Tokens(None, document, index.clamp(max=T - 1).flatten(1), None, time, owner, real, 0, T, sinks)
