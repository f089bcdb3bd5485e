"""One more token by fixed addresses: every layer's window and state stay in place, and on a GPU a CUDA graph holds all
kernels of the model's step.

A cache that a `Decoder` takes shows its buffers from then on, until something else needs it (`MixerCacheLayer.settle`).
What stays softmax attention keeps all tokens (`growing`): a graph has room for more of them, and is made anew where it
is full.
"""

import sys
import weakref
from collections.abc import Mapping
from itertools import chain
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from linearize.cache import GROWS, REST, RINGS, Memory, MixerCacheLayer
from linearize.families import Head, ropes, rotation_of
from linearize.graphs import RecordingError, on_the_side, record
from linearize.growing import Growing, room_for
from linearize.mixer import LinearizedAttention, Moment
from linearize.ops.liger import warn_once
from linearize.ops.local import NEVER
from linearize.ops.products import normed, product
from linearize.ops.step import Clock, Held
from linearize.ops.token import Rings, advance, begin
from linearize.plain_layers import PlainLayer, is_plain, norm_of, original_of
from linearize.tokens import Tokens, most_sinks, of_step

turn = RLock()  # whoever has it may lend decoders, let them step, and take caches back


class Decoder:
    """The buffers of `batch` sequences, and the step of one model over them; a graph of it on a GPU."""

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        config: Any = model.config
        self.stack: Any = model.base_model
        self.head, self.limit = Head(model), config.max_position_embeddings
        attentions: list[Any] = [layer.self_attn for layer in self.stack.layers]
        self.mixers = [attention for attention in attentions if isinstance(attention, LinearizedAttention)]
        weight = self.stack.get_input_embeddings().weight
        sinks = most_sinks(config.linearize)
        like = {"device": weight.device, "dtype": torch.long}
        self.ids, self.position = torch.zeros(batch, 1, **like), torch.zeros(batch, 1, **like)
        self.clock = Clock(
            torch.zeros(1, **like), torch.zeros(batch, **like),
            torch.ones(batch, dtype=torch.bool, device=weight.device), torch.full((batch, sinks), NEVER, **like), {},
        )  # fmt: skip
        windows = {_window(mixer) for mixer in self.mixers}
        valid = {window: torch.zeros(batch, window, dtype=torch.uint8, device=weight.device) for window in windows}
        back = tuple(sorted({_window(mixer) for mixer in self.mixers if mixer.config.turns_back}))
        self.rings = Rings(torch.zeros(batch, sum(back), dtype=torch.int32, device=weight.device), back)
        positions = dict(zip(back, self.rings.parts(), strict=True))
        tokens = of_step(self.clock)
        with torch.no_grad():
            empty = [
                _empty(mixer, valid[_window(mixer)], positions.get(_window(mixer)), sinks, weight, tokens)
                for mixer in self.mixers
            ]
        self.moments = [mixer.moment(self.clock, held) for mixer, held in zip(self.mixers, empty, strict=True)]
        pairs = zip(self.mixers, self.moments, strict=True)
        self.by_operations = not all(mixer.is_whole(moment.settings) for mixer, moment in pairs)
        self.growing = [_growing(attention, weight.new_empty(batch, 0, attention.head_dim)) for attention in attentions]
        self.grows, self.time = any(kept is not None for kept in self.growing), 0
        self.seen = torch.zeros(batch, 0, dtype=torch.bool, device=weight.device)
        self.layers: list[PlainLayer] | None = None
        if is_plain(self.stack):
            moments = iter(self.moments)
            self.layers = [
                PlainLayer(layer, next(moments) if isinstance(layer.self_attn, LinearizedAttention) else None, kept)
                for layer, kept in zip(self.stack.layers, self.growing, strict=True)
            ]
        self.lent: list[weakref.ref[Any]] = []  # the cache's layers
        self.signature = _signature(model)
        modules = [*self.stack.modules(), self.head.output]
        self.parameters = [held for x in modules for held in (x._parameters, x._buffers) if held]
        self.children = [x._modules for x in (model, *modules) if x._modules]
        self.hooks = [hooks for x in modules for hooks in (x._forward_hooks, x._forward_pre_hooks)]
        self.taken: tuple[Any, ...] = ()  # the model's `state` when it took the cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        if not self.grows:
            self.capture()

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether it is for the weights that the model has now."""
        return self.signature == _signature(model)

    def serves(self) -> bool:
        """Whether there is still a cache that it was lent."""
        return any(reference() is not None for reference in self.lent)

    def holds(self, cache: Cache) -> bool:
        """Whether the cache's layers show these buffers, there is room for another token, and nothing was done to the
        model since."""
        if (self.grows and self.time >= self.seen.shape[1]) or self.taken != self.state():
            return False
        return all(
            layer.lender is self if isinstance(layer, MixerCacheLayer) else kept is not None and kept.holds(layer.keys)
            for layer, kept in zip(cache.layers, self.growing, strict=True)
        )

    def state(self) -> tuple[Any, ...]:
        """What tells whether the model is as it was, without much ado: it is asked before every token."""
        return (
            [x.data_ptr() for parameters in self.parameters for x in parameters.values() if x is not None],
            [*map(id, chain.from_iterable(children.values() for children in self.children))],
            [*map(len, self.hooks)],
            [mixer.ablated for mixer in self.mixers],
        )

    def reserve(self, tokens: int) -> None:
        """Room for one more than so many tokens where all are kept, and the graph that reads it; what was in buffers is
        gone. Where there is more room, it stays, or caches that come in turns would make it anew for every token."""
        if room_for(tokens) <= self.seen.shape[1]:
            return
        self.graph, self.logits = None, None  # whose memory is free then
        self.seen = self.seen.new_zeros(len(self.seen), room_for(tokens))
        for kept in self.growing:
            if kept is not None:
                kept.reserve(room_for(tokens))
        self.clock.time.zero_()
        self.capture()

    def capture(self) -> None:
        """On a GPU, run the step, as what compiles or allocates does so then, and make the graph."""
        if not self.ids.is_cuda:
            return
        with torch.cuda.device_of(self.ids):
            on_the_side(self.run)
            try:
                self.graph, self.logits = record(self.run)
            except RecordingError as error:
                self.clock.shared.clear()
                warn_once(f"decoding steps are not one CUDA graph, several times slower: {error}")

    def step(self, ids: Tensor, position: Tensor | int, valid: Tensor | None) -> Tensor:
        """Logits `[B, 1, vocab]` after `ids` `[B, 1]`, at `position` (`[B or 1, 1]`, or one for all rows); rows that
        are not `valid` `[B]` are padding."""
        self.ids.copy_(ids)
        self.position.copy_(position) if isinstance(position, Tensor) else self.position.fill_(position)
        self.clock.valid.fill_(True) if valid is None else self.clock.valid.copy_(valid)
        self.time += 1
        for reference, kept in zip(self.lent, self.growing if self.lent else (), strict=True):
            if (layer := reference()) is not None:
                if isinstance(layer, MixerCacheLayer):
                    layer.seen += 1
                if kept is not None:
                    _show_growing(layer, kept, self.time)
        if self.graph is None:
            with torch.inference_mode(self.layers is not None):  # a tenth less; other modules may keep what they make
                logits = self.run()
            return logits.clone() if logits.is_inference() else logits  # may be written over, and learned from
        assert self.logits is not None
        with torch.cuda.device_of(self.ids):
            self.graph.replay()
        return self.logits.clone()  # the next step writes over them

    @torch.no_grad()
    def run(self) -> Tensor:
        """The step itself: it reads `ids` and `position`, moves `clock` and `held` on, and gives the logits."""
        self.clock.shared.clear()  # of a step that was interrupted
        if self.grows:
            self.seen.index_fill_(1, self.clock.time, True)  # padding sees itself, so that it is a number
        logits = self.through_layers() if self.layers is None else self.through_plain_layers()
        if self.grows:
            self.seen.index_copy_(1, self.clock.time, self.clock.valid[:, None])
        advance(self.clock, self.position, self.rings)
        return logits

    def through_plain_layers(self) -> Tensor:
        """By `PlainLayer`."""
        assert self.layers is not None
        modules = self.stack.embed_tokens, self.stack.rotary_emb
        hidden, rope, sinks, leaving = begin(*modules, self.ids, self.position, self.limit, self.clock, self.rings)
        back = self.each(dict(zip(self.rings.windows, leaving, strict=True)))
        moments = iter(self.now([] if sinks is None else [sinks] * len(self.mixers), back))
        for layer in self.layers:
            layer(hidden, rope, self.clock.time, self.seen, next(moments) if layer.mixer is not None else None)
        return self.logits_of(normed(hidden, norm_of(self.stack.norm)))[:, None]

    def logits_of(self, hidden: Tensor) -> Tensor:
        """`[B, vocab]`, as `head` gives them, of hidden `[B, hidden]`."""
        output = self.head.output
        if type(output) is not nn.Linear:  # a quantised one
            return self.head(hidden)
        return self.head.family.logits(self.head.config, product(hidden, (output.weight, output.bias)))

    def clamped(self) -> Tensor:
        """The position from which queries see the sinks: within the length that the model was trained at."""
        return self.position.clamp(max=self.limit - 1)

    def leaving(self) -> dict[int, Tensor]:
        """The position `[B, 1]` of the token whose place the new one takes, by window, where keys are turned back."""
        rings = zip(self.rings.windows, self.rings.parts(), strict=True)
        return {window: ring.index_select(1, self.clock.time % window) for window, ring in rings}

    def each(self, by_window: Mapping[int, Any]) -> list[Any]:
        """What there is for each layer that turns keys back, by its window; None for the others."""
        return [by_window[_window(mixer)] if mixer.config.turns_back else None for mixer in self.mixers]

    def through_layers(self) -> Tensor:
        """By the model's own forward."""
        sinks, back = (
            [None if rope is None else tuple(x[:, 0] for x in rope) for rope in ropes(self.stack, positions)]
            for positions in ([self.clamped()] * len(self.mixers), self.each(self.leaving()))
        )
        output = self.stack(
            input_ids=self.ids,
            position_ids=self.position,
            attention_mask=self.ids.new_zeros(1, 1, 1, 1),  # nobody looks at it; a 4-D one is taken as it is
            use_cache=False,
            tokens=self.now(sinks, back),
        )
        return self.head(output.last_hidden_state)

    def now(self, sinks: list[Any], back: list[Any]) -> list[Moment]:
        """Every layer's moment, with cos and sin `[B, R]` for its sinks, without any of which they are met as tokens
        are, and for turning back the key that leaves its window, or None."""
        tokens = None
        if self.by_operations:
            far, leaving = map(self.of_layers, (sinks, back))
            tokens = of_step(self.clock, far if sinks else None, leaving)
        each = zip(self.moments, sinks or [None] * len(self.moments), back, strict=True)
        return [moment._replace(sink_rope=sink, leaving_rope=rope, tokens=tokens) for moment, sink, rope in each]

    def of_layers(self, ropes: list[Any]) -> list[Any]:
        """Of each converted layer to each layer, `[B, R]` to `[B, 1, R]`."""
        found: list[Any] = [None] * len(self.growing)
        for mixer, rope in zip(self.mixers, ropes, strict=False):
            found[mixer.layer_idx] = rope and tuple(x[:, None] for x in rope)
        return found

    def take(self, cache: Cache, mask: Tensor | None = None) -> None:
        """The cache's tokens come into the buffers, and its layers show these from now on; `mask` `[B, tokens]` is 0 at
        padding."""
        layers: list[MixerCacheLayer] = [layer for layer in cache.layers if isinstance(layer, MixerCacheLayer)]
        for layer in layers:
            layer.settle()  # another model's decoder may have them
        self.time = layers[0].seen
        if self.grows:
            self.reserve(self.time)
            self.seen.zero_()
            self.seen[:, : self.time] = True if mask is None else mask[:, : self.time].bool()
        for layer, kept in zip(cache.layers, self.growing, strict=True):
            if kept is not None:
                kept.take(*(getattr(layer, name) for name in _growing_names(layer)))
                _show_growing(layer, kept, self.time)
        self.clock.time.fill_(self.time)
        self.clock.real.copy_(layers[0].real)
        self.clock.sink_time.copy_(layers[0].sink_time)
        for layer, (_, held, *_) in zip(layers, self.moments, strict=True):
            M, back = layer.sink_keys.shape[1], layer.seen % max(layer.keys.shape[1], 1)
            for whole, sinks, ring in (
                (held.keys, layer.sink_keys, layer.keys),
                (held.values, layer.sink_values, layer.values),
            ):
                whole[:, :, :M].copy_(sinks.transpose(1, 2))
                whole[:, :, M:].copy_(ring.roll(back, 1).transpose(1, 2))
            for name in ("valid", "positions", *Memory._fields):
                if (x := getattr(layer, name)) is not None:
                    getattr(held, name).copy_(x.roll(back, 1) if name in RINGS else x)
            self._show(layer, held)
            layer.lender = self
        own, self.taken = weakref.ref(self), self.state()

        def gone(reference: Any, ending: Any = sys.is_finalizing) -> None:  # bound: at the end modules are empty
            if not ending() and (decoder := own()) is not None:
                decoder.forget(reference)

        self.lent = [weakref.ref(layer, gone) for layer in cache.layers]

    def _show(self, layer: MixerCacheLayer, held: Held) -> None:
        parts = layer.sink_keys.shape[1], layer.keys.shape[1]
        layer.sink_keys, layer.keys = held.keys.transpose(1, 2).split(parts, dim=1)
        layer.sink_values, layer.values = held.values.transpose(1, 2).split(parts, dim=1)
        layer.real, layer.sink_time = self.clock.real, self.clock.sink_time
        for name in ("valid", "positions", *Memory._fields):
            if getattr(layer, name) is not None:
                setattr(layer, name, getattr(held, name))

    def forget(self, reference: Any) -> None:
        """The cache of this layer is gone: what grew with it is free, unless another has been lent meanwhile."""
        with turn:
            if not self.grows or all(reference is not other for other in self.lent):
                return
            self.graph, self.logits, self.lent = None, None, []
            self.seen = self.seen.new_zeros(len(self.seen), 0)
            for kept in self.growing:
                if kept is not None:
                    kept.reserve(0)

    def release(self) -> None:
        """The layers that show these buffers get tensors of their own again, in the cache's order."""
        with turn:
            for reference, kept in zip(self.lent, self.growing if self.lent else (), strict=True):
                if (layer := reference()) is not None:
                    self._return(layer, kept)
            self.lent = []

    def _return(self, layer: Any, kept: Growing | None) -> None:
        names = _growing_names(layer)
        if kept is not None and kept.holds(getattr(layer, names[0])):
            for name in names:
                setattr(layer, name, getattr(layer, name).clone(memory_format=torch.contiguous_format))
        if isinstance(layer, MixerCacheLayer) and layer.lender is self:
            back = -(layer.seen % max(layer.keys.shape[1], 1))
            for name in (*RINGS, *REST):
                if (x := getattr(layer, name)) is not None:
                    x = x.roll(back, 1) if name in RINGS else x
                    setattr(layer, name, x.clone(memory_format=torch.contiguous_format))
            layer.valid = layer.valid.bool()
            layer.lender = None


def _window(mixer: LinearizedAttention) -> int:
    """Tokens that its cache keeps."""
    return 0 if mixer.config.local == "none" else mixer.config.window


def _growing(attention: Any, like: Tensor) -> Growing | None:
    """What a layer keeps of all tokens, if it keeps anything; `like` `[B, 0, D]`."""
    original = original_of(attention)
    config = original.config
    heads = config.num_key_value_heads
    if isinstance(attention, LinearizedAttention):
        heads = 0 if attention.softmax_heads is None else len(attention.softmax_heads.chosen)
    if not heads:
        return None
    groups = config.num_attention_heads // config.num_key_value_heads
    return Growing((groups * heads, heads), rotation_of(original), attention.scaling, like)


def _growing_names(layer: Any) -> tuple[str, str]:
    """Where a cache's layer has keys and values of all tokens."""
    return GROWS if isinstance(layer, MixerCacheLayer) else ("keys", "values")


def _show_growing(layer: Any, kept: Growing, tokens: int) -> None:
    for name, x in zip(_growing_names(layer), kept.shown(tokens), strict=True):
        setattr(layer, name, x)


def _empty(
    mixer: LinearizedAttention, valid: Tensor, positions: Tensor | None, sinks: int, weight: Tensor, tokens: Tokens
) -> Held:
    """Buffers of one layer before the first token; `valid` and `positions` are those of all layers of its window."""
    batch, window = valid.shape
    shape = batch, mixer.layer.num_key_value_heads, sinks + window if window else 0, mixer.head_dim
    keys, values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
    memory = mixer.no_memory(weight, tokens) or [torch.zeros(0, device=weight.device)]
    return Held(keys, values, valid, *memory)._replace(positions=positions if mixer.config.turns_back else None)


def _signature(model: PreTrainedModel) -> tuple[int, ...]:
    """Changes when a parameter, a buffer or a mixer is another one."""
    addresses = (x.data_ptr() for x in chain(model.parameters(), model.buffers()))
    return (*addresses, *(id(module) for module in model.modules() if isinstance(module, LinearizedAttention)))
