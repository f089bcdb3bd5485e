"""What decides between Triton kernels and PyTorch."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)  # what kernels are for; in fp32 they are for the interpreter
MOST = 65535  # of sequences times heads, and of chunks of 64 tokens, which CUDA has no more of in a grid


def no_device(x: Tensor) -> str | None:
    """Why no kernel can run where x is; None if one can."""
    if not x.is_cuda:
        return "the tensors are not on a CUDA device"
    return _too_little(x.device)


def why_no_kernel(x: Tensor, unsupported: dict[str, bool]) -> str | None:
    """Why no kernel takes x and what goes with it: as `no_device`, or the names of what is true in `unsupported`; None
    if one does."""
    reasons = [name for name, true in unsupported.items() if true]
    return no_device(x) or (f"no kernel for {', '.join(reasons)}" if reasons else None)


@torch.compiler.assume_constant_result
def _too_little(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the device is older than compute capability 8.0"
    return None


def from_hopper_on(x: Tensor) -> bool:
    """Whether x is on an NVIDIA GPU of compute capability 9.0 or more."""
    if not x.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)


def can_overlap(x: Tensor) -> bool:
    """Whether kernels of a decoding step may begin before the one ahead of them has ended (programmatic dependent
    launch): until they wait for it, they fetch what it does not write. Attention does, beside a product or the kernel
    of many sequences' inputs, which leave bandwidth to its window and state; products do if their settings say
    `ahead`."""
    return from_hopper_on(x)


def kernel_dtype(x: Tensor) -> torch.dtype | None:
    """That of x in a kernel: of half the precision, its own or autocast's; None where x is not for kernels, because it
    is not on a GPU, or because whoever asks for fp32 gets it."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return next((dtype for dtype in (x.dtype, autocast) if dtype in HALF), None) if x.is_cuda else None


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another floating dtype, held within what that one can say."""
    most = torch.finfo(dtype).max
    return (x.clamp(-most, most) if most < torch.finfo(x.dtype).max else x).to(dtype)


def may_look(x: Tensor) -> bool:
    """Whether asking for a value of x waits for nothing."""
    return not x.is_cuda


@torch.compiler.assume_constant_result
def warn_once(message: str) -> None:
    """A warning the first time; then silence, whatever the filters."""
    _warn(message)


@cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
