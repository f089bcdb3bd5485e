"""A training step in fewer kernels: decoder layers by `torch.compile` on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.convert import attention_of, decoder
from linearize.mixer import LinearizedAttention
from linearize.structures import STRUCTURES

SHAPES = 64  # compilations of one module: with and without gradients, by stage and batch; torch's own limit is 8
INDUCTOR = "inductor"  # torch's own compiler


@contextmanager
def compiled_layers(*models: PreTrainedModel, whole: bool = True, backend: Any = INDUCTOR) -> Iterator[None]:
    """The layers of `models` compiled meanwhile; nothing on a CPU, where that would take longer than it saves.

    Layers are alike, so that one compilation serves all of one model: some 10 s each for the first step. The kernels
    of Liger Attention are operators that are called from what is compiled. If not `whole`, norms and MLPs are compiled
    one by one: alignment listens to the teacher's attention and runs mixers without their layers. So are those
    of layers whose mixers' constants differ by depth, since each would be compiled for itself. Where compiling fails,
    `train.graph` goes on without. Another `backend`, as `torch.compile` has them, is for CPUs too.
    """
    models = tuple(model for model in models if model.device.type == "cuda" or backend != INDUCTOR)
    if not models:
        yield
        return
    found = [part for model in models for part in _parts(model, whole)]
    hooks = [model.get_input_embeddings().register_forward_hook(_as_between_layers) for model in models]
    for part in found:
        part.compile(dynamic=False, backend=backend)
    try:
        with torch._dynamo.config.patch(recompile_limit=SHAPES, suppress_errors=True):
            yield
    finally:
        torch.compiler.set_stance("default")  # `train.graph` may have changed it
        for part in found:
            part._compiled_call_impl = None  # torch has no public way back
        for hook in hooks:
            hook.remove()


def _as_between_layers(_: nn.Module, __: Any, output: Tensor) -> None:
    """What is compiled for the first layer then serves those whose input has a gradient."""
    if torch.is_grad_enabled():
        output.requires_grad_()


def _parts(model: PreTrainedModel, whole: bool) -> Iterator[nn.Module]:
    for index, layer in enumerate(decoder(model).layers):
        attention = attention_of(model, index)
        if whole and _alike(attention):
            yield layer
        else:
            yield from (part for part in layer.children() if part is not attention)


def _alike(attention: nn.Module) -> bool:
    if not isinstance(attention, LinearizedAttention) or attention.config.structure == "none":
        return True
    return not STRUCTURES[attention.config.structure].by_depth
