"""The gate before its non-linearity: P in Liger's table 1, made from a projection or learned."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization

from linearize.structures.base import Layer, Structure

RANK = 16  # of learned maps from the layer's input: few parameters beside the projections'


def few_outputs(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear`; on a GPU by a multiple of eight outputs: of other numbers, in half the precision, GPUs make none of
    their fast products."""
    outputs = len(weight)
    if not x.is_cuda:
        return F.linear(x, weight)
    return F.linear(x, F.pad(weight, (0, 0, 0, -outputs % 8)))[..., :outputs]


class LowRank(nn.Module):
    """`[..., inputs]` to `[..., outputs]` through `RANK` values, or directly where outputs are no more; 0 at first."""

    def __init__(self, inputs: int, outputs: int, seed: int) -> None:
        super().__init__()
        self.seed = seed
        if outputs > RANK:
            self.down = nn.Parameter(torch.empty(RANK, inputs))
        self.up = nn.Parameter(torch.empty(outputs, RANK if outputs > RANK else inputs))

    def reset_parameters(self) -> None:
        """Random values that depend on the seed alone, and zeros."""
        if hasattr(self, "down"):
            random = torch.randn(self.down.shape, generator=torch.Generator().manual_seed(self.seed), device="cpu")
            initialization.copy_(self.down, random / self.down.shape[1] ** 0.5)
        initialization.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of x."""
        return self.after(few_outputs(x, self.first))

    @property
    def first(self) -> nn.Parameter:
        """The weight that meets the input."""
        return self.down if hasattr(self, "down") else self.up

    def after(self, product: Tensor) -> Tensor:
        """The output, of the product with the first weight."""
        return F.linear(product, self.up) if hasattr(self, "down") else product


class Gate(nn.Module):
    """P: pooled from a projection, or learned from the layer's input; plus a bias where time scales are given."""

    def __init__(self, structure: Structure, layer: Layer, key_size: int) -> None:
        super().__init__()
        config = layer.config
        self.structure, self.layer, self.source = structure, layer, config.gate_source
        self.size = structure.gate_size(config, key_size)
        self.heads, values = layer.num_key_value_heads, structure.gates * self.size
        if self.source == "learned":
            self.learned = LowRank(layer.hidden_size, self.heads * values, seed=layer.layer_idx)
        if config.time_scales is not None:
            self.bias = nn.Parameter(torch.empty(self.heads, values))

    def reset_parameters(self) -> None:
        """Decay times spread geometrically, over a head's channels or over the heads."""
        if hasattr(self, "learned"):
            self.learned.reset_parameters()
        if hasattr(self, "bias"):
            initialization.copy_(self.bias, time_scale_bias(self.structure, self.layer, *self.bias.shape))

    def forward(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "B T KV P"]:
        """In fp32; hidden is the layer's input `[B, T, hidden]`, q, k and v are before RoPE."""
        if self.source == "learned":
            gate = self.learned(hidden).float().unflatten(-1, (self.heads, -1))
        else:
            source = {"q": q, "k": k, "v": v}[self.source]
            gate = pooled(source, self.size).repeat(1, 1, 1, self.structure.gates)
        return gate + self.bias.float() if hasattr(self, "bias") else gate


def pooled(x: Tensor, size: int) -> Tensor:
    """`[..., D]` to `[..., size]` in fp32: the mean for one value, averages of neighbours for fewer than D, the
    channels as they are for D, and again from the first for more."""
    x = x.float()
    if size % x.shape[-1] == 0:
        return x.repeat(*[1] * (x.dim() - 1), size // x.shape[-1])
    return F.adaptive_avg_pool1d(x.flatten(0, -2), size).unflatten(0, x.shape[:-1])


def time_scale_bias(structure: Structure, layer: Layer, heads: int, values: int) -> Float[Tensor, "KV P"]:
    """The P at which log_g is -1/time, by bisection on the structure's own gate; 0 for a gate that is no decay."""
    longest = layer.config.time_scales
    assert longest is not None

    def log_g(gate: Tensor) -> Tensor:  # [KV, P] to [KV, P']
        q, k = torch.zeros(1, 1, layer.num_heads, values), torch.zeros(1, 1, heads, values)
        return structure.inputs(q, k, k, gate[None, None], layer).log_g[0, 0].double()

    bias = torch.zeros(heads, values, dtype=torch.float64)
    decays = log_g(bias).shape[-1]
    spread = torch.linspace(0, 1, decays if decays > 1 else heads, dtype=torch.float64)
    times = longest ** (spread.expand(heads, -1) if decays > 1 else spread[:, None])
    low, high = (torch.full_like(bias, bound) for bound in (-1e4, 1e4))
    rising = (log_g(high) >= log_g(low))[..., :decays]
    for _ in range(80):
        middle = (low + high) / 2
        above = torch.zeros_like(bias, dtype=torch.bool)
        above[:, :decays] = (log_g(middle) < -1 / times) == rising
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    bias[:, :decays] = middle[:, :decays]
    return bias.float()
