"""Feature maps of the recurrence's queries and keys, by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization

from linearize.ops import maps

FeatureMap = Callable[[Tensor], Tensor]
RANK = 16  # of the linear map
KEYS, STATE = 256, 2**14  # of a head, and the numbers of its state: what products make unless they are told
EPSILON = 1e-6  # of a mean square


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
SIGNED = ("l2", "none", "linear", "products")  # maps whose values may be negative


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


class Linear(nn.Module):
    """`x + U V x` with U and V of rank `RANK` for each head, U = 0 at the start: queries and keys of the recurrence's
    own, by fewer parameters than projections have."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        rank = min(RANK, head_dim)
        self.down = nn.Parameter(torch.empty(heads, head_dim, rank))
        self.up = nn.Parameter(torch.empty(heads, rank, head_dim))

    def reset_parameters(self) -> None:
        """The identity; V is random, always the same."""
        random = torch.randn(self.down.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        initialization.copy_(self.down, random / self.down.shape[1] ** 0.5)
        initialization.zeros_(self.up)

    def forward(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H D"]:
        """In fp32."""
        return maps.added(x, self.down, self.up)

    def unit(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H D"]:
        """Divided by its length."""
        return maps.mapped(x, self.down, self.up)


class Products(Linear):
    """`[y, y · y', y · y'' …]` with y what `Linear` makes, divided by its root mean square, and y', y'' … its channels
    moved on by 1 to `shifts`: more keys, as DPFP has them (arXiv 2102.11174) but with their signs."""

    def __init__(self, heads: int, head_dim: int, shifts: int | None = None) -> None:
        super().__init__(heads, head_dim)
        self.shifts = shifts_of(head_dim, shifts)

    def forward(self, x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B T H K"]:
        """K = (1 + shifts) D, in fp32."""
        return products(super().forward(x), self.shifts)


def shifts_of(head_dim: int, shifts: int | None) -> int:
    """`shifts`, or where there are none, as many as `KEYS` and `STATE` leave room for: three in a head of 64 channels,
    none in one of 128, whose keys are as many as its kernels take. More than half of the channels would come twice."""
    if shifts is not None:
        return shifts
    keys = min(KEYS, STATE // 2 ** (head_dim - 1).bit_length())
    return max(0, min(keys // head_dim - 1, head_dim // 2))


def products(x: Float[Tensor, "*rows D"], shifts: int) -> Float[Tensor, "*rows K"]:
    """What `Products` makes of what its linear map made."""
    y = F.rms_norm(x, x.shape[-1:], eps=EPSILON)
    return torch.cat([y, *(y * y.roll(shift, -1) for shift in range(1, shifts + 1))], dim=-1)


LEARNED = {"hedgehog": Hedgehog, "linear": Linear}


def feature_map(name: str, heads: int, head_dim: int, shifts: int | None = None) -> FeatureMap:
    """The feature map called `name`; a module where it is learned. `shifts` are those of products (`shifts_of`)."""
    if name == "products":
        return Products(heads, head_dim, shifts)
    return LEARNED[name](heads, head_dim) if name in LEARNED else FEATURE_MAPS[name]


def feature_size(name: str, head_dim: int, shifts: int | None = None) -> int:
    """K, from D."""
    return {"hedgehog": 2, "products": 1 + shifts_of(head_dim, shifts)}.get(name, 1) * head_dim
