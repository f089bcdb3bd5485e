"""What a structure is: how projections become a recurrence's inputs, and the operator that runs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from linearize.config import MixerConfig


class Layer(NamedTuple):
    """Where a recurrence stands, for what differs from layer to layer and head to head."""

    config: MixerConfig
    layer_idx: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int


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


class SlotInputs(NamedTuple):
    """What gated slots take: a decay for each slot; what is not kept is written."""

    q: Float[Tensor, "B T H K"]
    k: Float[Tensor, "B T KV K"]
    v: Float[Tensor, "B T KV V"]
    log_g: Float[Tensor, "B T KV M"]


class KroneckerInputs(NamedTuple):
    """What third-order attention takes: features, two for each key, and no decay. Padding has a k of 0."""

    q: Float[Tensor, "B T H F"]
    k: Float[Tensor, "B T KV 2*F"]
    v: Float[Tensor, "B T KV V"]


AnyInputs = Inputs | DeltaInputs | SlotInputs | KroneckerInputs


def per_channel(config: MixerConfig, key_size: int) -> int:
    """A gate for each channel of the key."""
    return key_size


def per_head(config: MixerConfig, key_size: int) -> int:
    """One gate."""
    return 1


def absent(config: MixerConfig, key_size: int) -> int:
    """No gate."""
    return 0


def matrix(config: MixerConfig, key_size: int, value_size: int) -> tuple[int, ...]:
    """The shape of a state that holds a value for each key channel."""
    return key_size, value_size


class Structure(NamedTuple):
    """A recurrence: `operator(*inputs(q, k, v, gate, layer), state, document)` gives its output and final state.

    `inputs` takes q `[B, T, H, K]` and k `[B, T, KV, K]` after the feature map, of length 1 if `unit`, v
    `[B, T, KV, V]`, and the gate before its non-linearity, P in the paper's table: `[B, T, KV, gate_size]` in fp32, or,
    of two gates, one after the other.
    """

    inputs: Callable[[Tensor, Tensor, Tensor, Tensor, Layer], Any]
    operator: Callable[..., tuple[Tensor, Tensor]]
    gate_size: Callable[[MixerConfig, int], int] = per_channel  # of one key/value head, from its key size
    gates: int = 1
    decays: bool = True  # whether the gate is a decay, the first one where there are two
    state_shape: Callable[[MixerConfig, int, int], tuple[int, ...]] = matrix  # of one key/value head
    own_keys: bool = False  # whether it writes under keys of its own making, whatever k is
    weighs: bool = True  # whether the output is a sum of values by weights as positive as q and k are
    own_features: bool = False  # whether q and k come as they are, because it has features of its own
    unit: bool = False  # whether q and k are divided by their length
    by_depth: bool = False  # whether it has constants that differ from layer to layer

    def state_bytes(self, config: MixerConfig, key_size: int, value_size: int, heads: int) -> int:
        """Bytes of one sequence's states in one layer."""
        return config.state_bytes * heads * math.prod(self.state_shape(config, key_size, value_size))
