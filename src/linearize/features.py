"""Feature maps of the recurrence's queries and keys, by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization

FeatureMap = Callable[[Tensor], Tensor]


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


FEATURE_MAPS: dict[str, FeatureMap] = {"softmax": softmax, "l2": l2, "relu": relu, "elu": elu, "none": identity}
SIGNED = ("l2", "none")  # maps whose values may be negative


class Hedgehog(nn.Module):
    """`[softmax(Wx + b), softmax(-Wx - b)]` with W and b for each head, W = I at the start (arXiv 2402.04347)."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(heads, head_dim))

    def reset_parameters(self) -> None:
        """The identity."""
        initialization.copy_(self.weight, torch.eye(self.weight.shape[-1]).expand_as(self.weight))
        initialization.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H K"]:
        """K = 2D, in fp32."""
        x = torch.einsum("bthd,hde->bthe", x.float(), self.weight.float()) + self.bias.float()
        return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1)


def feature_map(name: str, heads: int, head_dim: int) -> FeatureMap:
    """The feature map called `name`; a module where it is learned."""
    return Hedgehog(heads, head_dim) if name == "hedgehog" else FEATURE_MAPS[name]


def feature_size(name: str, head_dim: int) -> int:
    """K, from D."""
    return 2 * head_dim if name == "hedgehog" else head_dim
