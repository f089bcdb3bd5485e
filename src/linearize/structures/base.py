"""What a structure is: how projections become a recurrence's inputs, and the operator that runs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from linearize.config import MixerConfig


class Layer(NamedTuple):
    """Where a recurrence stands, for what differs from layer to layer and head to head."""

    config: MixerConfig
    feature_map: Callable[[Tensor], Tensor]
    layer_idx: int
    num_layers: int
    num_key_value_heads: int


class Inputs(NamedTuple):
    """What an operator takes. Padding is shut out by a key and a log decay of 0."""

    q: Float[Tensor, "B T H K"]
    k: Float[Tensor, "B T KV K"]
    v: Float[Tensor, "B T KV V"]
    log_g: Float[Tensor, "B T KV #K"]  # at most 0, in fp32; of size 1 where a head has one decay


class DeltaInputs(NamedTuple):
    """What the delta rule takes besides: how much of the old value under a key is erased, in [0, 2]."""

    q: Float[Tensor, "B T H K"]
    k: Float[Tensor, "B T KV K"]
    v: Float[Tensor, "B T KV V"]
    log_g: Float[Tensor, "B T KV 1"]
    beta: Float[Tensor, "B T KV 1"]


def matrix(key_size: int, value_size: int) -> tuple[int, ...]:
    """The shape of a state that holds a value for each key channel."""
    return key_size, value_size


class Structure(NamedTuple):
    """A recurrence: `operator(*inputs(q, k, v, layer), state, document)` gives its output and final state.

    `inputs` takes the projections before RoPE, q `[B, T, H, D]`, k and v `[B, T, KV, D]`.
    """

    inputs: Callable[[Tensor, Tensor, Tensor, Layer], Inputs | DeltaInputs]
    operator: Callable[..., tuple[Tensor, Tensor]]
    state_shape: Callable[[int, int], tuple[int, ...]] = matrix  # of one key/value head, from its key and value sizes

    def state_bytes(self, key_size: int, value_size: int, heads: int) -> int:
        """Bytes of one sequence's states in one layer, in fp32."""
        return 4 * heads * math.prod(self.state_shape(key_size, value_size))
