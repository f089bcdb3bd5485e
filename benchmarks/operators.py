"""Liger Attention against causal softmax attention, both in one process.

    python -m benchmarks.operators --out docs/results/operators_cpu.json

The shapes of SmolLM2-135M's attention: 9 query and 3 key/value heads of 64, batch 1, fp32; window 64, 4 sinks.
The floor is the time to read q, k, v and write the output once, at the copy speed measured in the same process.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import provenance, write
from linearize.config import MixerConfig
from linearize.features import softmax
from linearize.ops.gated_linear import gated_linear
from linearize.ops.local import Scoring, Sinks, local_attention
from linearize.structures import STRUCTURES
from linearize.structures.base import Layer

HEADS, KV_HEADS, SIZE, WINDOW, SINKS = 9, 3, 64, 64, 4
LAYER = Layer(MixerConfig(), 0, 30, HEADS, KV_HEADS, SIZE, HEADS * SIZE)


def main() -> None:
    """Time every operator at every length, forward and with backward, and write the raw times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    copy = copy_speed(arguments.runs)
    for length in arguments.lengths:
        q, k, v = (torch.randn(1, length, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
        floor = (2 * q.nbytes + k.nbytes + v.nbytes) / copy
        print(f"T = {length}: floor {1000 * floor:.2f} ms")
        for name, operator in OPERATORS.items():
            for backward in (False, True):
                seconds = times(operator, (q, k, v), backward, arguments.runs)
                row = {"operator": name, "length": length, "backward": backward, "floor": floor, "seconds": seconds}
                rows.append(row)
                print(
                    f"  {name:20} {'forward + backward' if backward else 'forward':20} {1000 * median(seconds):9.2f} ms"
                )
    write(
        arguments.out, {**provenance(), "threads": torch.get_num_threads(), "copy_bytes_per_second": copy, "rows": rows}
    )


def causal_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by PyTorch's own kernel, heads grouped."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The window and sinks alone."""
    sinks = Sinks(k[:, :SINKS], v[:, :SINKS], torch.arange(SINKS)[None])
    return local_attention(q, k, v, WINDOW, Scoring(SIZE**-0.5), sinks)[0]


def recurrence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The gated recurrence alone, gate and feature maps included."""
    return gated_linear(*STRUCTURES["gla"].inputs(softmax(q), softmax(k), v, k, LAYER))[0]


def liger(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Window, sinks and recurrence, mixed."""
    return 0.98 * window(q, k, v) + 0.02 * recurrence(q, k, v)


OPERATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "causal softmax": causal_softmax,
    "window + sinks": window,
    "gla recurrence": recurrence,
    "liger attention": liger,
}


def times(operator: Callable[..., Tensor], inputs: tuple[Tensor, ...], backward: bool, runs: int) -> list[float]:
    """Seconds of `runs` calls after one to warm up."""
    inputs = tuple(x.clone().requires_grad_(backward) for x in inputs)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        output = operator(*inputs)
        if backward:
            output.backward(torch.ones_like(output))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def copy_speed(runs: int) -> float:
    """Bytes read and written per second by a copy that does not fit into the caches."""
    source = torch.randn(64 * 2**20 // 4)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / median(seconds[1:])


if __name__ == "__main__":
    main()
