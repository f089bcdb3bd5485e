"""Gradient checkpointing: layers that run again in the backward pass, in place of keeping what they made."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from linearize.convert import decoder


@contextmanager
def recomputed_layers(model: PreTrainedModel) -> Iterator[None]:
    """Every decoder layer of `model` keeps its inputs alone meanwhile.

    Entered after `compiled_layers`, it goes around what is compiled; transformers' own goes around a layer or into it,
    by its version.
    """
    kept = [(layer, layer._compiled_call_impl) for layer in decoder(model).layers]
    for layer, compiled in kept:  # torch has no public way to change how a module is called
        call = layer._call_impl if compiled is None else compiled
        layer._compiled_call_impl = partial(checkpoint, call, use_reentrant=False, preserve_rng_state=draws(model))
    try:
        yield
    finally:
        for layer, compiled in kept:
            layer._compiled_call_impl = compiled


def draws(model: PreTrainedModel) -> bool:
    """Whether a layer in training draws random numbers, which have to be the same when it runs again: any dropout, a
    module's or a setting's, or a router's noise. To go back to a random state is nothing that a CUDA graph can hold."""
    settings = (value for name, value in model.config.to_dict().items() if "drop" in name or "jitter" in name)
    modules = (module.p for module in model.modules() if "Dropout" in type(module).__name__)
    return any(isinstance(p, float) and p > 0 for p in (*settings, *modules))
