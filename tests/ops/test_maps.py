"""Learned maps and the length of what they make, in one pass, against float64: output and every gradient.

Without a GPU the kernels run in Triton's interpreter, in fp32.
"""

import pytest
import torch
from tiny import assert_close

from linearize.features import Linear
from linearize.ops import maps

pytest.importorskip("triton", reason="the kernels are Triton's")
GPU = torch.cuda.is_available()

needs_interpreter = pytest.mark.skipif(GPU, reason="Triton's interpreter is for machines without a GPU")

DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.usefixtures("checked_kernels")


def inputs(B: int, T: int, H: int, D: int, R: int = 16) -> list[torch.Tensor]:
    """x, with some rows of 0, V and U."""
    x = torch.randn(B, T, H, D)
    x[:, ::7] = 0
    return [x, torch.randn(H, D, R) / D**0.5, torch.randn(H, R, D) / R**0.5]


def assert_is_plain(given, dtype=torch.float32, tolerance=1e-5):
    """Where x is not 0: there gradients are those of a direction that is not there."""
    from linearize.ops.maps_triton import mapped

    given = [x.to(dtype) for x in given]
    ours = [x.detach().to(DEVICE, copy=True).requires_grad_() for x in given]
    truth = [x.double().requires_grad_() for x in given]
    result, expected = mapped(*ours), maps.plain(*truth)
    assert result.dtype == torch.float32
    assert_close(result.cpu(), expected, tolerance)
    there = given[0].ne(0).any(-1, keepdim=True)
    weight = torch.randn_like(expected) * there
    (weight * result.cpu().double()).sum().backward()
    (weight * expected).sum().backward()
    for x, other in zip(ours, truth, strict=True):
        assert x.grad.dtype == dtype
        assert_close(x.grad.cpu(), other.grad, tolerance)


@needs_interpreter
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 65, 3, 24), (1, 200, 2, 64), (3, 21, 1, 80), (1, 64, 2, 128)])
def test_shapes(shape):
    assert_is_plain(inputs(*shape))


@needs_interpreter
@pytest.mark.parametrize("rank", [1, 5, 16, 24])
def test_ranks(rank):
    assert_is_plain(inputs(1, 70, 2, 24, rank))


@needs_interpreter
def test_more_blocks_than_programs(monkeypatch):
    from linearize.ops import maps_triton

    monkeypatch.setattr(maps_triton, "PROGRAMS", 2)
    assert_is_plain(inputs(2, 170, 2, 16))


@needs_interpreter
def test_half_precision():
    assert_is_plain(inputs(2, 100, 3, 64), torch.bfloat16, 8e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [16, 32, 64, 80, 128])
def test_on_a_gpu(D):
    assert_is_plain(inputs(2, 700, 3, D), torch.bfloat16, 8e-3)


def test_the_feature_map_is_the_same(monkeypatch):
    """By itself, divided by its length, and by the kernel."""
    made = Linear(3, 16)
    made.reset_parameters()
    torch.nn.init.normal_(made.up, std=0.2)
    x, _, _ = inputs(2, 40, 3, 16)
    expected = torch.nn.functional.normalize(made(x), dim=-1)
    assert_close(made.unit(x), expected)
    if not GPU:
        monkeypatch.setattr(maps, "why_not_fused", lambda x: None)
        monkeypatch.setattr(maps, "kernel_dtype", lambda x: x.dtype)
        assert_close(made.unit(x), expected)


def test_what_has_no_kernel(monkeypatch):
    monkeypatch.setattr("linearize.ops.dispatch.no_device", lambda x: None)
    assert maps.why_not_fused(torch.zeros(1, 3, 2, 128)) is None
    assert maps.why_not_fused(torch.zeros(1, 3, 2, 256)) == "no kernel for head size 256"
    assert maps.why_not_fused(torch.zeros(5, 1, 2, 64)) == "no kernel for one token"
