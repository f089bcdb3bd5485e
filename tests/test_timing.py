"""What benchmarks on a GPU time by."""

import pytest
import torch
from tiny import assert_close
from torch._subclasses import FakeTensorMode

from benchmarks.timing import graphed
from linearize.ops import liger


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are graphs on a GPU")
def test_without_a_gpu_a_call_is_itself():
    assert graphed(print) is print


def test_what_is_not_fused_can_be_recorded(monkeypatch):
    """Without documents nothing of a tensor decides what runs: here there are no values at all."""
    monkeypatch.setattr("linearize.ops.gated_linear.may_look", lambda x: False)
    with FakeTensorMode():
        q, k, v = (torch.randn(2, 130, heads, 16, requires_grad=True) for heads in (4, 2, 2))
        angles = torch.randn(130, 16), torch.randn(130, 16)
        output, _ = liger.unfused(q, k, v, torch.rand(4), liger.Settings("gla", 0.25), angles)
        gradients = torch.autograd.grad(output, (q, k, v), torch.randn_like(output))
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_two_operators_do_what_one_does():
    pytest.importorskip("interpreted")
    from benchmarks.kernels import separate

    q, k, v = (torch.randn(2, 70, heads, 16) for heads in (4, 2, 2))
    angles = torch.randn(70, 16)
    given = q, k, v, torch.rand(4), liger.Settings("gla", 0.25), (angles.cos(), angles.sin())
    assert_close(separate(*given)[0], liger.reference(*given)[0], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
def test_every_side_can_be_recorded(monkeypatch, backward):
    from benchmarks import kernels

    shape = kernels.Shape(1, 200, 4, 2, 64)
    monkeypatch.setattr(kernels, "SEPARATE", [shape])
    for name, operator in kernels.sides(shape).items():
        row = kernels.measure(kernels.made(operator, shape, backward))
        assert row.get("error") is None, name
        assert row["seconds"], name


@pytest.mark.gpu
def test_a_replay_reads_and_writes_the_same_tensors():
    x, y = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    replay = graphed(lambda: torch.add(x, 1, out=y))
    x.fill_(2)
    replay()
    assert y.tolist() == [3.0, 3.0, 3.0]
