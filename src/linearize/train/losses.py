"""Plain loss functions over tensors."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from linearize.train.data import IGNORED


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """‖output - target‖² / ‖target‖² over all elements, in fp32."""
    output, target = output.float(), target.float()
    return (output - target).square().sum() / target.square().sum()


def distillation_sums(
    student: Float[Tensor, "N vocab"],
    teacher: Float[Tensor, "N vocab"] | None,
    targets: Int[Tensor, "N"],
    kl_weight: float,
) -> Tensor:
    """Sum over tokens that have a target of a·KL(teacher ‖ student) + (1-a)·cross-entropy, a = `kl_weight`, in nats."""
    log_p = student.float().log_softmax(-1)
    total = (1 - kl_weight) * F.nll_loss(log_p, targets, ignore_index=IGNORED, reduction="sum")
    if teacher is not None:
        divergence = F.kl_div(log_p, teacher.float().log_softmax(-1), reduction="none", log_target=True).sum(-1)
        counted = divergence.masked_fill(targets == IGNORED, 0)  # not by index, which would wait for the GPU
        total = total + kl_weight * counted.sum()
    return total


@cache
def _compiled_sums() -> Callable[..., Tensor]:
    """`distillation_sums` without its many passes over logits."""
    return torch.compile(distillation_sums)


def distillation_loss(
    student_hidden: Float[Tensor, "N hidden"],
    teacher_hidden: Float[Tensor, "N hidden"] | None,
    student_head: nn.Module,
    teacher_head: nn.Module,
    targets: Int[Tensor, "N"],
    kl_weight: float,
    rows: int = 1024,
) -> Tensor:
    """The mean of `distillation_sums` over tokens with a target, without ever holding all logits.

    The heads run on `rows` tokens at a time; the gradient of a chunk is taken at once and its logits are dropped, so
    that student's and teacher's full logits never exist, and nothing is computed twice.
    """

    sums = _compiled_sums() if student_hidden.is_cuda else distillation_sums

    def chunk_loss(hidden: Tensor, start: int) -> Tensor:
        part = slice(start, start + rows)
        with torch.no_grad():
            expected = None if teacher_hidden is None else teacher_head(teacher_hidden[part])
        return sums(student_head(hidden[part]), expected, targets[part], kl_weight) / count

    count = (targets != IGNORED).sum().clamp(min=1)
    starts = range(0, len(targets), rows)
    trainable = [p for p in student_head.parameters() if p.requires_grad]
    return _ChunkedSum.apply(chunk_loss, starts, student_hidden, *trainable)


class _ChunkedSum(torch.autograd.Function):
    """Σ f(hidden, start) over chunks, differentiated while it is summed."""

    @staticmethod
    def forward(ctx, function: Callable[[Tensor, int], Tensor], starts: Sequence[int], *inputs: Tensor) -> Tensor:
        hidden, *parameters = inputs
        leaf = hidden.detach().requires_grad_()
        gradients = [torch.zeros_like(x) for x in inputs]
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in starts:
            with torch.enable_grad():
                loss = function(leaf, start)
            for gradient, new in zip(gradients, torch.autograd.grad(loss, [leaf, *parameters]), strict=True):
                gradient += new
            total += loss.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, None, *(gradient * saved for saved in ctx.saved_tensors)
