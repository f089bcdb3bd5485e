"""What the interpreter's checks find."""

from contextlib import nullcontext
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


@triton.jit
def passing_kernel(source, target, counter, EARLY: tl.constexpr, COUNTS: tl.constexpr, AT: tl.constexpr = 0):
    """A program copies an element; the last one adds up what both have copied."""
    i, places = tl.program_id(0), tl.arange(0, 2)
    tl.store(target + i, tl.load(source + i))
    before = tl.load(target + places, mask=(places >= 0) & EARLY)
    last = i == 1
    if COUNTS:
        last = tl.atomic_add(counter + AT, 1) == 1
    if last:
        copied = before if EARLY else tl.load(target + places)
        tl.store(target + 2, tl.sum(copied, 0))


@pytest.mark.parametrize(("early", "counts"), [(False, True), (True, True), (False, False)])
def test_what_is_counted_may_be_read(early, counts):
    """By who comes later to the counter, and then."""
    source, target, counter = torch.tensor([2.0, 3.0]), torch.empty(3), torch.zeros(1, dtype=torch.int32)
    fails = pytest.raises(RuntimeError, match="reads what another one writes") if early or not counts else nullcontext()
    with interpreted.checked(), fails:
        passing_kernel[(2,)](source, target, counter, EARLY=early, COUNTS=counts)
    assert target[2] == 5 or early


def test_counters_are_inside_their_tensors():
    source, target, counter = torch.ones(2), torch.empty(3), torch.zeros(1, dtype=torch.int32)
    with interpreted.checked(), pytest.raises(Exception, match="counts outside the tensors"):
        passing_kernel[(2,)](source, target, counter, EARLY=False, COUNTS=True, AT=10**6)
