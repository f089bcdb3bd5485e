"""Alignment: each converted layer's attention output against the teacher's, on the teacher's own inputs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_cuda_stream_capturing

from linearize.convert import attention_of, decoder, mixers, with_ropes
from linearize.mixer import LinearizedAttention
from linearize.packing import document_masks, packing
from linearize.tokens import describe, most_sinks
from linearize.train.losses import relative_error
from linearize.train.recompute import draws


def align_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: dict[str, Tensor],
    checkpointing: bool = False,
    documents: int | None = None,
) -> Tensor:
    """Mean over converted layers of ‖mixer - attention‖² / ‖attention‖²; arguments as `layer_errors` takes them."""
    return torch.stack(list(layer_errors(student, teacher, batch, checkpointing, documents).values())).mean()


def layer_errors(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: dict[str, Tensor],
    checkpointing: bool = False,
    documents: int | None = None,
) -> dict[int, Tensor]:
    """‖mixer - attention‖² / ‖attention‖² of each converted layer.

    One teacher pass gives every layer its input and its target, so layers learn side by side and no gradient runs
    from one to the next; with `checkpointing` one layer's graph at a time is in memory. `documents` is how many are
    packed into a row at most, where that is known.
    """
    layers = mixers(student)
    with packing(documents):
        seen = _watch(teacher, [mixer.layer_idx for mixer in layers], batch)
    ids, positions, errors = batch["input_ids"], batch["position_ids"], {}
    sinks = most_sinks(student.config.linearize)
    for mixer in layers:
        kwargs, target = seen.pop(mixer.layer_idx)
        tokens = describe(ids.shape, sinks, target.device, position_ids=positions, documents=documents)
        tokens = with_ropes(tokens, decoder(student), ids, positions, documents=documents)
        inputs = (mixer, kwargs["hidden_states"], kwargs["position_embeddings"], tokens, kwargs["attention_mask"])
        if checkpointing:
            output = checkpoint(_run, *inputs, use_reentrant=False, preserve_rng_state=draws(student))
        else:
            output = _run(*inputs)
        error = relative_error(output, target)
        if not is_cuda_stream_capturing() and not torch.isfinite(error):
            raise FloatingPointError(f"the attention output of layer {mixer.layer_idx}")
        errors[mixer.layer_idx] = error
    return errors


def _run(mixer: LinearizedAttention, hidden: Tensor, rope: tuple[Tensor, Tensor], tokens: Any, mask: Any) -> Tensor:
    return mixer(hidden, rope, tokens=tokens, attention_mask=mask)[0]


def _watch(teacher: PreTrainedModel, layers: list[int], batch: dict[str, Tensor]) -> dict[int, tuple[dict, Tensor]]:
    """Keyword arguments and output of the teacher's attention in each of `layers`."""
    seen: dict[int, tuple[dict, Tensor]] = {}

    def keep(index: int) -> Any:
        def hook(_: nn.Module, __: Any, kwargs: dict, output: tuple) -> None:
            seen[index] = kwargs, output[0]

        return hook

    handles = [attention_of(teacher, i).register_forward_hook(keep(i), with_kwargs=True) for i in layers]
    try:
        with torch.no_grad():
            inputs, positions = batch["input_ids"], batch["position_ids"]
            masks = document_masks(teacher, inputs, positions)
            decoder(teacher)(input_ids=inputs, position_ids=positions, attention_mask=masks, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen
