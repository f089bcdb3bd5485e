"""The gates' functions as the kernels have them."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

if find_spec("triton") is None:
    pytest.skip("the kernels are Triton's", allow_module_level=True)

if not torch.cuda.is_available():
    import interpreted  # noqa: F401

import triton
import triton.language as tl

from linearize.ops.liger_triton import log_sigmoid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def log_sigmoid_kernel(x, y, N: tl.constexpr):
    places = tl.arange(0, N)
    tl.store(y + places, log_sigmoid(tl.load(x + places)))


def test_log_sigmoid_of_what_forgets_next_to_nothing():
    """To 1e-5 of itself, as e^-x is by then, also where 1 + e^-x rounds to 1."""
    x = torch.linspace(-80, 80, 1024, device=DEVICE)
    y = torch.empty_like(x)
    log_sigmoid_kernel[(1,)](x, y, N=1024)
    expected = F.logsigmoid(x.double())
    assert ((y.double() - expected) / expected).abs().max() < 1e-5
