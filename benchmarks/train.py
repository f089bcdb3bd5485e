"""Distillation end to end: tokens per second, peak memory, and what a step spends outside GPU work.

    python -m benchmarks.train --out docs/results/train_h100.json
    python -m benchmarks.train --length 32768 --batch 1 --out docs/results/train_h100.json
    torchrun --nproc-per-node 2 -m benchmarks.train --out docs/results/train_h100.json
    python -m benchmarks.train --model Llama-3.2-1B --batch 4 --sides default --out docs/results/train_h100.json

The student has the default model's shape (SmolLM2-135M), or that of `--model`, and random weights in fp32, and so has
its teacher; tokens are random and packed into documents. Every side goes through the same
`linearize.train.trainer.train` with LoRA of rank 32, in bf16 autocast on a GPU: "original attention" is the unconverted
model as its own student. The teacher's forward pass is timed apart in each. Sides of one length are kept when the
command is given again for another. Of several processes, each with a batch of its own, the first one's times are
written.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, TrainerCallback

from benchmarks.decode import SHAPES, random_model
from benchmarks.results import provenance, write
from linearize import convert, processes, recipe
from linearize.convert import decoder
from linearize.mixer import LinearizedAttention
from linearize.packing import document_masks, packing
from linearize.recipe import DistillSettings, LoraSettings
from linearize.train import trainer
from linearize.train.compiled import compiled_layers
from linearize.train.distill import distill_loss

NAME, TOP = 160, 40  # letters of a kernel's name, and how many are kept
WARM = 4  # steps before those that are timed
SIDES: dict[str, tuple[dict[str, Any] | None, bool]] = {  # the student's settings, and whether fused kernels may run
    "original attention": (None, True),
    "window only": ({"structure": "none"}, True),
    "gla": ({"structure": "gla"}, True),
    "mamba2": ({"structure": "mamba2"}, True),
    "gated_deltanet": ({"structure": "gated_deltanet", "readout": "rms", "gate_source": "learned"}, True),
    "gla, chunked": ({"structure": "gla"}, False),
    "default": (dict(recipe.read("default").mixer.root), True),
}
GOALS = ("default", "window only", "original attention")  # what the goals are about
COMPILED = {  # what of a step `torch.compile` sees, to find out what that brings
    "layers": compiled_layers,
    "parts": lambda *models, whole=True: compiled_layers(*models, whole=False),
    "nothing": lambda *models, whole=True: nullcontext(),
}


def main() -> None:
    """Time every side, and write the raw times after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=4, help="packed into each sequence")
    parser.add_argument("--model", choices=SHAPES, default="SmolLM2-135M")
    parser.add_argument("--layers", type=int, help="as many as the model has, if nothing is said")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compiled", choices=COMPILED, default="layers")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(GOALS))
    arguments = parser.parse_args()
    arguments.layers = arguments.layers or SHAPES[arguments.model]["num_hidden_layers"]
    processes.start()
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {**provenance(), "rows": []}
    torch.manual_seed(0)
    teacher = random_model(arguments.model, torch.float32, num_hidden_layers=arguments.layers)
    keys = ("model", "batch", "length", "documents", "layers", "gradient_checkpointing", "compiled")
    shape = {key: getattr(arguments, key) for key in keys} | {"processes": processes.count()}
    for name in arguments.sides:
        try:
            row = {"side": name, **shape, **measure(name, teacher, arguments)}
        except torch.OutOfMemoryError as error:
            row = {"side": name, **shape, "error": str(error).splitlines()[0]}
        if not processes.is_first():
            continue
        print(f"{name:20} {row['error'] if 'error' in row else _line(row)}", flush=True)
        for kernel, (seconds, launches) in row.get("kernels", {}).items():
            print(f"    {1000 * seconds:7.3f} ms {launches:6.0f}× {kernel}", flush=True)
        same = {"side": name, **shape}.items()
        results["rows"] = [*(old for old in results["rows"] if not same <= old.items()), row]
        write(arguments.out, results)


def random_sequences(vocabulary: int, count: int, length: int, documents: int) -> list[dict[str, Tensor]]:
    """`input_ids`, `position_ids` and `targets` of each sequence."""
    ids = torch.randint(0, vocabulary, (count, length))
    positions = torch.arange(length) % (length // documents)
    return [{"input_ids": row, "position_ids": positions, "targets": row.roll(-1)} for row in ids]


class _Clock(TrainerCallback):
    """When every step ended on the GPU, and a profile of the last ones; only around these it waits."""

    def __init__(self, profiled: int) -> None:
        self.gpu = torch.cuda.is_available()
        self.ends: list[Any] = []  # events, or seconds without a GPU
        self.first = self.last = 0.0  # when the first step had ended, and when all had
        self.profiled = profiled
        self.profile = profile(activities=[ProfilerActivity.CUDA] if self.gpu else None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the optimizer's."""
        begins = state.global_step == state.max_steps - self.profiled
        ends = state.global_step == state.max_steps
        if self.gpu:
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
            if begins or ends or state.global_step == 1:
                torch.cuda.synchronize()
        else:
            self.ends.append(time.perf_counter())
        if state.global_step == 1:
            self.first = time.perf_counter()
        if begins:
            self.profile.start()
        if ends:
            self.last = time.perf_counter()
            self.profile.stop()

    def seconds(self) -> list[float]:
        """From each step's end to the next one's."""
        pairs = zip(self.ends, self.ends[1:], strict=False)
        return [a.elapsed_time(b) / 1000 if self.gpu else b - a for a, b in pairs]


def measure(name: str, teacher: PreTrainedModel, arguments: argparse.Namespace, profiled: int = 2) -> dict[str, Any]:
    """Seconds of each step after those that warm up, and of the teacher's part; the most bytes held on a GPU; the
    share of the profiled steps in which the GPU did nothing; and the kernels that take longest, with their seconds and
    launches in a step."""
    settings, fused = SIDES[name]
    torch._dynamo.reset()  # else a side may run what was compiled for another
    student = trainer.shared_copy(teacher)
    if settings is not None:
        student = convert(student, **{"mixing_weight": 0.1} | settings)
    wrapped = trainer.with_lora(student, LoraSettings())
    steps = WARM + arguments.steps + profiled
    count = steps * arguments.batch * processes.count()
    sequences = random_sequences(teacher.config.vocab_size, count, arguments.length, arguments.documents)
    stage = DistillSettings(
        tokens=count * arguments.length, batch_size=arguments.batch, save_every=0,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )  # fmt: skip
    unfused: AbstractContextManager[Any] = (
        nullcontext() if fused else patch.object(LinearizedAttention, "fused", lambda *_: (None, None))
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    clock = _Clock(profiled)
    compiled = patch.object(trainer, "compiled_layers", COMPILED[arguments.compiled])
    with unfused, compiled, tempfile.TemporaryDirectory() as folder:
        curve = trainer.train(
            "distill", name, wrapped, teacher, distill_loss, sequences, stage, Path(folder), 0, [clock]
        )
    seconds = clock.seconds()[WARM - 1 : WARM - 1 + arguments.steps]
    events = clock.profile.events() or []
    busy = sum(event.device_time_total for event in events if event.device_type.name == "CUDA") / 1e6
    kernels: dict[str, list[float]] = {}
    for event in events:
        if event.device_type.name == "CUDA":
            spent = kernels.setdefault(event.name[:NAME], [0.0, 0])
            spent[0] += event.device_time_total / 1e6 / profiled
            spent[1] += 1 / profiled
    return {
        "seconds": seconds,
        "teacher_seconds": _teacher_seconds(teacher, sequences[: arguments.batch], arguments.steps),
        "first_step_seconds": curve.seconds - (clock.last - clock.first),
        "idle": max(0.0, 1 - busy / profiled / statistics.median(seconds)) if busy else None,
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1][0])[:TOP]),
        "loss": curve.loss[-1],
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def _teacher_seconds(teacher: PreTrainedModel, sequences: list[dict[str, Tensor]], steps: int) -> list[float]:
    gpu = torch.cuda.is_available()
    ids, positions = (
        torch.stack([s[key] for s in sequences]).to(teacher.device) for key in ("input_ids", "position_ids")
    )
    seconds = []
    cast: AbstractContextManager[Any] = torch.autocast("cuda", torch.bfloat16) if gpu else nullcontext()
    with torch.no_grad(), cast, compiled_layers(teacher):
        for _ in range(WARM + steps):
            start = time.perf_counter()
            with packing(int((positions[0] == 0).sum())):
                masks = document_masks(teacher, ids, positions)
                decoder(teacher)(input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=False)
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return seconds[WARM:]


def _line(row: dict[str, Any]) -> str:
    speed = row["processes"] * row["batch"] * row["length"] / statistics.median(row["seconds"])
    idle = "" if row["idle"] is None else f", idle {row['idle']:.0%}"
    return (
        f"{speed:10,.0f} tokens/s, step {1000 * statistics.median(row['seconds']):7.1f} ms, teacher "
        f"{1000 * statistics.median(row['teacher_seconds']):6.1f} ms, peak {row['peak_bytes'] / 2**30:5.1f} GiB{idle}, "
        f"loss {row['loss']:.5f}, first step {row['first_step_seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
