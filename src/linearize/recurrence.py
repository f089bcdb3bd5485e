"""The recurrent branch of a converted layer: gate, feature map, operator and readout, each chosen by name."""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from linearize.cache import Memory
from linearize.convolution import ShortConvolution
from linearize.features import Linear, feature_map, feature_size
from linearize.gates import Gate
from linearize.ops import gated_linear
from linearize.ops.liger import wide
from linearize.readouts import READOUTS, Read
from linearize.structures import STRUCTURES
from linearize.structures.base import AnyInputs, Layer
from linearize.tokens import Tokens


class Parts(NamedTuple):
    """What a recurrence is made of, before feature maps."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, T, KV, D]
    v: Tensor  # [B, T, KV, D]
    gate: Tensor  # [B, T, KV, P], as `Gate` makes it


class Recurrence(nn.Module):
    """One module for all that a branch may learn, so that PEFT can save it whole."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        config = layer.config
        self.layer, self.structure = layer, STRUCTURES[config.structure]
        maps = "none" if self.structure.own_features else config.feature_map
        self.map_q = feature_map(maps, layer.num_heads, layer.head_dim, config.shifts)
        keys = "none" if self.structure.own_keys else maps
        self.map_k = feature_map(keys, layer.num_key_value_heads, layer.head_dim, config.shifts)
        key_size = feature_size(config.feature_map, layer.head_dim, config.shifts)
        self.gate = Gate(self.structure, layer, key_size)
        self.readout = READOUTS["denominator" if config.shares_normalizer else config.readout](layer)
        if config.convolution is not None:
            self.convolved = [layer.num_key_value_heads] * 2  # heads, of k and v or of q, k and v
            if silu := config.convolution_form == "silu":
                self.convolved = [layer.num_heads, *self.convolved]
            size = config.convolution, sum(self.convolved), layer.head_dim
            self.convolution = ShortConvolution(*size, silu, seed=layer.layer_idx)
        if config.bonus:
            self.bonus = nn.Parameter(torch.empty(layer.num_key_value_heads, key_size))

    def reset_parameters(self) -> None:
        """The bonus of every channel is 1: the current token is read as others are."""
        if hasattr(self, "bonus"):
            initialization.ones_(self.bonus)

    def forward(
        self,
        hidden: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotated: tuple[Tensor, Tensor],
        tokens: Tokens,
        memory: Memory | None,
        leaving: tuple[Tensor, Tensor] | None,
    ) -> tuple[Read, Memory]:
        """q `[B, T, H, D]`, k and v `[B, T, KV, D]` before RoPE, q and k `rotated` by it; behind the window, `leaving`
        are keys, as the recurrence reads them, and values of those up to T tokens of a cache that leave it now."""
        parts, recent = self.parts(hidden, q, k, v, rotated, tokens, memory)
        real, gates = tokens.valid, None
        if self.layer.config.is_behind:
            parts, real, gates = self._delayed(parts, tokens, memory, leaving)
        inputs = self.inputs(parts)
        if real is not None:  # padding neither decays nor writes
            inputs = _masked(inputs, real)
        operator = self.structure.operator
        if hasattr(self, "bonus"):
            operator = partial(gated_linear.with_bonus, bonus=self.bonus.float())
        state = None if memory is None else wide(memory.state)
        read = self.readout(lambda given: operator(*given, state=state, document=tokens.document), inputs, hidden)
        return read, Memory(read.state, recent, gates)

    def parts(
        self,
        hidden: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotated: tuple[Tensor, Tensor],
        tokens: Tokens,
        memory: Memory | None,
    ) -> tuple[Parts, Tensor | None]:
        """Of every token, and the tokens that the next call convolves."""
        gate, recent = self.gate(hidden, q, k, v), None
        if self.layer.config.rope == "both":
            q, k = rotated
        if hasattr(self, "convolution"):
            parts = [q, k, v][-len(self.convolved) :]
            made, recent = self.convolution(
                torch.cat(parts, dim=2), memory and memory.recent, tokens.valid, tokens.document
            )
            *first, k, v = made.split(self.convolved, dim=2)
            q = first[0] if first else q
        return Parts(q, k, v, gate), recent

    def inputs(self, parts: Parts) -> AnyInputs:
        """What the operator takes but for state and document."""
        q, k, v, gate = parts
        return self.structure.inputs(self._mapped(self.map_q, q), self._mapped(self.map_k, k), v, gate, self.layer)

    def _mapped(self, feature_map: Any, x: Tensor) -> Tensor:
        """By the feature map, and of length 1 if that is the structure's way."""
        if self.structure.unit:
            return feature_map.unit(x) if type(feature_map) is Linear else F.normalize(feature_map(x), dim=-1)
        return feature_map(x)

    def _delayed(
        self, parts: Parts, tokens: Tokens, memory: Memory | None, leaving: tuple[Tensor, Tensor] | None
    ) -> tuple[Parts, Tensor, Tensor]:
        """Token t - W enters at t, with its own gate; sinks do not, since the window goes on seeing them. Beside the
        parts, whether there is such a token `[B, T]`, and the gates of the last W, as `Memory` has them."""
        config, (_, T, _, P) = self.layer.config, parts.gate.shape
        real = tokens.position >= config.sinks
        if tokens.valid is not None:
            real = real & tokens.valid
        late = parts.k, parts.v, parts.gate
        if memory is None or leaving is None:
            keys, values, gates = (F.pad(x, (0, 0, 0, 0, config.window, 0)) for x in late)
            real = F.pad(real, (config.window, 0))
        else:
            assert memory.late_gates is not None
            waiting = wide(memory.late_gates)
            before = *leaving, waiting.nan_to_num()[..., :P]
            keys, values, gates = (torch.cat(pair, dim=1) for pair in zip(before, late, strict=True))
            real = torch.cat([~waiting[:, :, 0, 0].isnan(), real], dim=1)
        delayed = parts._replace(k=keys[:, :T], v=values[:, :T], gate=gates[:, :T])
        there = real[:, :T]
        if tokens.document is not None:
            there = there & (F.pad(tokens.document, (config.window, 0), value=-1)[:, :T] == tokens.document)
        waits = gates[:, T:] if P > 0 else F.pad(gates[:, T:], (0, 1))
        return delayed, there, torch.where(real[:, T:, None, None], waits, torch.nan)


def _masked(inputs: Any, real: Tensor) -> Any:
    """Tokens that are not `real` `[B, T]` neither write nor decay."""
    here = real[:, :, None, None]
    fields = {name: getattr(inputs, name) * here for name in ("k", "log_g") if name in inputs._fields}
    return inputs._replace(**fields)
