"""Liger Attention: a gated recurrence and a softmax window on one set of projections (arXiv 2503.01496)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.cache import Memory, MixerCacheLayer
from linearize.config import MixerConfig
from linearize.errors import LinearizeError
from linearize.families import Family, rotation_of, unrotated
from linearize.growing import Growing
from linearize.heads import SoftmaxHeads
from linearize.mixing import MIXINGS, DataDependent
from linearize.ops import liger
from linearize.ops import step as stepping
from linearize.ops.dispatch import kernel_dtype, narrowed
from linearize.ops.local import NEVER, Past, Scoring, Sinks, local_attention
from linearize.readouts import EPSILON, RMS, Gated, SoftRMS
from linearize.recurrence import Recurrence
from linearize.structures.base import Layer
from linearize.structures.lightning import rates
from linearize.tokens import Tokens

TEXT: dict[str, tuple[Any, ...]] = {  # values of settings that kernels for a whole text know: the published ones
    "local": ("window",), "score": ("softmax",), "readout": ("none",), "rope": ("local",), "gate_source": ("k",),
    "time_scales": (None,), "convolution": (None,), "bonus": (False,), "behind": (False,),
    "mixing": ("fixed", "per_head"),
}  # fmt: skip
STEP = TEXT | {"readout": ("none", "rms", "soft_rms", "gated"), "mixing": ("fixed", "per_head", "data_dependent")}
DELTA_STEP = STEP | {"gate_source": ("k", "learned")}
BEHIND_STEP = STEP | {"behind": (True,), "gate_source": ("learned",), "rope": ("local", "both", "none")}


class Moment(NamedTuple):
    """A decoding step as one layer knows it."""

    clock: stepping.Clock
    held: stepping.Held
    settings: liger.Settings | None  # of `ops.step`, as `step_settings` has them
    mixing: Tensor  # [H]
    decay: Tensor | None  # [KV], lightning's
    inputs: list[nn.Parameter]  # whose products with the layer's input `step` takes
    sink_rope: liger.Rope | None = None  # cos and sin `[B, R]` with which queries meet the sinks
    leaving_rope: liger.Rope | None = None  # those of the token that leaves the window, if its key is turned back
    tokens: Tokens | None = None  # the token of each row, for layers that `ops.step` does not serve alone
    growing: Growing | None = None  # where there are heads that stay softmax attention
    seen: Tensor | None = None  # [B, room]: the tokens that these see


def parts(attention: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """What an attention module holds itself, by name: its modules and its own parameters."""
    return dict(attention.named_children()) | dict(attention.named_parameters(recurse=False))


class LinearizedAttention(nn.Module):
    """Takes an attention module's place and its submodules, under their names: nothing is copied.

    The module it replaces stays reachable as `original` (not registered, so that no parameter is counted twice).
    What a conversion adds is in `recurrence` and `mixing`. The key/value heads `kept`, with their query heads, stay
    as they are: `softmax_heads`; all else is of the others.
    """

    def __init__(self, attention: nn.Module, family: Family, config: MixerConfig, kept: tuple[int, ...] = ()) -> None:
        super().__init__()
        base: Any = attention
        self.config, self.family, self._original = config, family, (attention,)
        self.layer_idx, self.head_dim, self.scaling = base.layer_idx, base.head_dim, base.scaling
        for name, own in parts(attention).items():
            setattr(self, name, own)
        self.num_heads = base.config.num_attention_heads
        self.num_key_value_heads = base.config.num_key_value_heads
        self.softcap = None if family.softcap is None else getattr(base, family.softcap)
        self.rotate = unrotated if config.rope == "none" else rotation_of(base)
        self.softmax_heads = SoftmaxHeads(kept, base) if kept else None
        groups, converted = self.num_heads // self.num_key_value_heads, self.num_key_value_heads - len(kept)
        place = base.layer_idx, base.config.num_hidden_layers, groups * converted, converted
        layer = Layer(config, *place, base.head_dim, base.config.hidden_size)
        self.recurrence: nn.Module | None = None
        self.mixing: nn.Module | None = None  # None where there is one branch
        if config.structure != "none":
            self.recurrence = Recurrence(layer)
            if config.local != "none":
                self.mixing = MIXINGS[config.mixing](layer)
        self.ablated: str | None = None  # the branch, "recurrence" or "window", left out to see what it does
        self.layer, self.kernel = layer, self._kernel(layer, TEXT)
        if not any(parameter.is_meta for parameter in self.parameters()):  # else: when there are values
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """What the conversion adds, as it starts; parameters that were loaded keep their values."""
        if self.softmax_heads is not None:
            device = self.softmax_heads.order.device
            self.softmax_heads.place(next(self.parameters()).device if device.type == "meta" else device)
        for branch in (self.recurrence, self.mixing):
            for module in () if branch is None else branch.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()

    @property
    def original(self) -> nn.Module:
        """The softmax attention that this replaces; it shares its submodules."""
        return self._original[0]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        tokens: Tokens | list[Moment] | None = None,
        attention_mask: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states `[B, T, hidden]` to the same; `tokens` come from the hook that `convert` sets, or, for one
        token whose step `decoding` runs, from there; `attention_mask` and `others` are for heads that stay softmax
        attention."""
        if tokens is None:
            raise LinearizeError(
                f"layer {self.layer_idx} ({type(self.original).__name__}) got no description of its tokens: "
                "its decoder layer drops keyword arguments, so this family cannot be converted"
            )
        output_projection = getattr(self, self.family.projections[-1])
        if isinstance(tokens, list):
            heads = torch.cat(self.family.project(self, hidden_states), dim=2)[:, 0]
            cos, sin = (x[:, 0].expand(len(heads), -1) for x in position_embeddings)
            read = self.step(hidden_states, heads, (cos, sin), tokens[self.layer_idx])
            return output_projection(read.flatten(1)[:, None]), None
        cache: MixerCacheLayer | None = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        past: Past | None = None if cache is None else cache.past()
        memory: Memory | None = None if cache is None else cache.memory
        q, k, v = self.family.project(self, hidden_states)
        own = None
        if self.softmax_heads is not None:
            (q, own_q), (k, own_k), (v, own_v) = map(self.softmax_heads.split, (q, k, v))
            own = self.softmax_heads(own_q, own_k, own_v, position_embeddings, attention_mask, cache, **others)
        rotated: tuple[Tensor, Tensor] = self.rotate(q, k, *position_embeddings, unsqueeze_dim=2)
        sinks = normalizer = None
        if self.config.local != "none":
            before = None if past is None or cache is None else (cache.sink_keys, cache.sink_values)
            sinks = self.document_sinks(q, rotated[1], v, tokens, before)
        output, state = None, None
        for_kernels = tokens.in_one_piece if past is None else self.window_is_full(sinks, past, tokens)
        if for_kernels:
            output, state = self.fused(q, k, v, position_embeddings, sinks, past, memory, tokens, cache)
        if state is not None:
            memory = Memory(state)
        elif sinks is not None and self.ablated != "window":
            if for_kernels:
                output = self.windowed(q, k, v, position_embeddings, sinks, past, tokens)
            if output is None:
                output, normalizer = self.local(*rotated, v, sinks, past, tokens)
        if self.recurrence is not None and self.ablated != "recurrence" and state is None:
            leaving = self.leaving(past, tokens)
            read, memory = self.recurrence(hidden_states, q, k, v, rotated, tokens, memory, leaving)
            output = self.mixed(read, output, normalizer, hidden_states)
        if cache is not None:
            kept = (k[:, :0], v[:, :0]) if sinks is None else (sinks.k.detach(), sinks.v.detach())
            window = 0 if sinks is None else self.config.window
            carried = None if memory is None else self.carried(memory)
            positions = tokens.rope_position if self.config.turns_back else None
            sinks_kept = *kept, tokens.sink_time
            cache.store(rotated[1], v, tokens.valid, positions, window, sinks_kept, tokens.real, carried)
        output = torch.zeros_like(q) if output is None else output
        if self.softmax_heads is not None and own is not None:
            output = self.softmax_heads.join(output, own)
        return output_projection(output.flatten(2).to(hidden_states.dtype)), None

    def _kernel(self, layer: Layer, known: Mapping[str, tuple[Any, ...]]) -> liger.Settings | str:
        """What fused kernels that know these values of settings are to be told, or why there is none for such a
        layer."""
        config, own = self.config, layer.config.model_dump()
        name = "mlstm" if config.structure == "gated_retention" else config.structure
        others = [f"{key} {own[key]}" for key, values in known.items() if own[key] not in values]
        if apart := [other for other in others if not other.startswith("mixing ")]:
            return f"no kernel for {', '.join(apart)}"
        if name not in liger.GATES | liger.DELTA or others:
            return f"no kernel for structure {name} with mixing {config.mixing}"
        if self.family.softcap or self.family.null_logits or not self.family.rotates_halves:
            return f"no kernel for the attention of {type(self.original).__name__}"
        lower = layer.layer_idx / layer.num_layers if name == "hgrn2" else 0.0  # else layers share what is compiled
        fixed = self.scaling, config.gate_temperature, config.feature_map, config.window, config.sinks
        return liger.Settings(name, *fixed, lower, 1.0 + config.negative_eigenvalues)

    def fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: tuple[Tensor, Tensor],
        sinks: Sinks | None,
        past: Past | None,
        memory: Memory | None,
        tokens: Tokens,
        cache: MixerCacheLayer | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Output and final state of both branches by kernels, on a GPU; else nothing. A text from its beginning is one
        operator's; of one that goes on from a cache, the window is another's."""
        if self.recurrence is None or self.ablated:
            return None, None
        settings, rope = self.kernel, None if self.rotate is unrotated else angles
        if (dtype := kernel_dtype(v)) is not None:  # within autocast norms of q and k may leave them in fp32
            q, k, v = (x.to(dtype) for x in (q, k, v))
        reason = settings if isinstance(settings, str) else liger.why_not_fused(q, k, v, settings, tokens.first, rope)
        if isinstance(settings, str) or reason is not None:
            if q.is_cuda and self.config.structure not in liger.DELTA:  # whose branches have kernels of their own
                liger.warn_once(f"Liger Attention runs unfused, slower: {reason}")
            return None, None
        padded_right = cache is not None and tokens.valid is not None and not bool(tokens.valid[:, -1].all())
        if padded_right or tokens.sink_rope is not None:  # no state to go on from; a very long text
            return None, None
        mixing: Any = self.mixing
        decay = None
        if self.config.structure == "lightning":
            decay = -rates(self.layer, q.device).float()
        if hasattr(mixing, "weight"):
            weights = mixing.weight
        else:  # made where it is read: nothing is copied to a GPU while a graph is recorded
            weights = torch.full((self.layer.num_heads,), mixing.initial, device=q.device)
        if past is None:
            return liger.fused(q, k, v, weights, settings, rope, None, tokens.first, decay)
        assert sinks is not None
        assert memory is not None
        local = self.windowed(q, k, v, angles, sinks, past, tokens)
        if local is None:
            return None, None
        # the operator's own window begins at this call; a weight of 1 leaves the recurrence alone
        read, state = liger.fused(q, k, v, torch.ones_like(weights), settings, rope, memory.state, None, decay)
        return torch.lerp(local.float(), read.float(), weights[:, None].float()).to(local.dtype), state

    def step_settings(self) -> liger.Settings | None:
        """What `ops.step` is to be told: of the whole layer or, with gate "none", of the window alone, where the
        recurrence takes its step by operations; None where the window does as well."""
        delta = self.config.structure in liger.DELTA
        known = BEHIND_STEP if delta and self.config.behind else DELTA_STEP if delta else STEP
        whole, maps = self._kernel(self.layer, known), {*liger.FEATURES, *["linear", "products"] * delta}
        readout: Any = None if self.recurrence is None else self.recurrence.readout
        few = isinstance(readout, Gated) and readout.gate.first is readout.gate.up  # channels, and so one weight
        if isinstance(whole, str) or whole.feature_map not in maps or few:
            return self.plain_window()
        return whole

    def is_whole(self, settings: liger.Settings | None) -> bool:
        """Whether by these settings `ops.step` is all of a step, so that nothing else looks at the layer's input."""
        return settings is not None and (self.recurrence is None or settings.gate != "none")

    def moment(self, clock: stepping.Clock, held: stepping.Held) -> Moment:
        """With this layer's constants, at fixed addresses."""
        mixing: Any = self.mixing
        settings, decay, device = self.step_settings(), None, held.keys.device
        weights = torch.zeros(self.layer.num_heads)
        inputs: list[nn.Parameter] = []
        if settings is not None and settings.gate != "none":
            weights = mixing.bias if isinstance(mixing, DataDependent) else getattr(mixing, "weight", mixing.weights())
            inputs = self.step_inputs()
            if settings.gate == "lightning":
                decay = -rates(self.layer, device).float()
        return Moment(clock, held, settings, weights.detach().to(device), decay, inputs)

    def step_inputs(self) -> list[nn.Parameter]:
        """The weights of the layer's input in what the recurrence and the mixing make of it: first in the mixing, then
        in the gate, then in the readout, where these make something of it."""
        recurrence: Any = self.recurrence
        found = [self.mixing.weight] if isinstance(self.mixing, DataDependent) else []
        found += [recurrence.gate.learned.first] if self.config.gate_source == "learned" else []
        return found + ([recurrence.readout.gate.first] if isinstance(recurrence.readout, Gated) else [])

    def beyond(self, made: Tensor, inputs: list[nn.Parameter]) -> stepping.Beyond:
        """What `ops.step` takes besides, of the products `[B, ...]` of the layer's input with `inputs`, which are
        `step_inputs`."""
        recurrence: Any = self.recurrence
        parts = iter(made.split([weight.shape[0] for weight in inputs], dim=1))
        maps = mixing = gate = opening = None
        if self.config.feature_map in ("linear", "products"):
            maps = tuple(getattr(x, name) for x in (recurrence.map_q, recurrence.map_k) for name in ("down", "up"))
        if isinstance(self.mixing, DataDependent):
            mixing = next(parts)
        if self.config.gate_source == "learned":
            gate = recurrence.gate.learned.after(next(parts)).unflatten(1, (self.layer.num_key_value_heads, -1))
        if isinstance(recurrence.readout, Gated):
            opening = next(parts), recurrence.readout.gate.up
        if isinstance(recurrence.readout, SoftRMS):
            return stepping.Beyond(maps, gate, mixing, 0.0, opening, floor=recurrence.readout.log_floor)
        return stepping.Beyond(maps, gate, mixing, EPSILON if isinstance(recurrence.readout, RMS) else None, opening)

    def step(
        self, hidden: Tensor, heads: Tensor, rope: liger.Rope, moment: Moment, made: Tensor | None = None
    ) -> Tensor:
        """Both branches for one token of each row: `[B, H, D]`, of the layer's input `[B, 1, hidden]` and `heads`
        `[B, H + 2 KV, D]`, its q, k and v. By `ops.step` as far as that goes, and by the forward's own operations.
        `made` `[B, ...]` are the products of the input with the moment's `inputs`, where they are known."""
        if self.softmax_heads is None:
            return self.step_of_others(hidden, heads, rope, moment, made)
        heads, own = self.softmax_heads.split_step(heads)
        others = self.step_of_others(hidden, heads, rope, moment, made)
        growing: Any = moment.growing
        kept = growing.attend(own, rope, moment.clock.time, moment.seen)
        return self.softmax_heads.join(others[:, None], kept[:, None])[:, 0]

    def step_of_others(
        self, hidden: Tensor, heads: Tensor, rope: liger.Rope, moment: Moment, made: Tensor | None
    ) -> Tensor:
        """As `step`, of the heads that do not stay softmax attention."""
        clock, held, settings, mixing, decay, inputs, sink_rope, leaving_rope, tokens, *_ = moment
        output = normalizer = past = before = None
        late = self.config.is_behind and not self.is_whole(settings)  # the window's oldest token is wanted as well
        if self.config.local != "none" and (settings is None or late):
            past, before = stepping.past_of(clock, held)
        if settings is not None:
            plain = self.rotate is unrotated
            near, far, back = (None, None, None) if plain else (rope, sink_rope, leaving_rope)
            beyond = stepping.NOTHING
            if settings.gate != "none":
                if made is None:
                    made = torch.cat([hidden[:, 0, :0], *(F.linear(hidden[:, 0], weight) for weight in inputs)], dim=1)
                beyond = self.beyond(made, inputs)._replace(leaving=back)
            output = stepping.step(heads, mixing, settings, near, far, clock, held, decay, beyond)
            if self.is_whole(settings):
                return output
            output = output[:, None]
        assert tokens is not None
        q, k, v = heads[:, None].split([self.layer.num_heads, *2 * [self.layer.num_key_value_heads]], dim=2)
        rotated: tuple[Tensor, Tensor] = q, k
        if settings is None or self.config.rope == "both":  # else nobody looks at them
            rotated = self.rotate(q, k, *(x[:, None] for x in rope), unsqueeze_dim=2)
        if settings is None and self.config.local != "none":
            sinks = self.document_sinks(q, rotated[1], v, tokens, before)
            output, normalizer = self.local(*rotated, v, sinks, past, tokens)
            stepping.keep(rotated[1][:, 0], v[:, 0], self.config.window, self.config.sinks, clock, held)
        if self.recurrence is not None:
            memory = stepping.memory_of(clock, held)
            read, after = self.recurrence(hidden, q, k, v, rotated, tokens, memory, self.leaving(past, tokens))
            stepping.keep_memory(self.carried(after), clock, held)
            output = self.mixed(read, output, normalizer, hidden)
        assert output is not None
        return output[:, 0].to(hidden.dtype)

    def leaving(self, past: Past | None, tokens: Tokens) -> tuple[Tensor, Tensor] | None:
        """What a recurrence behind the window takes in of the window's `past` in this call: keys as it reads them, and
        values, `[B, up to T, KV, D]`."""
        if past is None or not self.config.is_behind:
            return None
        k, v = past.k[:, : tokens.length], past.v[:, : tokens.length]
        if self.config.turns_back:
            ropes: Any = tokens.leaving_rope
            turned = liger.wide(k)
            _, turned = self.rotate(turned, turned, *liger.inverse(ropes[self.layer_idx]), unsqueeze_dim=2)
            k = turned.to(k.dtype)
        return k, v

    def no_memory(self, like: Tensor, tokens: Tokens) -> Memory | None:
        """What the recurrence carries before the first token, in zeros, as it makes it of the `tokens` of a step; in
        the dtype and on the device of `like` but for what is in fp32."""
        if self.recurrence is None:
            return None
        assert tokens.valid is not None
        batch, KV = len(tokens.valid), self.layer.num_key_value_heads
        hidden = like.new_zeros(batch, 1, self.layer.hidden_size)
        q, k, v = (like.new_zeros(batch, 1, heads, self.head_dim) for heads in (self.layer.num_heads, KV, KV))
        _, memory = self.recurrence(hidden, q, k, v, (q, k), tokens, None, None)
        state, recent, late = self.carried(memory)
        recent = None if recent is None else torch.zeros_like(recent)
        return Memory(torch.zeros_like(state), recent, None if late is None else torch.full_like(late, torch.nan))

    def carried(self, memory: Memory) -> Memory:
        """As a cache keeps it."""
        dtype: torch.dtype = getattr(torch, self.config.state_dtype)
        if dtype == torch.float32:
            return memory
        late = None if memory.late_gates is None else narrowed(memory.late_gates, dtype)
        return Memory(narrowed(memory.state, dtype), memory.recent, late)

    def scoring(self) -> Scoring:
        """How queries and keys of the softmax branch become weights: as in the original, unless `score` says else."""
        null_logits = None if self.family.null_logits is None else getattr(self, self.family.null_logits)
        power = self.config.score_power if self.config.score == "softplus_reweighted" else None
        shared = self.config.mixing == "shared_normalizer"
        return Scoring(self.scaling, shared, self.softcap, null_logits, power)

    def plain_window(self) -> liger.Settings | None:
        """What kernels of the softmax branch alone are to be told; None where it is another than they know."""
        scale, normalizer, *special = self.scoring()
        if self.config.local != "window" or normalizer or any(x is not None for x in special):
            return None
        if not self.family.rotates_halves:
            return None
        return liger.Settings("none", scale, window=self.config.window, sinks=self.config.sinks)

    def local(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Sinks, past: Past | None, tokens: Tokens
    ) -> tuple[Tensor, Tensor | None]:
        """The softmax branch over rotated q and k: `[B, T, H, D]`, and its normaliser where that is wanted."""
        window, first = self.config.window, None
        if self.config.local == "block":
            first = torch.arange(q.shape[1], device=q.device) - tokens.position % window
        return local_attention(q, k, v, window, self.scoring(), sinks, past, tokens.valid, tokens.document, first)

    def window_is_full(self, sinks: Sinks | None, past: Past, tokens: Tokens) -> bool:
        """Whether several tokens go on where every row has a full window and no sink is still in it, so that kernels
        may take both for the beginning of the text."""
        if sinks is None or tokens.length == 1 or tokens.valid is not None:
            return False
        return bool(past.valid.all() & (sinks.time[:, : self.config.sinks] <= -self.config.window).all())

    def windowed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: tuple[Tensor, Tensor],
        sinks: Sinks,
        past: Past | None,
        tokens: Tokens,
    ) -> Tensor | None:
        """The softmax branch by a kernel of its own, from q and k before RoPE: on a GPU, for a text from its beginning
        or one that goes on as `window_is_full` says; else nothing."""
        settings, dtype, rope = self.plain_window(), kernel_dtype(v), None if self.rotate is unrotated else angles
        if settings is None or dtype is None or tokens.sink_rope is not None:
            return None
        before = 0
        if past is not None:  # sinks and window lead the text; what is rotated already turns by no angle
            before = settings.sinks + settings.window
            q = F.pad(q, (0, 0, 0, 0, before, 0))
            k = torch.cat([sinks.k[:, : settings.sinks], past.k, k], dim=1)
            v = torch.cat([sinks.v[:, : settings.sinks], past.v, v], dim=1)
            if rope is not None:
                rope = F.pad(rope[0], (0, 0, before, 0), value=1.0), F.pad(rope[1], (0, 0, before, 0))
        q, k, v = (x.to(dtype) for x in (q, k, v))
        if (reason := liger.why_not_windowed(q, k, v, settings, tokens.first, rope)) is not None:
            liger.warn_once(f"the window of Liger Attention runs without kernels, slower: {reason}")
            return None
        return liger.windowed(q, k, v, settings, rope, tokens.first)[:, before:]

    def mixed(self, read: Any, local: Tensor | None, normalizer: Tensor | None, hidden: Tensor) -> Tensor:
        """Both branches as one; the recurrence's output where it is the only one."""
        if local is None:
            return read.output
        assert self.mixing is not None
        log_ratio = None if normalizer is None or read.log_weight is None else read.log_weight - normalizer
        return self.mixing(read.output.to(local.dtype), local, hidden, log_ratio)

    def document_sinks(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, before: tuple[Tensor, Tensor] | None
    ) -> Sinks:
        """The sinks of every document, from this call and from `before`, keys and values; q before, k after RoPE."""
        sink_q = None
        if tokens.sink_rope is not None:
            sink_q, _ = self.rotate(q, q, *tokens.sink_rope[self.layer_idx], unsqueeze_dim=2)
        if tokens.sink_index is None:
            assert before is not None
            sink_k, sink_v = before
        else:
            index = tokens.sink_index[:, :, None, None]
            sink_k, sink_v = (x.gather(1, index.expand(-1, -1, *x.shape[2:])) for x in (k, v))
            if before is not None:
                assert tokens.sink_new is not None
                new = tokens.sink_new[:, :, None, None]
                sink_k, sink_v = torch.where(new, sink_k, before[0]), torch.where(new, sink_v, before[1])
        time = tokens.sink_time_from_start
        if self.config.sinks < tokens.sinks:  # another layer has more
            slot = torch.arange(time.shape[1], device=time.device) % tokens.sinks
            time = time.masked_fill(slot >= self.config.sinks, NEVER)
        return Sinks(sink_k, sink_v, time, tokens.sink_document, sink_q)

    def mixing_weights(self) -> Tensor:
        """The recurrence's weight in each head, `[H]` on the CPU."""
        mixing: Any = self.mixing
        return torch.ones(self.layer.num_heads) if mixing is None else mixing.weights()

    def extra_repr(self) -> str:
        """The settings, in `print(model)`."""
        return ", ".join(f"{name}={value}" for name, value in self.config.model_dump().items())
