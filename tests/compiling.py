"""Compile for an H100, on any machine, the kernels that one training step and one decoding step of a model launch.

    python tests/compiling.py RECIPE [KEY=VALUE ...]      # as `--set mixer.KEY=VALUE`

Nothing runs: what kernels are to write stays as it was allocated. Prints the names of the kernels. The interpreter,
which has other tests run kernels, takes more than the compiler does.
"""

import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.tune import Target
from linearize import convert, mixer, recipe
from linearize.decoding import Decoder
from linearize.ops import dispatch, gated_delta, gated_linear, maps, slots
from linearize.train.distill import distill_loss

H100 = GPUTarget("cuda", 90, 32)
LENGTH, DOCUMENTS = 256, 2


def main(name: str, *given: str) -> None:
    """Compile all, and print what it was."""
    read = recipe.read(name, [f"mixer.{item}" for item in given])
    config = LlamaConfig(
        vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=5, num_attention_heads=9,
        num_key_value_heads=3, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher, student = (LlamaForCausalLM(config).bfloat16() for _ in range(2))
    heads = None if read.softmax_heads is None else "0/1,2/0-1"
    convert(student, softmax_heads=heads, **dict(read.mixer.root))
    names: set[str] = set()
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **told: Any) -> Any:
        names.add(self.fn.__name__)
        return run(self, *args, grid=grid, warmup=True, **told)

    driver.set_active(Target(H100))
    with ExitStack() as patched:
        for module in (mixer, gated_delta, gated_linear, maps, slots):
            patched.enter_context(patch.object(module, "kernel_dtype", lambda x: x.dtype))
        patched.enter_context(patch.object(JITFunction, "run", compile_only))
        patched.enter_context(patch.object(dispatch, "no_device", lambda x: None))
        ids, positions = torch.randint(0, 1024, (1, LENGTH)), torch.arange(LENGTH)[None] % (LENGTH // DOCUMENTS)
        batch = {"input_ids": ids, "position_ids": positions, "targets": ids}
        distill_loss(student, teacher, batch, documents=DOCUMENTS).backward()
        decoder = Decoder(student.eval(), 2)
        decoder.reserve(LENGTH)
        decoder.step(ids[:, :1].expand(2, 1), 0, None)
    print(*sorted(names))


if __name__ == "__main__":
    main(*sys.argv[1:])
