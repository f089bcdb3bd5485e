"""Operators inside `torch.utils.checkpoint`, which hands out what was saved for the backward pass once.

Without a GPU the kernels run in Triton's interpreter, in fp32.
"""

import pytest
import torch
from tiny import assert_close
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="the kernels are Triton's")
GPU = torch.cuda.is_available()
pytestmark = pytest.mark.usefixtures("checked_kernels")

from linearize.ops import gated_delta, gated_linear, liger  # noqa: E402 - after the interpreter is chosen
from linearize.ops.maps_triton import mapped  # noqa: E402

T, H, KV, D = 70, 2, 1, 16
SETTINGS = liger.Settings("gla", D**-0.5, window=8, sinks=2)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(1, T, *shape)


def attention() -> list[torch.Tensor]:
    return [normal(H, D), normal(KV, D), normal(KV, D)]


OPERATORS = {
    "liger": (lambda *given: liger.fused(*given, SETTINGS)[0], lambda: [*attention(), torch.rand(H)]),
    "window": (lambda *given: liger.windowed(*given, SETTINGS), attention),
    "delta": (
        lambda *given: gated_delta.fused(*given)[0],
        lambda: [*attention(), -torch.rand(1, T, KV, 1), torch.rand(1, T, KV, 1), torch.zeros(1, KV, D, D)],
    ),
    "decay": (
        lambda *given: gated_linear.fused(*given)[0],
        lambda: [*attention(), -torch.rand(1, T, KV, D), torch.zeros(1, KV, D, D)],
    ),
    "maps": (mapped, lambda: [normal(H, D), torch.randn(H, D, 4), torch.randn(H, 4, D)]),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_the_same(name):
    operator, inputs = OPERATORS[name]
    dtype = torch.bfloat16 if GPU else torch.float32
    given = [x.to("cuda" if GPU else "cpu", dtype).requires_grad_() for x in inputs()]
    plain = torch.autograd.grad(operator(*given).float().square().sum(), given)
    saving = torch.autograd.grad(checkpoint(operator, *given, use_reentrant=False).float().square().sum(), given)
    for x, other in zip(saving, plain, strict=True):
        assert_close(x, other, 1e-5)
