"""Feature maps of the recurrence's queries and keys, and what becomes of its output: plain functions, by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.structures.base import AnyInputs

Run = Callable[[AnyInputs], tuple[Tensor, Tensor]]  # an operator: inputs to output and final state
EPSILON = 1e-6


def softmax(x: Tensor) -> Tensor:
    """Softmax over the head size, in fp32: positive, no parameters (Liger, section 3.2)."""
    return x.float().softmax(dim=-1)


def l2(x: Tensor) -> Tensor:
    """Of length 1, in fp32."""
    return F.normalize(x.float(), dim=-1)


def relu(x: Tensor) -> Tensor:
    """The positive part, in fp32."""
    return x.float().relu()


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1, in fp32: positive (arXiv 2006.16236)."""
    return F.elu(x.float()) + 1


def identity(x: Tensor) -> Tensor:
    """As it is, in fp32."""
    return x.float()


FEATURE_MAPS = {"softmax": softmax, "l2": l2, "relu": relu, "elu": elu, "none": identity}
SIGNED = ("l2", "none")  # maps whose values may be negative


def plain(run: Run, inputs: AnyInputs) -> tuple[Tensor, Tensor]:
    """The output as it is: it grows with what the state holds."""
    return run(inputs)


def rms(run: Run, inputs: AnyInputs) -> tuple[Tensor, Tensor]:
    """Each head's output divided by its root mean square (NormAttention, TransNormer, arXiv 2210.10340)."""
    output, state = run(inputs)
    return F.rms_norm(output.float(), output.shape[-1:], eps=EPSILON), state


def denominator(run: Run, inputs: AnyInputs) -> tuple[Tensor, Tensor]:
    """A weighted mean of values (arXiv 2006.16236): one more value channel, always 1, adds the weights up."""
    ones = torch.ones_like(inputs.v[..., :1])
    output, state = run(inputs._replace(v=torch.cat([inputs.v, ones], dim=-1)))
    output = output.float()
    return output[..., :-1] / (output[..., -1:] + EPSILON), state


READOUTS = {"none": plain, "rms": rms, "denominator": denominator}
