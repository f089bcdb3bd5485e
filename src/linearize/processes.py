"""Several processes of one job, as `torchrun` starts them: all train, and the first one alone measures and writes."""

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the one that writes, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def start() -> None:
    """Be one of them, with a GPU of its own as the current one, if there are several."""
    if count() > 1:
        from accelerate import PartialState

        PartialState()


def wait() -> None:
    """Until all of them are here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def told(value: T) -> T:
    """The first one's value."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


@torch.no_grad()
def make_same(tensors: Iterable[Tensor]) -> None:
    """Give them the first one's values."""
    if count() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Make each the mean over processes, by one message of them all."""
    if count() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.div_(count()).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(x) for part, x in zip(parts, tensors, strict=True)])


def end_others() -> None:
    """What is left to do is for the first one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_first():
        raise SystemExit(0)
