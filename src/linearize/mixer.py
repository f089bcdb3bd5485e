"""Liger Attention: a gated recurrence and a softmax window on one set of projections (arXiv 2503.01496, eq. 8-10)."""

from typing import Any

import torch
from torch import Tensor, nn

from linearize.cache import MixerCacheLayer
from linearize.config import MixerConfig
from linearize.errors import LinearizeError
from linearize.families import Family, base_model_type, modeling
from linearize.features import FEATURE_MAPS, READOUTS
from linearize.gates import pooled
from linearize.ops.local import Scoring, Sinks, local_attention
from linearize.structures import STRUCTURES
from linearize.structures.base import AnyInputs, Layer, Structure
from linearize.tokens import Tokens


def _unrotated(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return q, k


class FixedMixing(nn.Module):
    """output = w · recurrent + (1 - w) · local, with one constant w (Liger, eq. 10; the paper's is 0.5)."""

    def __init__(self, config: MixerConfig, heads: int) -> None:
        super().__init__()
        self.value, self.heads = config.initial_mixing_weight, heads

    def weights(self) -> Tensor:
        """`[H]`."""
        return torch.full((self.heads,), self.value)

    def forward(self, recurrent: Tensor, local: Tensor) -> Tensor:
        """Both `[B, T, H, D]`."""
        return self.value * recurrent + (1 - self.value) * local


class PerHeadMixing(nn.Module):
    """As `FixedMixing`, with a learned w for each head: a module of its own, so that PEFT can save it."""

    def __init__(self, config: MixerConfig, heads: int) -> None:
        super().__init__()
        self.initial = config.initial_mixing_weight
        self.weight = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every head at the configured weight."""
        nn.init.constant_(self.weight, self.initial)

    def weights(self) -> Tensor:
        """`[H]`."""
        return self.weight.detach().float().cpu()

    def forward(self, recurrent: Tensor, local: Tensor) -> Tensor:
        """Both `[B, T, H, D]`."""
        w = self.weight[:, None].to(local.dtype)
        return w * recurrent + (1 - w) * local


MIXINGS = {"fixed": FixedMixing, "per_head": PerHeadMixing}


class LinearizedAttention(nn.Module):
    """Takes an attention module's place and its submodules, under their names: nothing is copied.

    The module it replaces stays reachable as `original` (not registered, so that no parameter is counted twice).
    """

    def __init__(self, attention: nn.Module, family: Family, config: MixerConfig) -> None:
        super().__init__()
        base: Any = attention
        self.config, self.family, self._original = config, family, (attention,)
        self.layer_idx, self.head_dim, self.scaling = base.layer_idx, base.head_dim, base.scaling
        self.o_proj: nn.Module  # every family's; the others are known to `family.project`
        for name, child in attention.named_children():
            setattr(self, name, child)
        self.num_heads = base.config.num_attention_heads
        self.num_key_value_heads = base.config.num_key_value_heads
        self.rotate = modeling(base_model_type(base.config.model_type)).apply_rotary_pos_emb
        if not getattr(base, "use_rope", True):  # SmolLM3 has layers without
            self.rotate = _unrotated
        place = base.layer_idx, base.config.num_hidden_layers, self.num_key_value_heads
        self.layer = Layer(config, *place)
        self.readout = READOUTS[config.readout]
        self.structure: Structure | None = STRUCTURES.get(config.structure)
        self.mixing: nn.Module = nn.Identity()  # what a window alone needs
        if self.structure is not None:
            self.mixing = MIXINGS[config.mixing](config, self.num_heads)

    @property
    def original(self) -> nn.Module:
        """The softmax attention that this replaces; it shares its submodules."""
        return self._original[0]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        tokens: Tokens | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states `[B, T, hidden]` to the same; `tokens` come from the hook that `convert` sets."""
        if tokens is None:
            raise LinearizeError(
                f"layer {self.layer_idx} ({type(self.original).__name__}) got no description of its tokens: "
                "its decoder layer drops keyword arguments, so this family cannot be converted"
            )
        cache: MixerCacheLayer | None = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        q, k, v = self.family.project(self, hidden_states)
        q_rotated, k_rotated = self.rotate(q, k, *position_embeddings, unsqueeze_dim=2)
        sinks = self.sinks(q, k_rotated, v, tokens, cache)
        past = None if cache is None else cache.past()
        scoring = Scoring(self.scaling)
        output, _ = local_attention(
            q_rotated, k_rotated, v, self.config.window, scoring, sinks, past, tokens.valid, tokens.document
        )
        state = None
        if self.structure is not None:
            recurrent, state = self.recurrent(q, k, v, tokens, None if cache is None else cache.state)
            output = self.mixing(recurrent.to(output.dtype), output)
        if cache is not None:
            kept = (sinks.k.detach(), sinks.v.detach(), tokens.sink_time)
            cache.store(k_rotated, v, tokens.valid, self.config.window, kept, tokens.real, state)
        return self.o_proj(output.flatten(2)), None

    def recurrent(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gated recurrence over unrotated q, k, v: `[B, T, H, D]`, and the state after the last token."""
        assert self.structure is not None
        inputs = self.inputs(q, k, v)
        if tokens.valid is not None:  # padding neither decays nor writes
            real = tokens.valid[:, :, None, None]
            names = {"k", "log_g"}.intersection(inputs._fields)  # not every structure decays
            inputs = inputs._replace(**{name: getattr(inputs, name) * real for name in names})
        operator = self.structure.operator
        return self.readout(lambda given: operator(*given, state, tokens.document), inputs)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor) -> AnyInputs:
        """What the structure makes of the projections before RoPE."""
        assert self.structure is not None
        map_ = FEATURE_MAPS["none" if self.structure.own_features else self.config.feature_map]
        gate = pooled(k, self.structure.gate_size(self.config, k.shape[-1]))
        return self.structure.inputs(map_(q), map_(k), v, gate.repeat(1, 1, 1, self.structure.gates), self.layer)

    def sinks(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, cache: MixerCacheLayer | None) -> Sinks:
        """The sinks of every document, from this call and the cache; q before, k after RoPE."""
        sink_q = None
        if tokens.sink_rope is not None:
            sink_q, _ = self.rotate(q, q, *tokens.sink_rope, unsqueeze_dim=2)
        if tokens.sink_index is None:
            assert cache is not None
            sink_k, sink_v = cache.sink_keys, cache.sink_values
        else:
            index = tokens.sink_index[:, :, None, None]
            sink_k, sink_v = (x.gather(1, index.expand(-1, -1, *x.shape[2:])) for x in (k, v))
            if cache is not None and cache.is_initialized:
                assert tokens.sink_new is not None
                new = tokens.sink_new[:, :, None, None]
                sink_k = torch.where(new, sink_k, cache.sink_keys)
                sink_v = torch.where(new, sink_v, cache.sink_values)
        return Sinks(sink_k, sink_v, tokens.sink_time_from_start, tokens.sink_document, sink_q)

    def mixing_weights(self) -> Tensor:
        """The recurrence's weight in each head, `[H]` on the CPU."""
        mixing: Any = self.mixing
        return mixing.weights()

    def extra_repr(self) -> str:
        """The settings, in `print(model)`."""
        return ", ".join(f"{name}={value}" for name, value in self.config.model_dump().items())
