"""Distillation's loss over the vocabulary against the formula in float64: by PyTorch, and by the kernel, without a GPU
in Triton's interpreter."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_close
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("the kernel is Triton's", allow_module_level=True)

if not torch.cuda.is_available():
    import interpreted  # noqa: F401

from linearize.ops import dispatch, distillation, distillation_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100
# of the loss, and of its gradient, which is rounded once
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-5, 5e-3), torch.bfloat16: (1e-5, 5e-3)}
RUNS = {"plain": distillation.reference, "parts": distillation.distillation, "kernel": distillation_triton.distillation}
pytestmark = pytest.mark.usefixtures("checked_kernels")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(distillation, "ROWS", 2)


def inputs(vocabulary: int, dtype: torch.dtype, N: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, some of them near each other, targets, of which the second is none, and weights."""
    student = 3 * torch.randn(N, vocabulary)
    teacher = student + torch.logspace(-1, 0.5, N)[:, None] * torch.randn(N, vocabulary)
    targets = torch.randint(vocabulary, (N,))
    targets[1] = IGNORED
    weights = torch.rand(N).masked_fill(targets == IGNORED, 0)
    return *(x.to(DEVICE, dtype) for x in (student, teacher)), targets.to(DEVICE), weights.to(DEVICE)


def formula(student: Tensor, teacher: Tensor | None, targets: Tensor, kl_weight: float, weights: Tensor) -> tuple:
    """Loss and gradient in float64."""
    leaf, keep = student.double().requires_grad_(), targets != IGNORED
    given = leaf[keep]
    losses = (1 - kl_weight) * F.cross_entropy(given, targets[keep], reduction="none")
    if teacher is not None:
        log_p = teacher.double()[keep].log_softmax(-1)
        losses = losses + kl_weight * (log_p.exp() * (log_p - given.log_softmax(-1))).sum(-1)
    loss = (losses * weights[keep].double()).sum()
    return loss.detach(), *torch.autograd.grad(loss, leaf)


def assert_is_the_formula(run, student, teacher, targets, kl_weight, weights, tolerance) -> None:
    expected, slopes = formula(student, teacher, targets, kl_weight, weights)
    loss, gradient = run(student.clone(), None if teacher is None else teacher.clone(), targets, kl_weight, weights)
    assert loss.dtype == torch.float32
    assert gradient.dtype == student.dtype
    assert_close(loss, expected, tolerance[0])
    assert_close(gradient, slopes, tolerance[1])
    assert not gradient[targets == IGNORED].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("vocabulary", [1, 11, 1000, 9001, 16384])  # one block, or several, whole or not
def test_is_the_formula(vocabulary, kl_weight, run, dtype):
    student, teacher, targets, weights = inputs(vocabulary, dtype)
    assert_is_the_formula(run, student, teacher, targets, kl_weight, weights, TOLERANCE[dtype])


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_next_token_alone(run):
    student, _, targets, weights = inputs(9000, torch.float32)
    for kl_weight in (0.0, 0.4):
        assert_is_the_formula(run, student, None, targets, kl_weight, weights, TOLERANCE[torch.float32])


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_logits_of_different_types(run):
    student, teacher, targets, weights = inputs(1000, torch.float32)
    for given in ((student, teacher.bfloat16()), (student.bfloat16(), teacher)):
        assert_is_the_formula(run, *given, targets, 0.7, weights, TOLERANCE[given[0].dtype])


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_large_logits(run):
    """What is far below the largest vanishes, and nothing overflows."""
    student, teacher, targets, weights = inputs(9000, torch.float32)
    student, teacher = 1000 * student, 1000 * teacher
    student[2:, ::7] -= 60000
    assert_is_the_formula(run, student, teacher, targets, 0.5, weights, TOLERANCE[torch.float32])


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_no_target_at_all(run):
    student, teacher, targets, weights = inputs(1000, torch.float32)
    loss, gradient = run(student, teacher, targets.fill_(IGNORED), 0.5, weights.zero_())
    assert loss.item() == 0
    assert not gradient.any()


def test_what_has_no_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "no_device", lambda x: None)
    x = torch.zeros(2, 3)
    assert distillation.why_not_fused(x, x.half()) is None
    assert distillation.why_not_fused(x.bfloat16(), None) is None
    assert distillation.why_not_fused(x, x.double()) == "no kernel for logits in torch.float64"
