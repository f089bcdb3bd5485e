"""Plain loss functions over tensors."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from linearize.train.sequences import IGNORED

LOGITS = 2**28  # of one model at once on a GPU: half a gigabyte in bf16


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
    rows: int | None = None,
) -> Tensor:
    """The mean of `distillation_sums` over tokens with a target, without ever holding all logits.

    The heads run on `rows` tokens at a time, by default as many as `LOGITS` allows; the gradient of a chunk is taken at
    once and its logits are dropped, so that student's and teacher's full logits never exist, and nothing is computed
    twice.
    """

    sums = _compiled_sums() if student_hidden.is_cuda else distillation_sums

    def chunk_loss(hidden: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            expected = None if teacher_hidden is None else teacher_head(teacher_hidden[part])
        return sums(student_head(hidden), expected, targets[part], kl_weight) / count

    if rows is None:
        vocabulary = max(p.shape[0] for p in student_head.parameters())
        rows = max(1024, 2 ** (LOGITS // vocabulary).bit_length() // 2) if student_hidden.is_cuda else 1024
    count = (targets != IGNORED).sum().clamp(min=1)
    parts = [slice(start, start + rows) for start in range(0, len(targets), rows)]
    trainable = [p for p in student_head.parameters() if p.requires_grad]
    return _ChunkedSum.apply(chunk_loss, parts, student_hidden, *trainable)


class _ChunkedSum(torch.autograd.Function):
    """Σ f(hidden[part], part) over parts, differentiated while it is summed."""

    @staticmethod
    def forward(ctx, function: Callable[[Tensor, slice], Tensor], parts: Sequence[slice], *inputs: Tensor) -> Tensor:
        hidden, *parameters = inputs
        gradients = [torch.zeros_like(x) for x in inputs]
        total = hidden.new_zeros((), dtype=torch.float32)
        for part in parts:
            leaf = hidden[part].detach().requires_grad_()
            with torch.enable_grad():
                loss = function(leaf, part)
            places = gradients[0][part], *gradients[1:]
            for gradient, new in zip(places, torch.autograd.grad(loss, [leaf, *parameters]), strict=True):
                gradient += new
            total += loss.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, None, *(gradient * saved for saved in ctx.saved_tensors)
