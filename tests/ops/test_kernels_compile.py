"""Kernels compile for GPUs, which Triton can do without one; the interpreter takes what the compiler does not."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="the kernels are Triton's"),
]


HEADS_OF_64 = ["90", "64"]  # on an H100
# on an RTX 4090 or an L4, which have little shared memory
HEADS_OF_128 = ["89", "128"]
WIDE_KEYS = ["89", "64"]  # of four times the channels


@pytest.mark.parametrize(
    ("arguments", "some"),
    [
        ([*HEADS_OF_64, "default"], {"step_kernel", "advance_kernel", "distillation_kernel", "map_gradients_kernel"}),
        ([*HEADS_OF_64, "default", "shifts=3"], {"inputs_kernel", "attention_kernel", "begin_kernel"}),
        ([*HEADS_OF_64, "hybrid"], {"step_kernel", "together_kernel", "delta_channel_gradients_kernel"}),
        ([*HEADS_OF_64, "liger-paper"], {"step_kernel", "states_kernel", "output_kernel", "key_gradients_kernel"}),
        ([*HEADS_OF_64, "liger-paper", "structure=mamba2"], {"prepare_kernel", "product_kernel"}),
        ([*HEADS_OF_64, "liger-paper", "structure=gsa"], {"given_kernel", "read_kernel", "write_gradients_kernel"}),
        ([*HEADS_OF_64, "liger-paper", "structure=gated_deltanet"], {"step_kernel", "delta_query_gradients_kernel"}),
        ([*WIDE_KEYS, "default"], {"delta_score_gradients_kernel"}),
        ([*HEADS_OF_128, "default", "feature_map=linear", "window=128"], {"long_window_kernel", "attention_kernel"}),
        ([*HEADS_OF_128, "liger-paper"], {"output_kernel", "key_gradients_kernel"}),
        ([*HEADS_OF_128, "liger-paper", "structure=gsa"], {"read_kernel", "read_gradients_kernel"}),
        ([*HEADS_OF_128, "liger-paper", "structure=gated_deltanet"], {"delta_query_gradients_kernel"}),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)  # fmt: skip
def test_what_a_training_step_and_a_decoding_step_launch(arguments, some):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "compiling.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert some <= set(done.stdout.split())
