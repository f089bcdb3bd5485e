"""Which kernels a GPU runs by itself."""

import torch

from linearize.ops.dispatch import UNPROVEN, unproven


def test_kernels_that_no_gpu_has_run_wait_for_a_word(monkeypatch):
    monkeypatch.delenv("LINEARIZE_KERNELS")
    assert not any(map(unproven, UNPROVEN))  # in the interpreter they may run
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert all("LINEARIZE_KERNELS=all" in (unproven(kernels) or "") for kernels in UNPROVEN)
    assert unproven("gla") is None
    monkeypatch.setenv("LINEARIZE_KERNELS", "all")
    assert not any(map(unproven, UNPROVEN))
