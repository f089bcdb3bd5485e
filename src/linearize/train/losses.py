"""Plain loss functions over tensors."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from linearize.ops.distillation import distillation
from linearize.train.sequences import IGNORED

LOGITS = 2**28  # of one model at once on a GPU: half a gigabyte in bf16


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """‖output - target‖² / ‖target‖² over all elements, in fp32."""
    output, target = output.float(), target.float()
    return (output - target).square().sum() / target.square().sum()


def distillation_loss(
    student_hidden: Float[Tensor, "N hidden"],
    teacher_hidden: Float[Tensor, "N hidden"] | None,
    student_head: nn.Module,
    teacher_head: nn.Module,
    targets: Int[Tensor, "N"],
    kl_weight: float,
    weights: Float[Tensor, "N"] | None = None,
    rows: int | None = None,
) -> Tensor:
    """The mean over tokens with a target of a·KL(teacher ‖ student) + (1-a)·cross-entropy, a = `kl_weight`, in nats,
    without ever holding all logits; times `weights`, where not all tokens count alike: they are not made to add up, so
    that the mean of several batches of as many tokens is that of one.

    The heads run on `rows` tokens at a time, by default as many as `LOGITS` allows; the gradient of a chunk is taken at
    once and its logits are dropped, so that student's and teacher's full logits never exist, and nothing is computed
    twice.
    """

    def chunk_loss(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        expected = None if teacher_hidden is None else teacher_head(teacher_hidden[part])
        return distillation(logits, expected, targets[part], kl_weight, shares[part])

    if rows is None:
        vocabulary = max(p.shape[0] for p in student_head.parameters())
        rows = max(1024, 2 ** (LOGITS // vocabulary).bit_length() // 2) if student_hidden.is_cuda else 1024
    counted = (targets != IGNORED).float()
    shares = (counted if weights is None else counted * weights) / counted.sum().clamp(min=1)
    parts = [slice(start, start + rows) for start in range(0, len(targets), rows)]
    trainable = [p for p in student_head.parameters() if p.requires_grad]
    return _ChunkedSum.apply(chunk_loss, student_head, parts, student_hidden, *trainable)


class _ChunkedSum(torch.autograd.Function):
    """Σ f(head(hidden[part]), part) over parts, differentiated while it is summed: f gives its gradient as well."""

    @staticmethod
    def forward(
        ctx,
        function: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        head: nn.Module,
        parts: Sequence[slice],
        *inputs: Tensor,
    ) -> Tensor:
        hidden, *parameters = inputs
        gradients = [torch.zeros_like(x) for x in inputs]
        total = hidden.new_zeros((), dtype=torch.float32)
        for part in parts:
            leaf = hidden[part].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(leaf)
            loss, dlogits = function(logits.detach(), part)
            places = gradients[0][part], *gradients[1:]
            for gradient, new in zip(places, torch.autograd.grad(logits, [leaf, *parameters], dlogits), strict=True):
                gradient += new
            total += loss
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, None, None, *(gradient * saved for saved in ctx.saved_tensors)
