"""The loss of distillation over the vocabulary, with the gradient of the student's logits."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from linearize.ops.dispatch import warn_once, why_no_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 32  # tokens at once on a CPU, whose cache keeps their logits while PyTorch goes over them: 6 MB of 49,152 each


def distillation(
    student: Float[Tensor, "N vocab"],
    teacher: Float[Tensor, "N vocab"] | None,
    targets: Int[Tensor, "N"],
    kl_weight: float,
    weights: Float[Tensor, "N"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "N vocab"]]:
    """Sum over tokens of `weights`, which are 0 where there is no target, times a·KL(teacher ‖ student) +
    (1-a)·cross-entropy, a = `kl_weight`, in nats; without a teacher, of the latter alone. And its gradient, which may
    be written over the teacher's logits."""
    reason = why_not_fused(student, teacher)
    if reason is None:
        from linearize.ops.distillation_triton import distillation as kernel

        with torch.cuda.device_of(student):  # kernels run on the current device
            return kernel(student, teacher, targets, kl_weight, weights)
    if student.is_cuda:
        warn_once(f"the loss over the vocabulary runs without its kernel, several times slower: {reason}")
        return reference(student, teacher, targets, kl_weight, weights)
    losses, gradients = [], torch.empty_like(student)
    for start in range(0, len(student), ROWS):
        part = slice(start, start + ROWS)
        taught = None if teacher is None else teacher[part]
        loss, gradients[part] = reference(student[part], taught, targets[part], kl_weight, weights[part])
        losses.append(loss)
    return torch.stack(losses).sum(), gradients


def why_not_fused(student: Tensor, teacher: Tensor | None) -> str | None:
    """What the kernel lacks for these logits; None if nothing."""
    given = [x.dtype for x in (student, teacher) if x is not None]
    return why_no_kernel(student, {f"logits in {dtype}": dtype not in DTYPES for dtype in given})


def reference(
    student: Float[Tensor, "N vocab"],
    teacher: Float[Tensor, "N vocab"] | None,
    targets: Int[Tensor, "N"],
    kl_weight: float,
    weights: Float[Tensor, "N"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "N vocab"]]:
    """As `distillation`, by PyTorch, which goes over the logits many times."""
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        log_p = _log_softmax(leaf)
        losses = (kl_weight - 1) * log_p.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
        if teacher is not None:
            divergence = F.kl_div(log_p, _log_softmax(teacher), reduction="none", log_target=True).sum(-1)
            losses = losses + kl_weight * divergence
        loss = (weights * losses).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def _log_softmax(logits: Tensor) -> Tensor:
    """In fp32 at least."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
