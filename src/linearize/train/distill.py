"""Distillation: the teacher's next-token distribution, end to end."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.convert import decoder, is_linearized
from linearize.families import Head
from linearize.packing import document_masks, packing
from linearize.train.losses import distillation_loss


def distill_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: dict[str, Tensor],
    kl_weight: float = 1.0,
    ramp: int = 0,
    documents: int | None = None,
) -> Tensor:
    """a·KL(teacher ‖ student) + (1-a)·next token, a = `kl_weight`, mean over tokens; 0 needs no teacher. Over the first
    `ramp` tokens of a document weights rise to 1: most of what these look back on is in the window.

    `documents` is how many are packed into a row at most, where that is known.
    """
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    teacher_hidden = None
    with packing(documents):
        masks = {"attention_mask": document_masks(teacher, batch["input_ids"], batch["position_ids"])}
        told = {"documents": documents} if is_linearized(student) else masks
        if kl_weight > 0:
            with torch.no_grad():
                teacher_hidden = decoder(teacher)(**inputs, **masks).last_hidden_state.flatten(0, 1)
        student_hidden = decoder(student)(**inputs, **told).last_hidden_state.flatten(0, 1)
    weights = ((batch["position_ids"].flatten() + 1) / ramp).clamp(max=1) if ramp > 0 else None
    heads = Head(student), Head(teacher)
    return distillation_loss(student_hidden, teacher_hidden, *heads, batch["targets"].flatten(), kl_weight, weights)
