"""Several processes of one job, as `torchrun` starts them: all train, and the first one alone measures and writes."""

import os

import torch


def start() -> None:
    """Be one of them, with a GPU of its own as the current one, if there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState()


def is_first() -> bool:
    """Whether this is the one that writes, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Until all of them are here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def end_others() -> None:
    """What is left to do is for the first one."""
    if not is_first():
        raise SystemExit(0)
