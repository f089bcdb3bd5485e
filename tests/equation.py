"""What kernels of Liger Attention are compared with, and what they are given."""

from importlib.util import find_spec

import pytest
import torch
from tiny import assert_close, relative
from torch import Tensor

from linearize.ops import liger
from linearize.ops.liger import Settings, first_tokens, fused, reference, windowed

GPU = torch.cuda.is_available()
TRITON = find_spec("triton") is not None

needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed")
needs_interpreter = pytest.mark.skipif(GPU or not TRITON, reason="Triton's interpreter is for machines without a GPU")
DEVICE = "cuda" if GPU else "cpu"
ALL = [*liger.GATES, *liger.DELTA]


def settings(gate: str = "gla", D: int = 16, **kwargs) -> Settings:
    return Settings(**({"gate": gate, "scale": D**-0.5, "lower": 0.3} | kwargs))


def inputs(T: int, B: int = 1, KV: int = 1, groups: int = 2, D: int = 16, spread: float = 1.0) -> list[Tensor]:
    """q, k, v, mixing weights and a state."""
    q, k, v = torch.randn(B, T, KV * groups, D), torch.randn(B, T, KV, D), torch.randn(B, T, KV, D)
    return [q, spread * k, v, torch.rand(KV * groups), torch.randn(B, KV, D, D)]


def rope(T: int, R: int = 16, B: int | None = None) -> tuple[Tensor, Tensor]:
    """One set of random angles for all sequences, or one for each."""
    angles = 3 * torch.randn(*(() if B is None else (B,)), T, R // 2).repeat(*(() if B is None else (1,)), 1, 2)
    return angles.cos(), angles.sin()


def documents(T: int, *rows: list[int]) -> Tensor:
    """`first`, from where documents begin."""
    document = torch.zeros(len(rows), T, dtype=torch.long)
    for row, begins in zip(document, rows, strict=True):
        row[begins] = 1
    first = first_tokens(document.cumsum(1), None)
    assert first is not None
    return first


def assert_is_the_equation(
    given: list[Tensor],
    fixed: Settings,
    angles: tuple[Tensor, Tensor] | None = None,
    first: Tensor | None = None,
    operator=fused,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
    size: float = 1.0,
) -> None:
    """With gradients of the results of that size. The gradient of a mixing weight, a sum over all tokens, may be next
    to nothing: it is judged by what it sums."""
    given = [*(x.to(dtype) for x in given[:3]), *given[3:]]
    decay = -torch.rand(given[1].shape[2])
    move = (lambda x: None if x is None else x.to(DEVICE)) if operator is fused else (lambda x: x)
    ours = [move(x).detach().clone().requires_grad_() for x in given]
    truth = [x.double().requires_grad_() for x in given]
    moved = None if angles is None else (move(angles[0]), move(angles[1]))
    with torch.no_grad():
        alone = operator(*ours[:4], fixed, moved, ours[4], move(first), move(decay))
    results = operator(*ours[:4], fixed, moved, ours[4], move(first), move(decay))
    expected = reference(*truth[:4], fixed, angles, truth[4], first, decay)
    # gradients as they arrive, in the results' dtype
    weights = [(size * torch.randn_like(x)).to(y.dtype).double() for x, y in zip(expected, results, strict=True)]
    assert results[0].dtype == dtype
    assert results[1].dtype == torch.float32
    for result, other in zip((*results, *alone), expected * 2, strict=True):
        assert_close(result.cpu(), other, tolerance)
    sum((w * x.cpu().double()).sum() for w, x in zip(weights, results, strict=True)).backward()
    sum((w * x).sum() for w, x in zip(weights, expected, strict=True)).backward()
    with torch.no_grad():
        ends = [
            reference(*truth[:3], torch.full_like(truth[3], w), fixed, angles, truth[4], first, decay)[0]
            for w in (0, 1)
        ]
        summed = (weights[0] * (ends[1] - ends[0])).square().sum((0, 1, 3)).sqrt()
    for name, x, other in zip(("q", "k", "v", "mixing", "state"), ours, truth, strict=True):
        assert x.grad is not None, name
        if name == "mixing":
            assert (x.grad.cpu() - other.grad).norm() <= tolerance * summed.norm()
        else:
            assert relative(x.grad.cpu(), other.grad) <= tolerance, f"gradient of {name}"


def assert_is_the_window(
    given: list[Tensor],
    fixed: Settings,
    angles: tuple[Tensor, Tensor] | None = None,
    first: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> None:
    """What is left where the recurrence has no weight: output and gradients of q, k and v."""
    given = [x.to(dtype) for x in given[:3]]
    ours = [x.to(DEVICE, copy=True).requires_grad_() for x in given]
    truth = [x.double().requires_grad_() for x in given]
    moved = None if angles is None else (angles[0].to(DEVICE), angles[1].to(DEVICE))
    there = None if first is None else first.to(DEVICE)
    with torch.no_grad():
        alone = windowed(*ours, fixed, moved, there)
    output = windowed(*ours, fixed, moved, there)
    expected, _ = reference(*truth, torch.zeros(given[0].shape[2]), fixed._replace(gate="mlstm"), angles, None, first)
    weights = torch.randn_like(expected)
    for result in (output, alone):
        assert result.dtype == dtype
        assert_close(result.cpu(), expected, tolerance)
    gradients = torch.autograd.grad(output, ours, weights.to(output))
    for gradient, other in zip(gradients, torch.autograd.grad(expected, truth, weights), strict=True):
        assert_close(gradient.cpu(), other, tolerance)


def in_groups(monkeypatch, heads: int = 1) -> list[str]:
    """Has a program of `group_output` take `heads` at once, however few programs there are; what it then launched."""
    from linearize.ops import liger_fused

    launched, launch = [], liger_fused.launch
    monkeypatch.setattr(liger_fused, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(liger_fused, "launch", lambda kernel, call: (launched.append(kernel), launch(kernel, call))[1])
    for size, found in liger_fused.LAUNCHES["group_output"].items():
        monkeypatch.setitem(liger_fused.LAUNCHES["group_output"], size, found._replace(heads=heads))
    return launched
