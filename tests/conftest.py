"""Shapes in signatures are checked under pytest, and every test starts from one seed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched by accident

import pytest
import torch
from jaxtyping import install_import_hook

CHECKED = ("ops", "structures", "tokens", "cache", "mixer", "train.losses", "evaluate")
install_import_hook([f"linearize.{name}" for name in CHECKED], "beartype.beartype")  # before linearize is imported
torch.set_num_threads(1)  # tiny models, and other tests may run beside these


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
