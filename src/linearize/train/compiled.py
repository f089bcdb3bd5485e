"""A training step in fewer kernels: what a decoder layer does around its attention, by `torch.compile` on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from linearize.convert import attention_of, decoder

SHAPES = 64  # compilations of one module: with and without gradients, by stage and batch; torch's own limit is 8


@contextmanager
def compiled_layers(*models: PreTrainedModel) -> Iterator[None]:
    """Norms and MLPs of `models` compiled meanwhile; nothing on a CPU, where that would take longer than it saves.

    Layers are alike, so that one compilation serves all of them: some 10 s for the first step. Attention stays as it
    is: the mixers bring kernels of their own, and alignment listens to the teacher's.
    """
    found = [part for model in models if model.device.type == "cuda" for part in _parts(model)]
    if not found:
        yield
        return
    for part in found:
        part.compile(dynamic=False)
    try:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            yield
    finally:
        for part in found:
            part._compiled_call_impl = None  # torch has no public way back


def _parts(model: PreTrainedModel) -> Iterator[nn.Module]:
    for index, layer in enumerate(decoder(model).layers):
        yield from (part for part in layer.children() if part is not attention_of(model, index))
