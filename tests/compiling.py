"""Compile for a GPU, on any machine, the kernels that one training step and one decoding step of a model launch.

    python tests/compiling.py 90 64 RECIPE [KEY=VALUE ...]      # as `--set mixer.KEY=VALUE`

For a compute capability (90 is an H100) and a head size. Nothing runs: what kernels are to write stays as it was
allocated. Prints the names of the kernels; fails where one takes more shared memory than there is, or keeps far more
than its registers hold. The interpreter, which has other tests run kernels, takes more than the compiler does.
"""

import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.tune import Target
from linearize import convert, mixer, recipe
from linearize.decoder import Decoder
from linearize.ops import (
    dispatch,
    gated_delta,
    gated_linear,
    liger_fused,
    maps,
    products_triton,
    slots,
    step_many_triton,
    step_triton,
)
from linearize.train.distill import distill_loss

SHARED = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes of a program, by compute capability
SPILLED = 7_000  # bytes of a thread in memory; `delta_query_gradients` keeps 6,184, of heads of 128 before Hopper
LENGTH, DOCUMENTS = 256, 2


@cache
def spilled(cubin: bytes) -> int:
    """Bytes of a thread that did not fit into its registers, as the compiled program says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(found) for found in re.findall(r"STACK:(\d+)", usage))


def main(capability: str, size: str, name: str, *given: str) -> None:
    """Compile all, and print what it was."""
    read = recipe.read(name, [f"mixer.{item}" for item in given])
    config = LlamaConfig(
        vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=5, num_attention_heads=9,
        num_key_value_heads=3, head_dim=int(size), dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher, student = (LlamaForCausalLM(config).bfloat16() for _ in range(2))
    heads = None if read.softmax_heads is None else "0/1,2/0-1"
    convert(student, softmax_heads=heads, **dict(read.mixer.root))
    names: set[str] = set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **told: Any) -> Any:
        names.add(self.fn.__name__)
        program = run(self, *args, grid=grid, warmup=True, **told)
        takes, there = program.metadata.shared, SHARED[int(capability)]
        if self.fn is not step_triton.step_kernel.fn:  # there `ops.step` goes on without
            assert takes <= there, f"{self.fn.__name__} takes {takes:,} of {there:,} bytes of shared memory"
        kept = spilled(program.asm["cubin"])
        assert kept <= SPILLED, f"{self.fn.__name__} keeps {kept:,} bytes of a thread in memory"
        return program

    driver.set_active(Target(GPUTarget("cuda", int(capability), 32)))
    with ExitStack() as patched:
        for module in (mixer, gated_delta, gated_linear, maps, slots):
            patched.enter_context(patch.object(module, "kernel_dtype", lambda x: x.dtype))
        patched.enter_context(patch.object(JITFunction, "run", compile_only))
        patched.enter_context(patch.object(dispatch, "no_device", lambda x: None))
        patched.enter_context(patch.object(liger_fused, "from_hopper_on", lambda x: int(capability) >= 90))
        ids, positions = torch.randint(0, 1024, (1, LENGTH)), torch.arange(LENGTH)[None] % (LENGTH // DOCUMENTS)
        batch = {"input_ids": ids, "position_ids": positions, "targets": ids}
        distill_loss(student, teacher, batch, documents=DOCUMENTS).backward()
        for module in (dispatch, step_triton, step_many_triton, products_triton):
            patched.enter_context(patch.object(module, "can_overlap", lambda x: int(capability) >= 90))
        for many in (step_triton.MANY, 0):
            patched.enter_context(patch.object(step_triton, "MANY", many))
            decoder = Decoder(student.eval(), 2)
            decoder.reserve(LENGTH)
            decoder.step(ids[:, :1].expand(2, 1), 0, None)
    print(*sorted(names))


if __name__ == "__main__":
    main(*sys.argv[1:])
