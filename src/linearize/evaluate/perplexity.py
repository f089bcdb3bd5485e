"""Loss by position and greedy agreement on held-out text."""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from linearize.convert import decoder
from linearize.families import Head
from linearize.results import EARLY, ModelResult


class Scores(NamedTuple):
    """What one model says of every token but the first of each sequence."""

    loss: Float[Tensor, "N T-1"]  # nats
    greedy: Int[Tensor, "N T-1"]  # the most likely next token


def last_hidden(model: PreTrainedModel, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T hidden"]:
    """What the head reads, in the model's dtype; made in bf16 on a GPU, as in training, where fused kernels run."""
    gpu = ids.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if gpu else nullcontext():
        hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.to(model.dtype)  # in bf16, logits would often be equal


@torch.no_grad()
def score(model: PreTrainedModel, sequences: Int[Tensor, "N T"], label: str = "", rows: int = 1024) -> Scores:
    """Losses and greedy choices of `model`; logits exist for `rows` tokens at a time. A bar needs a label."""
    device, head = model.device, Head(model)
    losses, choices = [], []
    for ids in tqdm(sequences, desc=f"evaluate {label}", unit="sequence", delay=1, disable=not label):
        ids = ids.to(device)
        hidden = last_hidden(model, ids[None])[0, :-1]
        loss, choice = [], []
        for part, targets in zip(hidden.split(rows), ids[1:].split(rows), strict=True):
            logits = head(part).float()
            loss.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
            choice.append(logits.argmax(-1))
        losses.append(torch.cat(loss).cpu())
        choices.append(torch.cat(choice).cpu())
    return Scores(torch.stack(losses), torch.stack(choices))


def summarize(scores: Scores, teacher: Scores | None, bucket: int, **extra: int | None) -> ModelResult:
    """Scores in numbers; late is the second half of the positions."""
    length = scores.loss.shape[1] + 1
    by_position = scores.loss.double().mean(0)
    agreement = None if teacher is None else (scores.greedy == teacher.greedy).double().mean().item()
    return ModelResult(
        perplexity=math.exp(min(by_position.mean().item(), 700.0)),
        early_loss=by_position[:EARLY].mean().item(),
        late_loss=by_position[length // 2 :].mean().item(),
        loss_by_position=[part.mean().item() for part in by_position.split(bucket)],
        agreement=agreement,
        **extra,
    )
