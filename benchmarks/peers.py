"""Liger Attention by libraries that have its branches: FlexAttention for the window, flash-linear-attention (fla) for
the recurrence. What the fused operator is compared with, and an oracle for tests on a GPU.

    pip install --no-deps fla-core==0.6.0 einops
    python -m benchmarks.peers --out docs/results/peers_h200.json --seconds 400

All that is done to an element, gates, feature maps, RoPE, mixing, is compiled by torch.compile; fla has no groups of
heads, so that keys and values are repeated for it. fla chooses among hundreds of launch settings by timing them at its
first call, one after the other: here every one of several processes first compiles its share of them into Triton's
cache, and the times are those of the settings it likes best. A result file that is there already is gone on from.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.kernels import SHAPES, Shape, describe, made, measure, moved, sides
from benchmarks.results import provenance, write
from benchmarks.timing import copy_speed
from linearize.ops.liger import DELTA, FEATURES, GATES, Rope, Settings, rotate

GATES_TIMED = ("gla", "gated_deltanet", "mamba2")


# --- the operators ---


def operands(q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    """Query, key, values and gates of the recurrence as fla takes them, for every query head."""
    query = FEATURES[settings.feature_map](q.float())
    if settings.gate in DELTA:
        query = F.normalize(query, dim=-1)
        key, *gates = DELTA[settings.gate](k.float(), settings)
    else:
        key, *gates = GATES[settings.gate](k.float(), settings, None)
    gates = [gate.squeeze(-1) for gate in gates]  # one decay and one β for each head, without a dimension
    repeated = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (key.to(q.dtype), v, *gates))
    return query.to(q.dtype), *repeated


def recurrence(settings: Settings, query: Tensor, key: Tensor, value: Tensor, *gates: Tensor) -> tuple[Tensor, Tensor]:
    """fla's, from `operands`: the output and the final state."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    decays = chunk_gla if gates[0].dim() == 4 else chunk_simple_gla
    chunked = chunk_gated_delta_rule if settings.gate in DELTA else decays
    return chunked(query, key, value, *gates, scale=1.0, output_final_state=True)


@cache
def mask(T: int, W: int, sinks: int) -> BlockMask:
    """Of the last W tokens and the sinks."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((query - key < W) | (key < sinks))

    return create_block_mask(seen, None, None, T, T, device="cuda")


def both(settings: Settings) -> Callable[..., Tensor]:
    """Window, recurrence and their mixture, as `linearize.ops.liger.fused`: of q, k, v, mixing weights and angles."""
    flex, made = torch.compile(flex_attention, dynamic=False), torch.compile(operands, dynamic=False)
    turned = torch.compile(lambda x, rope: rotate(x, *rope).to(x.dtype).transpose(1, 2), dynamic=False)
    mixed = torch.compile(lambda w, x, y: (w[:, None] * x + (1 - w[:, None]) * y.transpose(1, 2)).to(x.dtype))

    def call(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, rope: Rope) -> Tensor:
        seen = mask(q.shape[1], settings.window, settings.sinks)
        given = turned(q, rope), turned(k, rope), v.transpose(1, 2)
        window = flex(*given, block_mask=seen, scale=settings.scale, enable_gqa=q.shape[2] != k.shape[2])
        return mixed(mixing, recurrence(settings, *made(q, k, v, settings))[0], window)

    return call


def alone(settings: Settings, shape: Shape) -> Callable[[bool], Callable[[], None]]:
    """fla's recurrence by itself, of operands that are there already: of `backward`, a call."""
    B, T, H, KV, D = shape

    def ready(backward: bool) -> Callable[[], None]:
        q, k, v = (torch.randn(B, T, n, D, device="cuda", dtype=torch.bfloat16) for n in (H, KV, KV))
        leaves = [x.detach().requires_grad_(backward) for x in operands(q, k, v, settings)]

        def call() -> None:
            output = recurrence(settings, *leaves)[0]
            if backward:
                torch.autograd.grad(output, leaves, torch.ones_like(output))

        return call

    return ready


# --- fla's launch settings ---


def of_every(count: int, index: int) -> None:
    """Let this process' autotuners try only their `index`-th of every `count` settings."""
    from triton.runtime.autotuner import Autotuner

    whole = Autotuner.prune_configs

    def part(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = whole(self, kwargs)
        return [configs[(index + n) % len(configs)] for n in range(0, max(len(configs), count), count)]

    Autotuner.prune_configs = part


def compile_part(count: int, index: int, gates: Sequence[str], shape: Shape) -> None:
    """One process' share."""
    torch.set_num_threads(1)
    of_every(count, index)
    for gate in gates:
        for backward in (False, True):
            with suppress(Exception):  # the whole run will meet it, and say so
                alone(Settings(gate, shape.D**-0.5), shape)(backward)()
    torch.cuda.synchronize()


def compile_all(gates: Sequence[str], shape: Shape, processes: int) -> float:
    """Every setting of fla's kernels into Triton's cache, for the head size of `shape`; seconds."""
    start = time.perf_counter()
    small = shape._replace(B=1, T=256)  # heads are part of what is compiled, batch and length are not
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_part, args=(processes, n, gates, small)) for n in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def main() -> None:
    """Time fused and separate calls, head size by head size, and write what there is after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400, help="begin nothing after this long")
    parser.add_argument("--shapes", type=int, nargs="+", default=[0, 2, 1], help="which of benchmarks.kernels' shapes")
    parser.add_argument("--gates", nargs="+", choices=GATES_TIMED, default=GATES_TIMED)
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1), help="that compile")
    arguments = parser.parse_args()
    stop = time.perf_counter() + arguments.seconds
    torch.manual_seed(0)
    copy, compiling, rows = copy_speed(), {}, []
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text(encoding="utf-8"))
        compiling, rows = results["compiling_fla"], results["rows"]
    done = {(*(row[name] for name in Shape._fields), row["operator"], row["backward"]) for row in rows}
    ready = set()
    for shape in (SHAPES[n] for n in arguments.shapes):
        if shape.D not in ready:
            ready.add(shape.D)
            compiling[str(shape.D)] = compile_all(arguments.gates, shape, arguments.processes)
            print(f"fla's kernels for heads of {shape.D} compiled in {compiling[str(shape.D)]:.0f} s", flush=True)
        for gate in arguments.gates:
            for name, call in compared(gate, shape).items():
                for backward in (False, True):
                    if (*shape, name, backward) in done:
                        continue
                    if time.perf_counter() > stop:
                        print(f"no time for {name} of {tuple(shape)}")
                        continue
                    row = {**shape._asdict(), "operator": name, "backward": backward, **measure(call(backward))}
                    rows.append(row | {"floor": moved(shape, backward) / copy})
                    print(describe(rows[-1]), flush=True)
                    found = {"copy_bytes_per_second": copy, "compiling_fla": compiling, "rows": rows}
                    write(arguments.out, {**provenance(), **found})


def compared(gate: str, shape: Shape) -> dict[str, Callable[[bool], Callable[[], None]]]:
    """By name, of `backward`, a call."""
    fixed = Settings(gate, shape.D**-0.5)
    return {
        f"fused {gate}": partial(made, sides(shape)[f"fused {gate}"], shape),
        f"separate {gate}": partial(made, both(fixed), shape),
        f"fla {gate}": alone(fixed, shape),
    }


if __name__ == "__main__":
    main()
