"""The recurrent branch of a converted layer: gate, feature map, operator and readout, each chosen by name."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from linearize.cache import Memory
from linearize.convolution import ShortConvolution
from linearize.features import feature_map, feature_size
from linearize.gates import Gate
from linearize.ops import gated_linear
from linearize.ops.liger import wide
from linearize.ops.local import Past
from linearize.readouts import READOUTS, Read
from linearize.structures import STRUCTURES
from linearize.structures.base import AnyInputs, Layer
from linearize.tokens import Tokens


class Recurrence(nn.Module):
    """One module for all that a branch may learn, so that PEFT can save it whole."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        config = layer.config
        self.layer, self.structure = layer, STRUCTURES[config.structure]
        self.behind = config.mixing == "shared_normalizer" and config.local != "none"
        maps = "none" if self.structure.own_features else config.feature_map
        self.map_q = feature_map(maps, layer.num_heads, layer.head_dim)
        keys = "none" if self.structure.own_keys else maps
        self.map_k = feature_map(keys, layer.num_key_value_heads, layer.head_dim)
        key_size = feature_size(config.feature_map, layer.head_dim)
        self.gate = Gate(self.structure, layer, key_size)
        self.readout = READOUTS["denominator" if self.behind else config.readout](layer)
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
        past: Past | None,
    ) -> tuple[Read, Memory]:
        """q `[B, T, H, D]`, k and v `[B, T, KV, D]` before RoPE, q and k `rotated` by it; `past` is the window's."""
        inputs, recent = self.inputs(hidden, q, k, v, rotated, tokens, memory)
        if tokens.valid is not None:  # padding neither decays nor writes
            inputs = _masked(inputs, tokens.valid)
        keys = gates = None
        if self.behind:
            inputs, keys, gates = self._delayed(inputs, tokens, memory, past)
        operator = self.structure.operator
        if hasattr(self, "bonus"):
            operator = partial(gated_linear.with_bonus, bonus=self.bonus.float())
        state = None if memory is None else wide(memory.state)
        read = self.readout(lambda given: operator(*given, state=state, document=tokens.document), inputs, hidden)
        return read, Memory(read.state, recent, keys, gates)

    def inputs(
        self,
        hidden: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotated: tuple[Tensor, Tensor],
        tokens: Tokens,
        memory: Memory | None,
    ) -> tuple[AnyInputs, Tensor | None]:
        """What the operator takes but for state and document, and the tokens that the next call convolves."""
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
        return self.structure.inputs(self.map_q(q), self.map_k(k), v, gate, self.layer), recent

    def _delayed(
        self, inputs: Any, tokens: Tokens, memory: Memory | None, past: Past | None
    ) -> tuple[Any, Tensor, Tensor]:
        """Token t - W enters at t, with its own gate; sinks do not, since the window goes on seeing them."""
        window, T = self.layer.config.window, inputs.k.shape[1]
        written = inputs.k * (tokens.position >= self.layer.config.sinks)[:, :, None, None]
        keys, gates = (
            F.pad(x, (0, 0, 0, 0, window, 0)) if before is None else torch.cat([before, x], dim=1)
            for x, before in (
                (written, memory and memory.late_keys),
                (inputs.log_g, memory and memory.late_gates),
            )
        )
        values = F.pad(inputs.v, (0, 0, 0, 0, window, 0)) if past is None else torch.cat([past.v, inputs.v], dim=1)
        delayed = inputs._replace(k=keys[:, :T], v=values[:, :T], log_g=gates[:, :T])
        if tokens.document is not None:
            before = F.pad(tokens.document, (window, 0), value=-1)[:, :T]
            delayed = _masked(delayed, before == tokens.document)
        return delayed, keys[:, T:].clone(), gates[:, T:].clone()


def _masked(inputs: Any, real: Tensor) -> Any:
    """Tokens that are not `real` `[B, T]` neither write nor decay."""
    here = real[:, :, None, None]
    fields = {name: getattr(inputs, name) * here for name in ("k", "log_g") if name in inputs._fields}
    return inputs._replace(**fields)
