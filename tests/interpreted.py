"""Triton kernels on a CPU, by Triton's interpreter; TRITON_INTERPRET is set before this is imported."""

from typing import Any

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _with_loop_bounds(tensor: Any, scope: Any) -> None:
    """Scalars of shape [1] as bounds of loops: NumPy 2.4 refuses `int` of them, which Triton 3.6 relies on."""
    _patch_tensor(tensor, scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _with_loop_bounds
