"""Kernels of Liger Attention on a GPU, in bf16: output, final state and every gradient."""

import pytest
import torch
from equation import (
    ALL,
    assert_is_the_equation,
    assert_is_the_window,
    documents,
    in_groups,
    inputs,
    rope,
    settings,
)
from tiny import assert_close

from linearize.ops.liger import fused, reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("checked_kernels")]
SHAPES = {"mha": {"KV": 2, "groups": 1}, "gqa": {"KV": 1, "groups": 3}}


@pytest.mark.parametrize("T", [1, 65, 1000])
@pytest.mark.parametrize("D", [64, 96, 128])
def test_gpu_lengths(D, T):
    given = inputs(T, D=D, **SHAPES["gqa"])
    assert_is_the_equation(given, settings(D=D), rope(T, D), dtype=torch.bfloat16, tolerance=5e-3)


@pytest.mark.parametrize("gate", ALL)
@pytest.mark.parametrize("D", [64, 128])
def test_gpu_gates(gate, D):
    given = inputs(200, B=2, D=D, **SHAPES["mha"])
    assert_is_the_equation(given, settings(gate, D=D), rope(200, D), dtype=torch.bfloat16, tolerance=5e-3)


@pytest.mark.parametrize("gate", ["gla", "rwkv6", "hgrn2"])
@pytest.mark.parametrize("spread", [4.0, 20.0])
def test_gpu_any_decay(gate, spread):
    given = inputs(200, B=2, D=64, spread=spread, **SHAPES["gqa"])
    fixed = settings(gate, D=64, temperature=1.0, scale=0.01 / spread, lower=0.0)
    assert_is_the_equation(given, fixed, rope(200, 64), dtype=torch.bfloat16, tolerance=5e-3)


@pytest.mark.parametrize("gate", ["gla", "hgrn2"])
def test_gpu_decay_of_all_or_nothing(gate):
    """Without softmax, whose gradients, where numbers as large tie, are differences of nearly equal ones."""
    given = inputs(200, B=2, D=64, spread=1e4, **SHAPES["gqa"])
    fixed = settings(gate, D=64, temperature=1.0, scale=1e-6, lower=0.0, feature_map="none")
    assert_is_the_equation(given, fixed, rope(200, 64), dtype=torch.bfloat16, tolerance=5e-3)


def test_gpu_decay_of_all_or_nothing_of_rwkv6():
    """Whose slopes, up to e^10, make much of any rounding, so that gradients are only to be numbers."""
    given = inputs(200, B=2, D=64, spread=1e4, **SHAPES["gqa"])
    fixed, angles = settings("rwkv6", D=64, temperature=1.0, scale=1e-6), rope(200, 64)
    ours = [*(x.bfloat16() for x in given[:3]), *given[3:]]
    expected = reference(*(x.double() for x in ours[:4]), fixed, angles, ours[4].double())
    leaves = [x.cuda().requires_grad_() for x in ours]
    results = fused(*leaves[:4], fixed, tuple(x.cuda() for x in angles), leaves[4])
    for result, other in zip(results, expected, strict=True):
        assert_close(result.cpu(), other, 5e-3)
    gradients = torch.autograd.grad(sum(x.float().square().sum() for x in results), leaves)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("gate", ["gla", "mamba2", "gated_deltanet"])
def test_gpu_documents(gate):
    given = inputs(300, B=2, D=64, **SHAPES["gqa"])
    first = documents(300, [20, 23, 100], [64])
    assert_is_the_equation(given, settings(gate, D=64), rope(300, 64), first, dtype=torch.bfloat16, tolerance=5e-3)


@pytest.mark.parametrize("window", [5, 64])
@pytest.mark.parametrize("D", [16, 32, 64, 128])
def test_gpu_window_without_documents(D, window):
    given, fixed = inputs(300, B=2, D=D, **SHAPES["gqa"]), settings("none", D=D, window=window)
    assert_is_the_window(given, fixed, rope(300, D), None, torch.bfloat16, 5e-3)


@pytest.mark.parametrize("window", [65, 128, 200])
@pytest.mark.parametrize("D", [16, 32, 64, 128])
def test_gpu_longer_window(D, window):
    given, fixed = inputs(400, B=2, D=D, **SHAPES["gqa"]), settings("none", D=D, window=window)
    first = documents(400, [20, 23, 300], [64])
    assert_is_the_window(given, fixed, rope(400, D), None, torch.bfloat16, 5e-3)
    assert_is_the_window(given, fixed, rope(400, D), first, torch.bfloat16, 5e-3)


@pytest.mark.parametrize("D", [16, 64, 128])
def test_gpu_window_alone(D):
    first = documents(300, [20, 23, 100], [64])
    given, fixed = inputs(300, B=2, D=D, **SHAPES["gqa"]), settings("none", D=D)
    assert_is_the_window(given, fixed, rope(300, D), None, torch.bfloat16, 5e-3)
    assert_is_the_window(given, fixed, rope(300, D), first, torch.bfloat16, 5e-3)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("gate", ["gla", "mamba2"])
@pytest.mark.parametrize(("groups", "heads"), [(4, 2), (3, 1)])
def test_gpu_groups_of_heads(monkeypatch, D, gate, groups, heads):
    in_groups(monkeypatch, heads if D > 64 else 1)
    given, first = inputs(300, B=2, groups=groups, D=D), documents(300, [20, 23, 100], [64])
    assert_is_the_equation(given, settings(gate, D=D), rope(300, D), first, dtype=torch.bfloat16, tolerance=5e-3)


@pytest.mark.parametrize("gate", ["gla", "gated_deltanet"])
def test_gpu_fp16(gate):
    assert_is_the_equation(inputs(200, D=64), settings(gate, D=64), rope(200, 64), dtype=torch.float16, tolerance=5e-3)


@pytest.mark.parametrize("gate", ["gla", "gated_deltanet"])
def test_gpu_segments(gate):
    """Of several heads, since the mixing gradient of one is a single number, in which rounding does not even out."""
    given = inputs(4200, D=64, KV=1, groups=4)
    assert_is_the_equation(given, settings(gate, D=64), rope(4200, 64), dtype=torch.bfloat16, tolerance=5e-3)
