"""What becomes of the recurrence's output, by name: modules that run the operator, since some read more than v."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization

from linearize.gates import LowRank
from linearize.structures.base import Layer

EPSILON = 1e-6
FLOOR = 0.1  # where ε of `SoftRMS` starts: of the size of what SmolLM2's states give


class Read(NamedTuple):
    """What a recurrence gives."""

    output: Float[Tensor, "B T H V"]
    state: Tensor
    log_weight: Float[Tensor, "B T H"] | None = None  # logarithm of the sum that the output was divided by


Run = Callable[[Any], tuple[Tensor, Tensor]]  # an operator: inputs to output and final state


class Plain(nn.Module):
    """The output as it is: it grows with what the state holds."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()

    def forward(self, run: Run, inputs: Any, hidden: Tensor) -> Read:
        """hidden is the layer's input, `[B, T, hidden]`."""
        return Read(*run(inputs))


class RMS(Plain):
    """Each head's output divided by its root mean square (NormAttention, TransNormer, arXiv 2210.10340)."""

    def forward(self, run: Run, inputs: Any, hidden: Tensor) -> Read:
        """In fp32."""
        output, state = run(inputs)
        return Read(F.rms_norm(output.float(), output.shape[-1:], eps=EPSILON), state)


class SoftRMS(Plain):
    """Each head's output divided by `√(mean square + ε²)`, ε learned: what is large has a root mean square of 1, and
    what is small, because nothing in the state goes with the query, stays small."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.log_floor = nn.Parameter(torch.empty(layer.num_heads))

    def reset_parameters(self) -> None:
        """ε is `FLOOR`."""
        initialization.constant_(self.log_floor, math.log(FLOOR))

    def forward(self, run: Run, inputs: Any, hidden: Tensor) -> Read:
        """In fp32."""
        output, state = run(inputs)
        output = output.float()
        square = output.square().mean(-1, keepdim=True) + (2 * self.log_floor.float()).exp()[:, None]
        return Read(output * square.rsqrt(), state)


class Denominator(Plain):
    """A weighted mean of values (arXiv 2006.16236): one more value channel, always 1, adds the weights up."""

    def forward(self, run: Run, inputs: Any, hidden: Tensor) -> Read:
        """In fp32."""
        ones = torch.ones_like(inputs.v[..., :1])
        output, state = run(inputs._replace(v=torch.cat([inputs.v, ones], dim=-1)))
        output, total = output.float().split([output.shape[-1] - 1, 1], dim=-1)
        return Read(output / (total + EPSILON), state, (total[..., 0] + EPSILON**3).log())


class Gated(RMS):
    """As `RMS`, times a gate for each channel made from the layer's input; 1 at the start."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.gate = LowRank(layer.hidden_size, layer.num_heads * layer.head_dim, seed=layer.layer_idx)

    def reset_parameters(self) -> None:
        """Open."""
        self.gate.reset_parameters()

    def forward(self, run: Run, inputs: Any, hidden: Tensor) -> Read:
        """In fp32."""
        read = super().forward(run, inputs, hidden)
        gate = 2 * self.gate(hidden).float().sigmoid().unflatten(-1, (read.output.shape[2], -1))
        return read._replace(output=read.output * gate)


READOUTS = {"none": Plain, "rms": RMS, "soft_rms": SoftRMS, "denominator": Denominator, "gated": Gated}
