"""Kronecker attention (arXiv 2310.04064), experimental: a query weighs pairs of tokens, by low-degree monomials."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops.kronecker import kronecker
from linearize.structures.base import KroneckerInputs, Layer, Structure, absent

if TYPE_CHECKING:
    from linearize.config import MixerConfig

SIZE = 8  # of the projected queries and keys: 64 channels would have 2,145 monomials
DEGREE = 2  # even, so that `1 + x + x²/2` is positive


def variables(size: int, degree: int) -> list[tuple[int, ...]]:
    """The `C(size + degree, degree)` monomials of up to `degree`: which of 1..size are multiplied, and 0 for a 1."""
    return list(combinations_with_replacement(range(size + 1), degree))


def chosen(size: int, degree: int) -> Tensor:
    """`variables`, one factor a row."""
    return torch.tensor(variables(size, degree)).T.contiguous()


@cache
def on_device(make: Callable[..., Tensor], device: torch.device, *arguments: int) -> Tensor:
    """A constant, brought there once: a CUDA graph cannot take anything from the CPU."""
    with torch.inference_mode(False):
        return make(*arguments).to(device)


def monomials(x: Tensor, degree: int = DEGREE) -> Tensor:
    """Every product of up to `degree` channels, the empty one first: `[..., D]` to `[..., C(D + degree, degree)]`."""
    factors = torch.cat([torch.ones_like(x[..., :1]), x], dim=-1)
    columns = on_device(chosen, x.device, x.shape[-1], degree)
    features = factors.index_select(-1, columns[0])
    for column in columns[1:]:
        features = features * factors.index_select(-1, column)
    return features


def coefficients(size: int, degree: int = DEGREE) -> Tensor:
    """`1/α!` of each monomial: with them `Σ_α a^α b^α c^α / α!` is the Taylor polynomial of `exp(Σ_d a_d b_d c_d)`."""
    powers = [[chosen.count(d) for d in range(1, size + 1)] for chosen in variables(size, degree)]
    return torch.tensor([1 / math.prod(map(math.factorial, power)) for power in powers])


def projections(key_size: int, layer_idx: int) -> Tensor:
    """Two random projections `[2, K, SIZE]`, always the same ones in a layer."""
    generator = torch.Generator().manual_seed(layer_idx)
    return torch.randn(2, key_size, SIZE, generator=generator, device="cpu")


def features(x: Tensor, projection: Tensor) -> Tensor:
    """The monomials of `x` projected to length 1: entries stay where the polynomial is near the exponential, whatever
    the model's scale."""
    with torch.autocast(x.device.type, enabled=False):
        return monomials(F.normalize(x.float() @ projection, dim=-1))


def inputs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, layer: Layer) -> KroneckerInputs:
    """No gate. Queries share the projection of a pair's first token, so that the two agree as q and k do."""
    first, second = on_device(projections, q.device, q.shape[-1], layer.layer_idx)
    queries = features(q, first) * on_device(coefficients, q.device, SIZE, DEGREE)
    return KroneckerInputs(queries, torch.cat([features(k, first), features(k, second)], dim=-1), v)


def sums_of_features(config: MixerConfig, key_size: int, value_size: int) -> tuple[int, ...]:
    """The shape of a state that holds, for each monomial, its sum with the values and alone, for both of a pair."""
    return math.comb(SIZE + DEGREE, DEGREE), value_size + 2


KRONECKER = Structure(
    inputs, kronecker, absent, state_shape=sums_of_features, weighs=False, own_features=True, by_depth=True
)
