"""On a GPU, where fla is installed: other people's kernels make the same of the same inputs (`benchmarks/peers.py`)."""

import pytest
import torch
from equation import inputs, rope, settings
from tiny import assert_close

from linearize.ops.liger import fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Flash Attention is not installed"),  # fla's, when it is imported
]
TOLERANCE = 1e-2  # both round to bf16


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    """fla's kernels by the first of their settings, in place of the fastest of hundreds."""
    pytest.importorskip("fla", reason="fla is installed by hand: pip install --no-deps fla-core==0.6.0 einops")
    from triton.runtime.autotuner import Autotuner

    whole = Autotuner.prune_configs
    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, given: whole(self, given)[:1])


@pytest.mark.parametrize("gate", ["gla", "mamba2", "gated_deltanet"])
@pytest.mark.parametrize("D", [64, 128])
def test_as_fla_and_flex_attention(gate, D):
    from benchmarks.peers import both

    fixed, angles = settings(gate, D=D), tuple(x.cuda() for x in rope(300, D))
    q, k, v, mixing, _ = (x.detach().cuda() for x in inputs(300, B=2, groups=3, D=D))
    leaves = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    ours, theirs = fused(*leaves, mixing, fixed, angles)[0], both(fixed)(*leaves, mixing, angles)
    assert_close(ours, theirs, TOLERANCE)
    if gate == "gla":  # of one decay a head fla 0.6.0 refuses gradients on Hopper, where Triton 3.6 makes them wrong
        doutput = torch.randn_like(ours)
        found = torch.autograd.grad(ours, leaves, doutput)
        for gradient, other in zip(found, torch.autograd.grad(theirs, leaves, doutput), strict=True):
            assert_close(gradient, other, TOLERANCE)
