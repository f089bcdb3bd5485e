"""One token's attention over all tokens with the keys in parts, against the equation in float64."""

from importlib.util import find_spec

import pytest
import torch
from tiny import assert_close

if find_spec("triton") is None:
    pytest.skip("the kernels are Triton's", allow_module_level=True)

if not torch.cuda.is_available():
    import interpreted  # noqa: F401

from linearize.ops import growing_triton

pytestmark = pytest.mark.usefixtures("checked_kernels")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [(torch.bfloat16, 5e-3)] if GPU else [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("KV", "G", "D"), [(1, 1, 16), (2, 3, 64), (1, 17, 24), (2, 4, 128)])
@pytest.mark.parametrize(("room", "time"), [(4, 0), (300, 299), (300, 70), (1000, 640)])
@pytest.mark.parametrize("parts", [1, 5])
def test_it_is_the_equation(dtype, tolerance, KV, G, D, room, time, parts, monkeypatch):
    """What lies behind the newest token is anything, also what is no number; some rows have padding."""
    monkeypatch.setattr(growing_triton, "PARTS", parts)
    torch.manual_seed(0)
    q = torch.randn(2, KV, G, D).to(DEVICE, dtype)
    keys, values = (torch.randn(2, KV, room, D).to(DEVICE, dtype) for _ in range(2))
    for x in (keys, values):
        x[:, :, time + 1 :] = torch.nan
    seen = torch.rand(2, room, device=DEVICE) < 0.7
    seen[1, : time // 2] = False  # whole parts
    seen[:, time] = True
    found = growing_triton.attend(q, keys, values, seen, torch.tensor([time], device=DEVICE), 0.3)
    there = slice(time + 1)
    scores = 0.3 * q.double() @ keys[:, :, there].double().mT
    weights = scores.masked_fill(~seen[:, None, None, there], -torch.inf).softmax(-1)
    assert found.dtype == dtype
    assert_close(found, weights @ values[:, :, there].double(), tolerance)


def test_large_scores_are_no_trouble():
    q, keys = torch.full((1, 1, 2, 16), 30.0, device=DEVICE), torch.randn(1, 1, 200, 16, device=DEVICE)
    q, keys = q.bfloat16(), keys.bfloat16()
    seen, time = torch.ones(1, 200, dtype=torch.bool, device=DEVICE), torch.tensor([199], device=DEVICE)
    expected = (q.double() @ keys.double().mT).softmax(-1) @ keys.double()
    assert_close(growing_triton.attend(q, keys, keys, seen, time, 1.0), expected, 5e-3)
