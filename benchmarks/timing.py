"""How long a GPU takes."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def times(call: Callable[[], None], budget: float = 0.6) -> list[float]:
    """Seconds of at least 5 and at most 50 calls, after warming up, by device events."""
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    runs = min(50, max(5, int(budget / (time.perf_counter() - start))))
    for _ in range(max(2, runs // 5)):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of the call as a CUDA graph, which no launch from Python slows down; on a CPU the call as it is."""
    if not torch.cuda.is_available():
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_speed() -> float:
    """Bytes read and written per second by a device copy."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(times(lambda: (target.copy_(source), None)[1]))
