"""Shapes in signatures are checked under pytest, and every test starts from one seed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched by accident

import pytest
import torch
from jaxtyping import install_import_hook

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it products count as not deterministic; read on first use
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; read when Triton is imported

CHECKED = ("structures", "tokens", "cache", "mixer", "train.losses", "evaluate")
CHECKED += (
    "ops.local",
    "ops.gated_linear",
    "ops.gated_delta",
    "ops.liger",
)  # not kernels: Triton reads their source
pytest.register_assert_rewrite("tiny")  # so that a failure says by how much
install_import_hook([f"linearize.{name}" for name in CHECKED], "beartype.beartype")  # before linearize is imported
torch.set_num_threads(1)  # tiny models, and other tests may run beside these


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
