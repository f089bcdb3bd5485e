"""Liger Attention on a GPU: in one operator, in two, and causal softmax attention (FlashAttention), in one process.

    python -m benchmarks.kernels --out docs/results/kernels_h100.json --seconds 300

bf16, window 64, 4 sinks, random inputs, gradients of everything; the median of many runs by device events. The floor
is the time to move what must be moved, at the copy speed measured here: forward reads q, k, v and writes the output;
backward reads those and the output's gradient, and writes three gradients. What is timed is the replay of a CUDA graph,
as in training and decoding, so that launches from Python, which small shapes would wait for, are no part of it. All
programs are compiled first, side by side; how long each took is kept.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import provenance, write
from benchmarks.timing import copy_speed, graphed, times
from benchmarks.tune import compile_all
from linearize.ops import gated_linear
from linearize.ops.liger import Settings, compose, fused, windowed


class Shape(NamedTuple):
    """One layer's attention."""

    B: int
    T: int
    H: int
    KV: int
    D: int


SHAPES = [
    Shape(4, 8192, 32, 8, 128),
    Shape(4, 8192, 32, 8, 64),
    Shape(4, 8192, 32, 32, 128),
    Shape(4, 8192, 9, 3, 64),  # SmolLM2-135M
    Shape(16, 8192, 32, 8, 128),
    Shape(1, 131072, 32, 8, 128),
]
GATES = ["gla", "mamba2", "rwkv6", "gated_deltanet"]
SEPARATE = SHAPES[:2]  # one for each head size


def main() -> None:
    """Time every shape until the time is up, and write what there is after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300, help="begin nothing after this long")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--processes", type=int, default=16, help="that compile")
    arguments = parser.parse_args()
    stop = time.perf_counter() + arguments.seconds
    torch.manual_seed(0)
    copy = copy_speed()
    print(f"{torch.cuda.get_device_name()}, copy {copy / 1e12:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    runs = [(shape, *side) for shape in SHAPES[: arguments.shapes] for side in sides(shape).items()]
    fused_runs = [(shape, operator) for shape, name, operator in runs if name.startswith("fused")]
    calls = (made(operator, shape, backward) for shape, operator in fused_runs for backward in (False, True))
    first = compile_all(calls, arguments.processes)
    for shape, name, operator in runs:
        for backward in (False, True):
            if time.perf_counter() > stop:
                print(f"no time for {name} of {tuple(shape)}")
                continue
            found = measure(made(operator, shape, backward))
            rows.append({**shape._asdict(), "operator": name, "backward": backward, **found})
            rows[-1]["floor"] = moved(shape, backward) / copy
            print(describe(rows[-1]), flush=True)
            write(arguments.out, {**provenance(), "copy_bytes_per_second": copy, "compiling": first, "rows": rows})


def sides(shape: Shape) -> dict[str, Callable[..., Tensor]]:
    """What is compared, each of q, k, v, mixing weights and angles."""

    def liger(run: Callable[..., tuple[Tensor, Tensor]], gate: str) -> Callable[..., Tensor]:
        fixed = Settings(gate, shape.D**-0.5)
        return lambda q, k, v, mixing, rope: run(q, k, v, mixing, fixed, rope)[0]

    def softmax(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shape.H != shape.KV).transpose(1, 2)

    found: dict[str, Callable[..., Tensor]] = {f"fused {gate}": liger(fused, gate) for gate in GATES}
    found["causal softmax"] = softmax
    if shape in SEPARATE:
        found["separate gla"] = liger(separate, "gla")
    return found


def separate(
    q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, settings: Settings, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """As `fused`, by kernels of the window and of the recurrence; gates, maps, RoPE and mixing are PyTorch's."""

    def window(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return windowed(q, k, v, settings), None

    return compose(q, k, v, mixing, settings, rope, None, None, None, gated_linear.gated_linear, window)


def made(operator: Callable[..., Tensor], shape: Shape, backward: bool) -> Callable[[], None]:
    """A call with inputs of its own."""
    B, T, H, KV, D = shape
    q, k, v = (torch.randn(B, T, n, D, device="cuda", dtype=torch.bfloat16) for n in (H, KV, KV))
    angles = torch.arange(T, device="cuda")[:, None] * 10000 ** (-torch.arange(0, D, 2, device="cuda") / D)
    rope = tuple(x.repeat(1, 2).bfloat16() for x in (angles.cos(), angles.sin()))
    leaves = [x.requires_grad_(backward) for x in (q, k, v, torch.full((H,), 0.3, device="cuda"))]
    doutput = torch.randn_like(q)

    def call() -> None:
        output = operator(*leaves, rope)
        if backward:
            torch.autograd.grad(output, leaves[:3], doutput)

    return call


def measure(call: Callable[[], None]) -> dict[str, Any]:
    """Seconds of the first call, and of a graph's replays; the second call's peak memory beyond the inputs, in bytes;
    or why there are none."""
    try:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        first_call = time.perf_counter() - start
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        held = torch.cuda.max_memory_allocated() - held
        return {"first_call": first_call, "bytes": held, "seconds": times(graphed(call))}
    except torch.OutOfMemoryError:
        why = "out of memory"
    except Exception as error:  # the other rows are worth knowing
        why = f"{type(error).__name__}: {str(error)[:200]}"
    return {"first_call": None, "seconds": [], "bytes": None, "error": why}


def moved(shape: Shape, backward: bool) -> int:
    """Bytes that cannot be avoided."""
    queries, keys = (2 * shape.B * shape.T * heads * shape.D for heads in (shape.H, shape.KV))
    return 2 * queries + 2 * keys + backward * (3 * queries + 4 * keys)


def describe(row: dict[str, Any]) -> str:
    """A line for the terminal."""
    what = f"{row['B']}x{row['T']} H={row['H']} KV={row['KV']} D={row['D']} {row['operator']:16}"
    what += " forward + backward" if row["backward"] else " forward           "
    if not row["seconds"]:
        return f"{what} {row['error']}"
    median = 1000 * statistics.median(row["seconds"])
    rest = (
        f"floor {1000 * row['floor']:6.2f} ms, first call {row['first_call']:5.1f} s, {row['bytes'] / 2**30:5.2f} GiB"
    )
    return f"{what} {median:8.3f} ms, {rest}"


if __name__ == "__main__":
    main()
