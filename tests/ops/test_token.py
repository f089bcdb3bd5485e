"""What a decoding step does besides its layers: the kernels, without a GPU in Triton's interpreter, against PyTorch's
operations and the model's own RoPE."""

from importlib.util import find_spec

import pytest
import torch
from tiny import assert_close, tiny

if find_spec("triton") is None:
    pytest.skip("the kernels are Triton's", allow_module_level=True)

if not torch.cuda.is_available():
    import interpreted  # noqa: F401

from linearize.ops import dispatch, token, token_triton
from linearize.ops.local import NEVER
from linearize.ops.step import Clock
from linearize.ops.token import Rings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = 3000
pytestmark = pytest.mark.usefixtures("checked_kernels")


def state(B: int, M: int, windows: tuple[int, ...]) -> tuple[Clock, torch.Tensor, Rings]:
    """A clock, positions and rings in the midst of a text; some rows begin with padding, some tokens are it."""
    real = torch.randint(0, 2 * M + 1, (B,), device=DEVICE)
    sink_time = torch.where(torch.arange(M, device=DEVICE) < real[:, None], 7, NEVER)
    valid = torch.rand(B, device=DEVICE) < 0.7
    clock = Clock(torch.full((1,), 1003, device=DEVICE), real, valid, sink_time, {"shared": 1})
    positions = torch.randint(0, 5000, (B, sum(windows)), dtype=torch.int32, device=DEVICE)
    return clock, torch.randint(0, 5000, (B, 1), device=DEVICE), Rings(positions, windows)


def copied(clock: Clock, position: torch.Tensor, rings: Rings) -> tuple:
    tensors = [x.clone() for x in clock[:4]]
    return Clock(*tensors, dict(clock.shared)), position.clone(), Rings(rings.positions.clone(), rings.windows)


@pytest.mark.parametrize("windows", [(), (5,), (64, 128)], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_beginning(scaled, windows, monkeypatch):
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    model = tiny(rope_parameters=scaling) if scaled else tiny()
    stack = model.base_model.to(DEVICE)
    clock, position, rings = state(3, 4, windows)
    ids = torch.randint(0, model.config.vocab_size, (3, 1), device=DEVICE)
    given = stack.embed_tokens, stack.rotary_emb, ids, position, LIMIT, clock, rings
    monkeypatch.setattr(dispatch, "no_device", lambda x: "told not to")
    hidden, rope, sinks, leaving = token.begin(*given)
    found = token_triton.begin(stack.embed_tokens.weight, *given[1:])
    assert torch.equal(found.hidden, hidden)
    assert len(found.leaving) == len(leaving) == len(windows)
    for ours, theirs in zip((found.rope, found.sinks, *found.leaving), (rope, sinks, *leaving), strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert x.shape == y.shape
            assert_close(x, y, 2e-4)  # of angles in the thousands, fp32 has four digits left


def test_queries_see_the_sinks_from_within_the_limit():
    stack = tiny().base_model.to(DEVICE)
    clock, _, rings = state(2, 4, ())
    ids, far, near = (torch.full((2, 1), x, device=DEVICE) for x in (1, LIMIT + 50, LIMIT - 1))
    made = [
        token_triton.begin(stack.embed_tokens.weight, stack.rotary_emb, ids, x, LIMIT, clock, rings)
        for x in (far, near)
    ]
    assert all(torch.equal(x, y) for x, y in zip(made[0].sinks, made[1].rope, strict=True))
    assert not torch.equal(made[0].rope[0], made[0].sinks[0])


def test_a_token_that_the_vocabulary_lacks():
    """Nothing beside the table is read."""
    stack = tiny().base_model.to(DEVICE)
    clock, position, rings = state(4, 4, ())
    size = len(stack.embed_tokens.weight)
    ids = torch.tensor([[-1], [0], [size - 1], [size]], device=DEVICE)
    hidden = token_triton.begin(stack.embed_tokens.weight, stack.rotary_emb, ids, position, LIMIT, clock, rings).hidden
    assert hidden[[0, 3]].isnan().all()
    assert torch.equal(hidden[1:3], stack.embed_tokens(ids[1:3, 0]))


@pytest.mark.parametrize("B", [1, 3, 300])
@pytest.mark.parametrize(("M", "windows"), [(4, (5, 8)), (1, ()), (0, (128,))], ids=str)
def test_the_clock(M, windows, B, monkeypatch):
    ours = state(B, M, windows)
    theirs = copied(*ours)
    for _ in range(3):
        token_triton.advance(*ours)
    monkeypatch.setattr(dispatch, "no_device", lambda x: "told not to")
    for _ in range(3):
        token.advance(*theirs)
    for x, y in zip((*ours[0][:4], ours[2].positions), (*theirs[0][:4], theirs[2].positions), strict=True):
        assert torch.equal(x, y)
    assert not theirs[0].shared


def test_what_has_no_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "no_device", lambda x: None)
    stack = tiny().base_model
    assert token.why_not_fused(stack.embed_tokens, stack.rotary_emb) is None
    reason = token.why_not_fused(torch.nn.EmbeddingBag(4, 4), torch.nn.Identity())
    assert reason == "no kernel for EmbeddingBag as embeddings, Identity as RoPE"

    class Slower(type(stack.rotary_emb)):
        pass

    assert "Slower as RoPE" in token.why_not_fused(stack.embed_tokens, Slower(stack.config))
    stack.rotary_emb.inv_freq = stack.rotary_emb.inv_freq.repeat_interleave(2)[::2]  # not contiguous
    stack.embed_tokens.forward = lambda ids: None
    reason = token.why_not_fused(stack.embed_tokens, stack.rotary_emb)
    assert reason == "no kernel for Embedding as embeddings, LlamaRotaryEmbedding as RoPE"
