"""A training step in fewer kernels: decoder layers by `torch.compile` on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from linearize.convert import attention_of, decoder

SHAPES = 64  # compilations of one module: with and without gradients, by stage and batch; torch's own limit is 8


@contextmanager
def compiled_layers(*models: PreTrainedModel, whole: bool = True) -> Iterator[None]:
    """The layers of `models` compiled meanwhile; nothing on a CPU, where that would take longer than it saves.

    Layers are alike, so that one compilation serves all of one model: some 10 s each for the first step. The kernels
    of Liger Attention are operators that are called from what is compiled. If not `whole`, norms and MLPs are compiled
    one by one: alignment listens to the teacher's attention and runs mixers without their layers. Where compiling
    fails, `train.graph` goes on without.
    """
    found = [part for model in models if model.device.type == "cuda" for part in _parts(model, whole)]
    if not found:
        yield
        return
    for part in found:
        part.compile(dynamic=False)
    try:
        with torch._dynamo.config.patch(recompile_limit=SHAPES, suppress_errors=True):
            yield
    finally:
        torch.compiler.set_stance("default")  # `train.graph` may have changed it
        for part in found:
            part._compiled_call_impl = None  # torch has no public way back


def _parts(model: PreTrainedModel, whole: bool) -> Iterator[nn.Module]:
    for index, layer in enumerate(decoder(model).layers):
        if whole:
            yield layer
        else:
            yield from (part for part in layer.children() if part is not attention_of(model, index))
