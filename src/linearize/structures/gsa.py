"""Gated slot attention (GSA, arXiv 2409.07146): softmax over `slots` memory slots, one decay `α = σ(P)` for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from linearize.ops.slots import gated_slots
from linearize.structures.base import Layer, SlotInputs, Structure

if TYPE_CHECKING:
    from linearize.config import MixerConfig


def per_slot(config: MixerConfig, key_size: int) -> int:
    """A gate for each slot."""
    return config.slots


def keys_and_values(config: MixerConfig, key_size: int, value_size: int) -> tuple[int, ...]:
    """The shape of a state that holds a key and a value in each slot."""
    return config.slots, key_size + value_size


def inputs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layer: Layer) -> SlotInputs:
    """`α = σ(P)^(1/temperature)`; slot scores are scaled by `K^-0.5`, as in attention and the paper's code.

    The softmax feature map leaves the scores below `K^-0.5`, so that every slot is read almost alike; with `none` they
    are attention's. Slots beyond the head size share their gates with others, and so hold the same as those.
    """
    return SlotInputs(q * q.shape[-1] ** -0.5, k, v, F.logsigmoid(gate) / layer.config.gate_temperature)


GSA = Structure(inputs, gated_slots, per_slot, state_shape=keys_and_values, weighs=False)
