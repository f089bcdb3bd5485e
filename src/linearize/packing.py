"""Packed documents in softmax layers as transformers has them: by masks or, on a GPU, by where each document starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linearize.families import family_of
from linearize.ops.dispatch import HALF

_most: int | None = None  # documents in a row at most, inside `packing`


@contextmanager
def packing(documents: int | None) -> Iterator[None]:
    """Inside, transformers makes masks for up to so many documents in a row, whatever it would see; None: as it sees.

    It looks for documents in position ids and makes no mask where there are none; but while a CUDA graph is recorded
    it cannot look and makes one, and the layers that were compiled without would be compiled again in the recording.
    """
    global _most
    if documents is None:
        yield
        return
    told = {
        "find_packed_sequence_indices": _documents if documents > 1 else lambda positions: None,
        "is_tracing": lambda *_: False,  # there is nothing more to look at
    }
    kept, before = {name: getattr(masking_utils, name) for name in told}, _most
    try:
        _most = documents
        for name, function in told.items():
            setattr(masking_utils, name, function)
        yield
    finally:
        _most = before
        for name, function in kept.items():
            setattr(masking_utils, name, function)


def document_masks(model: PreTrainedModel, inputs: Tensor, positions: Tensor | None) -> Any:
    """What keeps packed documents apart in softmax layers, to be given as the attention mask.

    `inputs` is `[B, T, ...]`, ids or embeddings; `model` may be the decoder alone. None where the family makes masks
    itself, of position ids. Where it is known how many documents there are and a kernel can do without a mask, it is
    where they start, `[1, 1, 1, B documents + 1]`, which transformers passes on to `attend` as it is.
    """
    if positions is None:
        return None
    if _most is not None and _most > 1 and by_starts(model):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend  # and stays: a checkpointed layer runs once more after this
        return starts(positions.expand(inputs.shape[:2]), _most)[None, None, None]
    if family_of(model.config).separates_documents:
        return None
    like = model.get_input_embeddings().weight.new_empty(*inputs.shape[:2], 0)  # of which only shape and type count
    given = {"inputs_embeds": like, "attention_mask": None, "past_key_values": None, "position_ids": positions}
    return create_masks_for_generate(model.config, **given)


def by_starts(model: PreTrainedModel) -> bool:
    """Whether the softmax layers of a model, as it runs now, can take `starts` in place of a mask."""
    family, config, weight = family_of(model.config), model.config, model.get_input_embeddings().weight
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    plain = not family.softcap and not family.null_logits and config._attn_implementation == "sdpa"
    slides = getattr(config, "sliding_window", None) is not None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not weight.is_cuda or dtype not in HALF or not plain or slides or size % 8 or size > 256:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(weight.device) >= (8, 0)


def starts(positions: Int[Tensor, "B T"], documents: int) -> Int[Tensor, "B*documents+1"]:
    """The first token of each document, counted through all rows, and the end, int32; a document that a row lacks
    starts where the row ends. `documents` are those of a row at most."""
    B, T = positions.shape
    number = torch.arange(documents, device=positions.device).expand(B, -1).contiguous()
    first = torch.searchsorted(_documents(positions), number)
    first += T * torch.arange(B, device=positions.device)[:, None]
    return torch.nn.functional.pad(first.flatten(), (0, 1), value=B * T).int()


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any) -> Any:
    """As transformers' function for `sdpa`, of which it has all arguments; `starts` are no mask to it, but documents.

    query `[B, H, T, D]`, key and value `[B, KV, T, D]` to `[B, T, H, D]`.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    B, _, T, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value))
    return of_documents(q, k, v, attention_mask.flatten(), T, given["scaling"]).unflatten(0, (B, T)), None


def of_documents(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
    """Causal attention of each document by FlashAttention: q `[tokens, H, D]`, k and v `[tokens, KV, D]` to the
    first's shape."""
    fixed = starts, starts, longest, longest, 0.0, True, False
    return torch.ops.aten._flash_attention_forward(q, k, v, *fixed, scale=scale)[0]


def _documents(positions: Tensor) -> Tensor:
    """The number of each token's document in its row, from 0, both `[B, T]`."""
    return (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)
