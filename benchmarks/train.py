"""Distillation steps end to end: tokens per second and peak memory, with and without the fused kernels.

    python -m benchmarks.train --out docs/results/train_h100.json

The student has the default model's shape (SmolLM2-135M) and random weights, and so has its teacher; tokens are random,
a step is forward, loss and backward of everything, in bf16 autocast on a GPU. `--documents` are packed into each
sequence.
"""

import argparse
import copy
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.results import provenance, write
from linearize import convert
from linearize.mixer import LinearizedAttention
from linearize.train.distill import distill_loss

SIDES = {  # settings of the student, and whether the fused kernels may run
    "gla": ({"structure": "gla"}, True),
    "gla, chunked": ({"structure": "gla"}, False),
    "mamba2": ({"structure": "mamba2"}, True),
    "window only": ({"structure": "none"}, True),
}


def main() -> None:
    """Time every side, and write the raw times after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    teacher, batch = random_model(arguments.layers), random_batch(arguments)
    rows: list[dict[str, Any]] = []
    for name, (settings, fused) in SIDES.items():
        seconds, loss, peak = measure(teacher, settings, fused, batch, arguments.steps)
        speed = arguments.batch * arguments.length / statistics.median(seconds)
        print(f"{name:14} {speed:10,.0f} tokens/s, peak {peak / 2**30:5.1f} GiB, loss {loss:.5f}", flush=True)
        rows.append({"side": name, "seconds": seconds, "loss": loss, "peak_bytes": peak})
        shape = {key: value for key, value in vars(arguments).items() if key != "out"}
        write(arguments.out, {**provenance(), **shape, "rows": rows})


def random_model(layers: int) -> PreTrainedModel:
    """SmolLM2-135M's shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def random_batch(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """`input_ids`, `position_ids` and `targets`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(0, 49152, (arguments.batch, arguments.length), device=device)
    positions = torch.arange(arguments.length, device=device) % (arguments.length // arguments.documents)
    return {"input_ids": ids, "position_ids": positions.expand_as(ids).contiguous(), "targets": ids.roll(-1, dims=1)}


def measure(
    teacher: PreTrainedModel, settings: dict[str, Any], fused: bool, batch: dict[str, Tensor], steps: int
) -> tuple[list[float], float, int]:
    """Seconds of each step after two that warm up, the loss, and the most bytes that were held on a GPU."""
    gpu = torch.cuda.is_available()
    student = convert(copy.deepcopy(teacher), mixing_weight=0.1, **settings).train()
    cast: AbstractContextManager[Any] = torch.autocast("cuda", torch.bfloat16) if gpu else nullcontext()
    unfused = nullcontext() if fused else patch.object(LinearizedAttention, "fused", lambda *_: (None, None))
    seconds, loss = [], torch.zeros(())
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with unfused:
        for _ in range(steps + 2):
            start = time.perf_counter()
            student.zero_grad(set_to_none=True)
            with cast:
                loss = distill_loss(student, teacher, batch)
            loss.backward()
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return seconds[2:], loss.item(), torch.cuda.max_memory_allocated() if gpu else 0


if __name__ == "__main__":
    main()
