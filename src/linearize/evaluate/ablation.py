"""One branch of a converted model switched off, to see what a model that was trained with both loses without it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from transformers import PreTrainedModel

from linearize.convert import mixers


def ablations(model: PreTrainedModel) -> bool:
    """Whether there is a branch to switch off: some layer has a recurrence, and each that has one has a window too."""
    recurrent = [mixer for mixer in mixers(model) if mixer.recurrence is not None]
    return bool(recurrent) and all(mixer.mixing is not None for mixer in recurrent)


def recurrence_off(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The ablation: the window alone in every converted layer, with the weights as they are."""
    return _without(model, "recurrence")


def window_off(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The ablation: the recurrence alone in every converted layer that has one; neither window nor sinks."""
    return _without(model, "window")


@contextmanager
def _without(model: PreTrainedModel, branch: str) -> Iterator[None]:
    found: list[Any] = [mixer for mixer in mixers(model) if mixer.recurrence is not None]
    try:
        for mixer in found:
            mixer.ablated = branch
        yield
    finally:
        for mixer in found:
            mixer.ablated = None
