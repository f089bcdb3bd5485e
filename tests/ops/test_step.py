"""A decoding step against the equations: token after token from nothing, in PyTorch and by the kernel.

Without a GPU the kernel runs in Triton's interpreter, in fp32.
"""

from importlib.util import find_spec

import pytest
import torch
from tiny import assert_close
from torch import Tensor

from linearize.ops import liger, step
from linearize.ops.liger import Settings
from linearize.ops.local import NEVER
from linearize.ops.step import Clock, Held

GPU = torch.cuda.is_available()
TRITON = find_spec("triton") is not None
if TRITON and not GPU:
    import interpreted  # noqa: F401

DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
RUNS = ["plain", pytest.param("kernel", marks=pytest.mark.skipif(not TRITON, reason="triton is not installed"))]


def nothing(B: int, KV: int, D: int, fixed: Settings, sinks: int, dtype=torch.float32) -> tuple[Clock, Held]:
    """Before the first token."""
    rows = sinks + fixed.window
    clock = Clock(
        torch.zeros(1, dtype=torch.long),
        torch.zeros(B, dtype=torch.long),
        torch.ones(B, dtype=torch.bool),
        torch.full((B, sinks), NEVER),
        {},
    )
    keys = torch.zeros(B, KV, rows, D, dtype=dtype)
    kept = Held(keys, torch.zeros_like(keys), torch.zeros(B, fixed.window, dtype=torch.uint8), torch.zeros(B, KV, D, D))
    return Clock(*(x.to(DEVICE) for x in clock[:4]), {}), Held(*(x.to(DEVICE) for x in kept[:4]))


def inputs(T: int, B: int = 2, KV: int = 2, groups: int = 2, D: int = 16) -> list[Tensor]:
    """q, k, v and mixing weights."""
    return [
        torch.randn(B, T, KV * groups, D),
        torch.randn(B, T, KV, D),
        torch.randn(B, T, KV, D),
        torch.rand(KV * groups),
    ]


def rope(T: int, R: int = 16) -> tuple[Tensor, Tensor]:
    angles = 3 * torch.randn(T, R // 2).repeat(1, 2)
    return angles.cos(), angles.sin()


def stepped(
    run: str, given: list[Tensor], fixed: Settings, angles=None, decay=None, sinks=None, valid=None, start=None
):
    """All outputs `[B, T, H, D]` and the final state."""
    heads, KV, mixing = torch.cat(given[:3], 2).to(DEVICE), given[1].shape[2], given[3].to(DEVICE)
    B, T, _, D = heads.shape
    clock, held = start or nothing(B, KV, D, fixed, fixed.sinks if sinks is None else sinks, heads.dtype)
    operator = step.plain
    if run == "kernel":
        from linearize.ops.step_triton import run as operator
    outputs = []
    for t in range(T):
        turn = None if angles is None else tuple(x[t].to(DEVICE).expand(B, -1) for x in angles)
        if valid is not None:
            clock.valid.copy_(valid[:, t])
        decayed = None if decay is None else decay.to(DEVICE)
        outputs.append(operator(heads[:, t], mixing, fixed, turn, turn, clock, held, decayed))
        step.advance(clock)
    return torch.stack(outputs, 1).cpu(), held.state.cpu()


def assert_is_the_equation(run, given, fixed, angles=None, tolerance=1e-5, sinks=None) -> None:
    decay = -torch.rand(given[1].shape[2])
    start = nothing(len(given[1]), *given[1].shape[2:], fixed, fixed.sinks if sinks is None else sinks, given[1].dtype)
    if run == "kernel":
        start[1].keys.fill_(torch.nan)  # nothing of what was never written is looked at
    output, state = stepped(run, given, fixed, angles, decay, sinks, start=start)
    expected, final = liger.reference(*given, fixed, angles, decay=decay)
    assert output.dtype == given[0].dtype
    assert_close(output, expected, tolerance)
    assert_close(state, final, tolerance)


def settings(gate: str = "gla", D: int = 16, **kwargs) -> Settings:
    return Settings(**({"gate": gate, "scale": D**-0.5, "lower": 0.3, "window": 5, "sinks": 3} | kwargs))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("gate", liger.GATES)
def test_every_gate(gate, run):
    assert_is_the_equation(run, inputs(14), settings(gate), rope(14))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("shape", "kwargs", "rotated"),
    [
        ({"groups": 3, "D": 20}, {"window": 1, "sinks": 0}, 8),
        ({"groups": 1, "KV": 3}, {"window": 4, "sinks": 1}, 16),
        ({"D": 40, "KV": 1}, {"window": 8, "sinks": 9}, 40),
        ({"B": 1}, {"feature_map": "none", "temperature": 1.0}, 0),
        ({"B": 1, "D": 64}, {"window": 12, "gate": "hgrn2"}, 64),
    ],
)
def test_shapes(shape, kwargs, rotated, run):
    D = shape.get("D", 16)
    given = inputs(14, **shape)
    assert_is_the_equation(run, given, settings(D=D, **kwargs), rope(14, rotated) if rotated else None)


@pytest.mark.parametrize("run", RUNS)
def test_a_layer_with_fewer_sinks_than_there_are_places(run):
    assert_is_the_equation(run, inputs(14), settings(sinks=2), rope(14), sinks=4)


@pytest.mark.parametrize("run", RUNS)
def test_padding_leaves_no_trace(run):
    """Rows of different beginnings, and a token left out in the middle, are as rows without these."""
    given = inputs(16)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[0, :3] = False
    angles = torch.ones(16, 16), torch.zeros(16, 16)
    output, state = stepped(run, given, settings(), angles, valid=valid)
    alone = [x[:1, 3:] for x in given[:3]]
    expected, final = liger.reference(*alone, given[3], settings())
    assert_close(output[:1, 3:], expected)
    assert_close(state[:1], final)
    assert output.isfinite().all()


@pytest.mark.parametrize("run", RUNS)
def test_a_step_left_out_does_not_count(run):
    given = inputs(12, B=1)
    valid = (torch.arange(12) != 9)[None]
    _, state = stepped(run, given, settings(), valid=valid)
    _, final = liger.reference(*(x[:, valid[0]] for x in given[:3]), given[3], settings())
    assert_close(state, final)


@pytest.mark.parametrize("run", RUNS)
def test_sinks_have_angles_of_their_own(run):
    """Far from its sinks a query meets them at another angle; with the same one everywhere it is another output."""
    from linearize.ops import step_triton

    operator = step.plain if run == "plain" else step_triton.run
    q, k, v, mixing = inputs(12, B=1)
    heads = torch.cat([q, k, v], 2).to(DEVICE)
    (cos, sin), found = rope(12), []
    for far in (11, 0):
        clock, held = nothing(1, 2, 16, settings(), 3)
        for t in range(12):
            near, sink = ((cos[[i]].to(DEVICE), sin[[i]].to(DEVICE)) for i in (t, min(t, far)))
            last = operator(heads[:, t], mixing.to(DEVICE), settings(), near, sink, clock, held)
            step.advance(clock)
        found.append(last.cpu())
    turned_q, turned_k = (liger.rotate(x.double(), cos.double(), sin.double()) for x in (q, k))
    for far, output in zip((11, 0), found, strict=True):
        sink_q = liger.rotate(q.double()[:, 11:], cos.double()[[far]], sin.double()[[far]])
        keys = [torch.cat([turned_k[:, :3]], 1), turned_k[:, 7:]]
        scores = [x.unflatten(2, (2, 2)).transpose(1, 2) for x in (sink_q, turned_q[:, 11:])]
        logits = (
            torch.cat([torch.einsum("bktgd,bskd->bkgs", s, key) for s, key in zip(scores, keys, strict=True)], -1)
            * 16**-0.5
        )
        values = torch.cat([v.double()[:, :3], v.double()[:, 7:]], 1)
        local = torch.einsum("bkgs,bskd->bkgd", logits.softmax(-1), values).flatten(1, 2)
        whole, _ = liger.reference(q, k, v, torch.ones(4), settings())
        w = mixing.double()[:, None]
        assert_close(output, w * whole[:, 11] + (1 - w) * local)


@pytest.mark.parametrize("run", RUNS)
def test_the_window_alone(run):
    given = inputs(14)
    output, state = stepped(run, given, settings("none"), rope_ := rope(14))
    expected, _ = liger.reference(*given[:3], torch.zeros(4), settings(), rope_)
    assert_close(output, expected)
    assert not state.any()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "groups", "B"), [(64, 3, 2), (128, 4, 3), (80, 1, 1)])
@pytest.mark.parametrize("gate", liger.GATES)
def test_sixteen_bits(gate, D, groups, B, dtype):
    given = inputs(80, B=B, groups=groups, D=D)
    given = [*(x.to(dtype) for x in given[:3]), given[3]]
    assert_is_the_equation("kernel", given, settings(gate, D, window=64, sinks=4), rope(80, D), tolerance=5e-3)
