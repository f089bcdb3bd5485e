"""CUDA graphs: what runs again and again is recorded once, and replayed without Python between its kernels."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
WARM_UP = 2  # runs before a recording: kernels are compiled then, and libraries choose their algorithms


class RecordingError(Exception):
    """What cannot be a graph, as what waits for the GPU cannot; its text says why."""


def on_the_side(run: Callable[[], T], times: int = WARM_UP, stream: torch.cuda.Stream | None = None) -> T:
    """Run so often on a stream that is not the current one, as what is to be recorded should be first; the last's
    result."""
    stream = torch.cuda.Stream() if stream is None else stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            result = run()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def record(run: Callable[[], T], stream: torch.cuda.Stream | None = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `run`, and what it gives: tensors that each replay writes again. Nothing runs, and what other threads
    do meanwhile spoils nothing. Raises RecordingError where recording fails, but for memory that runs out."""
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            return graph, run()
    except RuntimeError as error:
        torch.cuda.set_stream(before)  # which a failed recording does not leave as it was
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise RecordingError(str(error)) from error
