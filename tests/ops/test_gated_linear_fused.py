"""The kernels of gated linear attention with given gates against the equation: output, final state and every gradient.

Without a GPU the kernels run in Triton's interpreter, in fp32.
"""

import pytest
import torch
from test_gated_delta_fused import documents
from tiny import assert_close
from torch import Tensor

from linearize.ops import gated_linear, liger_fused, slots
from linearize.ops.gated_linear import fused, reference

pytest.importorskip("triton", reason="the kernels are Triton's")
GPU = torch.cuda.is_available()

needs_interpreter = pytest.mark.skipif(GPU, reason="Triton's interpreter is for machines without a GPU")

DEVICE = "cuda" if GPU else "cpu"
BY = ("key", "value", "head")  # what a decay is for
pytestmark = pytest.mark.usefixtures("checked_kernels")


def inputs(
    T: int, by: str = "key", B: int = 1, KV: int = 1, groups: int = 2, D: int = 16, V: int | None = None
) -> list[Tensor]:
    """q, k, v, log_g and a state; keys of size D, and values too, if nothing is said."""
    V = D if V is None else V
    q, k, v = torch.randn(B, T, KV * groups, D), torch.randn(B, T, KV, D), torch.randn(B, T, KV, V)
    return [q, k, v, -torch.rand(B, T, KV, {"key": D, "value": V, "head": 1}[by]), torch.randn(B, KV, D, V)]


def assert_is_the_equation(
    given: list[Tensor],
    by: str = "key",
    document: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> None:
    """`dtype` is that of the values and can hold queries and keys, which are in fp32, as structures make them."""
    given = [*(x.to(dtype).float() for x in given[:2]), given[2].to(dtype), *given[3:]]
    there = None if document is None else document.to(DEVICE)
    ours = [x.detach().to(DEVICE, copy=True).requires_grad_() for x in given]
    truth = [x.double().requires_grad_() for x in given]
    results = fused(*ours, there, by_value=by == "value")
    expected = reference(*truth, document, by_value=by == "value")
    assert [x.dtype for x in results] == [torch.float32, torch.float32]
    for result, other in zip(results, expected, strict=True):
        assert_close(result.cpu(), other, tolerance)
    weights = [torch.randn_like(x) for x in expected]
    sum((w * x.cpu().double()).sum() for w, x in zip(weights, results, strict=True)).backward()
    sum((w * x).sum() for w, x in zip(weights, expected, strict=True)).backward()
    for x, other in zip(ours, truth, strict=True):
        assert x.grad is not None
        assert x.grad.dtype == x.dtype
        assert_close(x.grad.cpu(), other.grad, tolerance)


@needs_interpreter
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize(("T", "groups"), [(1, 3), (63, 1), (65, 3), (200, 1)])
def test_lengths_and_groups(T, groups, by):
    assert_is_the_equation(inputs(T, by, groups=groups), by)


@needs_interpreter
@pytest.mark.parametrize("by", BY)
def test_sequences_heads_and_head_sizes(by):
    assert_is_the_equation(inputs(70, by, B=2, KV=2, D=24), by)


@needs_interpreter
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize(("D", "V"), [(16, 17), (24, 7)])
def test_keys_and_values_of_other_sizes(by, D, V):
    """A channel of ones, and maps that make more of a key."""
    assert_is_the_equation(inputs(70, by, D=D, V=V), by)


@needs_interpreter
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("log_decay", [0.0, -0.01, -8.0, -20.0, -1e4])
def test_any_decay(log_decay, by):
    """Some tokens' alone, so that chunks are steep that hold gentle decays as well."""
    given = inputs(130, by)
    given[3][:, ::3] = log_decay
    assert_is_the_equation(given, by)


@needs_interpreter
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("log_decay", [0.0, -1e4])
def test_the_same_decay_everywhere(log_decay, by):
    given = inputs(130, by)
    given[3][:] = log_decay
    assert_is_the_equation(given, by)


@needs_interpreter
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("steep", [False, True])
def test_documents_do_not_see_each_other(by, steep):
    given = inputs(130, by, B=2, groups=1)
    given[3][:, 70:75] -= 20.0 * steep
    assert_is_the_equation(given, by, documents(130, [20, 23, 100], [64]))


@needs_interpreter
@pytest.mark.parametrize("by", BY)
def test_segments(by, monkeypatch):
    """A sequence that is cut, so that there is work for all of a GPU."""
    monkeypatch.setattr(liger_fused, "segments_of", lambda call, blocks: (call.chunks, 1))
    assert_is_the_equation(inputs(200, by), by, documents(200, [20, 23, 130]))


@needs_interpreter
@pytest.mark.parametrize("by", BY)
def test_half_precision(by):
    assert_is_the_equation(inputs(200, by, D=64), by, None, torch.bfloat16, 6e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("D", [16, 32, 64, 128])
@pytest.mark.parametrize("steep", [False, True])
def test_on_a_gpu(D, by, steep):
    given = inputs(450, by, B=2, KV=2, groups=3, D=D)
    given[0] /= D**0.5
    given[3][:, 70:75] -= 20.0 * steep
    assert_is_the_equation(given, by, documents(450, [20, 23, 300], [64]), torch.bfloat16, 6e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("by", BY)
def test_keys_and_values_of_other_sizes_on_a_gpu(by):
    """As Hedgehog's maps under one normaliser have them."""
    given = inputs(450, by, B=2, KV=2, groups=3, D=128, V=65)
    given[0] /= 128**0.5
    assert_is_the_equation(given, by, documents(450, [20, 23, 300], [64]), torch.bfloat16, 6e-3)


def by_kernels(monkeypatch) -> None:
    """Also of fp32 without a GPU."""
    monkeypatch.setattr(gated_linear, "why_not_fused", lambda *_: None)
    for module in (gated_linear, slots):
        monkeypatch.setattr(module, "kernel_dtype", lambda x: x.dtype)


@needs_interpreter
def test_gated_slots(monkeypatch):
    """Two calls, the first of which decays by value channel."""
    by_kernels(monkeypatch)
    q, k, v, log_g, _ = inputs(130, B=2, KV=2)
    given = [q, k, v, log_g, torch.randn(2, 2, 16, 32)]
    document = documents(130, [20, 23, 100], [64])
    ours, truth = ([x.clone().to(dtype).requires_grad_() for x in given] for dtype in (torch.float32, torch.float64))
    results, expected = slots.gated_slots(*ours, document), slots.reference(*truth, document)
    weights = [torch.randn_like(x) for x in expected]
    sum((w * x.double()).sum() for w, x in zip(weights, results, strict=True)).backward()
    sum((w * x).sum() for w, x in zip(weights, expected, strict=True)).backward()
    for result, other in zip((*results, *(x.grad for x in ours)), (*expected, *(x.grad for x in truth)), strict=True):
        assert_close(result, other, 1e-5)


@needs_interpreter
def test_rwkv6_with_a_bonus(monkeypatch):
    by_kernels(monkeypatch)
    *given, state = inputs(130)
    bonus, document = torch.randn(1, 16), documents(130, [20, 100])
    results = gated_linear.with_bonus(*given, bonus, state, document)
    for result, other in zip(results, gated_linear.reference_with_bonus(*given, bonus, state, document), strict=True):
        assert_close(result, other, 1e-5)


def test_what_has_no_kernel(monkeypatch):
    monkeypatch.setattr("linearize.ops.dispatch.no_device", lambda x: None)
    q, k, v, *_ = inputs(3, D=24, V=65)
    assert gated_linear.why_not_fused(q, k, v) is None
    q, k, v, *_ = inputs(3, D=24, V=129)
    assert gated_linear.why_not_fused(q, k, v) == "no kernel for keys of size 24 and values of size 129"
