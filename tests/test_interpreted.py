"""What the interpreter's checks find."""

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import interpreted
import triton
import triton.language as tl


@triton.jit
def copy_kernel(source, target, n, SHIFT: tl.constexpr, STRIDE: tl.constexpr):
    """Two elements a program."""
    i = tl.program_id(0) * STRIDE + tl.arange(0, 2)
    tl.store(target + i, tl.load(source + i + SHIFT, mask=i < n), mask=i < n)


@pytest.mark.parametrize(
    ("same", "shift", "stride", "message"),
    [
        (False, 0, 2, None),
        (True, 0, 2, None),
        (False, 1, 2, "reads outside the tensors"),
        (False, -1, 2, "reads outside the tensors"),
        (False, 0, 1, "two programs of copy_kernel write the same element"),
        (True, -2, 2, "reads outside the tensors"),
        (True, 1, 2, "a program of copy_kernel reads what another one writes"),
    ],
)
def test_launches_are_checked(same, shift, stride, message):
    source = torch.randn(6)
    target = source if same else torch.empty(6)
    n = 5 if same else 6
    with interpreted.checked():
        if message is None:
            copy_kernel[(3,)](source, target, n, SHIFT=shift, STRIDE=stride)
        else:
            with pytest.raises(Exception, match=message):
                copy_kernel[(3,)](source, target, n, SHIFT=shift, STRIDE=stride)


def test_nothing_is_checked_elsewhere():
    source, target = torch.randn(6), torch.empty(6)
    with interpreted.checked():
        assert torch.empty(3).isnan().all()
    copy_kernel[(3,)](source, target, 4, SHIFT=0, STRIDE=1)
    assert torch.equal(target[:4], source[:4])


def test_what_is_written_may_be_read_where_that_is_allowed():
    source = torch.randn(6)
    with interpreted.checked(overlaps=True):
        copy_kernel[(3,)](source, source, 5, SHIFT=1, STRIDE=2)
        with pytest.raises(RuntimeError, match="write the same element"):
            copy_kernel[(3,)](source, source, 6, SHIFT=0, STRIDE=1)
