"""What a structure is."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Gate(Protocol):
    """The gate of a structure from the key projection before RoPE."""

    def __call__(self, k: Tensor, temperature: float) -> Tensor:
        """`k` is `[B, T, KV, K]`; the result is the log decay, at most 0, in the shape that the operator takes."""


class Structure(NamedTuple):
    """A recurrence: `operator(q, k, v, gate(k), state, document)` gives its output and final state."""

    gate: Gate
    operator: Callable[..., tuple[Tensor, Tensor]]
    state_shape: Callable[[int, int], tuple[int, ...]]  # of one key/value head, from its key and value sizes


def state_bytes(structure: Structure, key_size: int, value_size: int, heads: int) -> int:
    """Bytes of one sequence's states in one layer, in fp32."""
    count: Any = 4 * heads
    for size in structure.state_shape(key_size, value_size):
        count *= size
    return count
