"""Kernels as operators of torch: what `torch.compile` is told of them is what they do."""

import pytest
import torch
from torch import Tensor

from linearize.ops.liger import Settings

pytest.importorskip("triton", reason="the kernels are Triton's")
if torch.cuda.is_available():
    pytest.skip("the kernels' fp32 is the interpreter's", allow_module_level=True)
import interpreted  # noqa: F401

from linearize.ops import gated_delta_fused, liger_fused, liger_operator, liger_window

T, D, H = 70, 16, 2
ROPE = (torch.linspace(-1, 1, T * 8).view(T, 8), torch.linspace(1, -1, T * 8).view(T, 8))
FIRST = (torch.arange(T) >= 30).long()[None] * 30
GIVEN = {"plain": (None, None), "turned and packed": (ROPE, FIRST)}


def projections(trained: bool) -> list[Tensor]:
    """q, k and v."""
    return [torch.randn(1, T, heads, D, requires_grad=trained) for heads in (H, 1, 1)]


def check(operator, *given) -> None:
    found = torch.library.opcheck(operator, given)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("given", GIVEN)
def test_window(given, trained):
    rope, first = GIVEN[given]
    cos, sin = rope or (None, None)
    check(liger_window.operator, *projections(trained), cos, sin, first, 0.3, 64, 2, trained)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("given", GIVEN)
def test_delta(given, trained):
    _, first = GIVEN[given]
    log_g, beta = (x.requires_grad_(trained) for x in (-torch.rand(1, T), torch.rand(1, T)))
    state = torch.randn(1, 1, D, D, requires_grad=trained)
    check(gated_delta_fused.operator, *projections(trained), log_g, beta, state, first, trained)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("gate", ["gla", "mamba2", "gated_deltanet"])
def test_liger(gate, given, trained):
    rope, first = GIVEN[given]
    mixing, state = torch.rand(H, requires_grad=trained), torch.randn(1, 1, D, D, requires_grad=trained)
    settings = Settings(gate, 0.3, sinks=2)
    call, initial = liger_fused.call_of(*projections(trained), mixing, settings, rope, state, first, None)
    check(liger_operator.operator, initial, trained, *call)
