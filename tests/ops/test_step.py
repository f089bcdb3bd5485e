"""A decoding step against the equations: token after token from nothing, in PyTorch and by the kernel.

Without a GPU the kernel runs in Triton's interpreter, in fp32.
"""

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_close, relative
from torch import Tensor

from linearize.ops import dispatch, gated_delta, liger, step
from linearize.ops.liger import Settings
from linearize.ops.local import NEVER
from linearize.ops.step import Beyond, Clock, Held

GPU = torch.cuda.is_available()
TRITON = find_spec("triton") is not None
if TRITON and not GPU:
    import interpreted

DEVICE = "cuda" if GPU else "cpu"

needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed")
KERNELS = ["kernel", "many"]  # all in one, and those for many sequences
RUNS = ["plain", *(pytest.param(name, marks=needs_triton) for name in KERNELS)]


def operator_of(run: str) -> Callable[..., Tensor]:
    """The step by PyTorch, by kernels, or by what there is."""
    if run in ("plain", "dispatched"):
        return step.plain if run == "plain" else step.step
    from linearize.ops import step_many_triton, step_triton

    return step_triton.run if run == "kernel" else step_many_triton.run


def nothing(
    B: int, KV: int, D: int, fixed: Settings, sinks: int, dtype=torch.float32, shifts: int = 0
) -> tuple[Clock, Held]:
    """Before the first token; of products, with so many shifts."""
    rows = sinks + fixed.window
    clock = Clock(
        torch.zeros(1, dtype=torch.long),
        torch.zeros(B, dtype=torch.long),
        torch.ones(B, dtype=torch.bool),
        torch.full((B, sinks), NEVER),
        {},
    )
    keys = torch.zeros(B, KV, rows, D, dtype=dtype)
    state = torch.zeros(B, KV, (1 + shifts) * D, D)
    kept = Held(keys, torch.zeros_like(keys), torch.zeros(B, fixed.window, dtype=torch.uint8), state)
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
    run: str,
    given: list[Tensor],
    fixed: Settings,
    angles=None,
    decay=None,
    sinks=None,
    valid=None,
    start=None,
    beyond=None,
):
    """All outputs `[B, T, H, D]` and the final state; in the interpreter, launches are checked."""
    heads, KV, mixing = torch.cat(given[:3], 2).to(DEVICE), given[1].shape[2], given[3].to(DEVICE)
    B, T, _, D = heads.shape
    clock, held = start or nothing(B, KV, D, fixed, fixed.sinks if sinks is None else sinks, heads.dtype)
    operator, outputs = operator_of(run), []
    with interpreted.checked(overlaps=run != "many") if run != "plain" and not GPU else nullcontext():
        for t in range(T):
            turn = None if angles is None else tuple(x[t].to(DEVICE).expand(B, -1) for x in angles)
            if valid is not None:
                clock.valid.copy_(valid[:, t])
            decayed = None if decay is None else decay.to(DEVICE)
            more = step.NOTHING if beyond is None else at(beyond, t)
            outputs.append(operator(heads[:, t], mixing, fixed, turn, turn, clock, held, decayed, more))
            step.advance(clock)
    return torch.stack(outputs, 1).cpu(), held.state.cpu()


def assert_is_the_equation(run, given, fixed, angles=None, tolerance=1e-5, sinks=None) -> None:
    decay = -torch.rand(given[1].shape[2])
    start = nothing(len(given[1]), *given[1].shape[2:], fixed, fixed.sinks if sinks is None else sinks, given[1].dtype)
    if run in KERNELS:
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
def test_any_decay_of_hgrn2(run):
    """In the first layer, where keys round to 1; nor is there NaN where padding is left out."""
    given, fixed = inputs(14), settings("hgrn2", scale=1 / 400, lower=0.0)
    given[1] *= 400.0
    assert_is_the_equation(run, given, fixed, rope(14))
    valid = torch.arange(14) >= torch.tensor([[3], [0]])
    output, _ = stepped(run, given, fixed, rope(14), valid=valid)
    assert output[valid].isfinite().all()


@pytest.mark.parametrize("run", RUNS)
def test_a_layer_with_fewer_sinks_than_there_are_places(run):
    assert_is_the_equation(run, inputs(14), settings(sinks=2), rope(14), sinks=4)


@pytest.mark.parametrize("run", RUNS)
def test_more_sinks_than_the_smallest_product_has_columns(run):
    assert_is_the_equation(run, inputs(21), settings(window=2, sinks=17), rope(21))


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
    operator = operator_of(run)
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


# --- the delta rule, and what the published recurrences have not ---


def beyond(T: int, B: int = 2, KV: int = 2, groups: int = 2, D: int = 16, gates: int = 2, rank: int = 16) -> Beyond:
    """All there is, over T tokens."""
    H, rank = KV * groups, min(rank, D)
    shapes = ((H, D, rank), (H, rank, D), (KV, D, rank), (KV, rank, D))
    maps = tuple(torch.randn(shape) / shape[1] ** 0.5 for shape in shapes)
    opening = torch.randn(B, T, 16), torch.randn(H * D, 16) / 4
    return Beyond(maps, torch.randn(B, T, KV, gates), torch.randn(B, T, H), 1e-6, opening)


def at(given: Beyond, t: int) -> Beyond:
    """Of one token, where the kernel finds it."""
    maps, gate, mixing, epsilon, opening, leaving, floor = given
    maps = None if maps is None else tuple(x.to(DEVICE) for x in maps)
    gate, mixing = (None if x is None else x[:, t].to(DEVICE) for x in (gate, mixing))
    opening = None if opening is None else (opening[0][:, t].to(DEVICE), opening[1].to(DEVICE))
    leaving = None if leaving is None else tuple(x[t].to(DEVICE).expand(len(gate), -1) for x in leaving)
    floor = None if floor is None else floor.to(DEVICE)
    return Beyond(maps, gate, mixing, epsilon, opening, leaving, floor)


def products(y: Tensor, shifts: int) -> Tensor:
    """As `features.Products` has them, of what its map makes."""
    D = y.shape[-1]
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    moved = [y[..., (torch.arange(D) - shift) % D] for shift in range(1, 1 + shifts)]
    return torch.cat([y, *(y * x for x in moved)], dim=-1)


def truth(
    given: list[Tensor], fixed: Settings, more: Beyond, angles=None, behind: str | None = None, shifts: int = 0
) -> tuple[Tensor, Tensor]:
    """The equations in float64: `gated_delta.reference` beside the window of `liger.reference`, or `behind` it,
    with `both` branches rotated or the "local" one alone."""
    q, k, v, mixing = (x.double() for x in given)
    angles = None if angles is None else tuple(x.double() for x in angles)
    windowed, _ = liger.reference(
        q, k, v, torch.zeros_like(mixing), fixed._replace(gate="gla", feature_map="none"), angles
    )
    if behind == "both" and angles is not None:
        q, k = (liger.rotate(x, *angles) for x in (q, k))
    if behind == "local" and angles is not None and (kept := given[1].dtype) != torch.float32:
        cos, sin = angles  # the keys that come back of those that such a cache keeps
        k = liger.rotate(liger.rotate(k, cos, sin).to(kept).double(), cos, -sin).to(kept).double()
    if more.maps is None:
        query, key = (liger.FEATURES[fixed.feature_map](x) for x in (q, k))
    else:
        down_q, up_q, down_k, up_k = (x.double() for x in more.maps)
        query = q + torch.einsum("bthd,hdr,hre->bthe", q, down_q, up_q)
        key = k + torch.einsum("bthd,hdr,hre->bthe", k, down_k, up_k)
    if fixed.feature_map == "products":
        query, key = (products(x, shifts) for x in (query, key))
    gate = k.mean(-1, keepdim=True) if more.gate is None else more.gate.double()
    log_g = F.logsigmoid(gate[..., :1]) / fixed.temperature
    if fixed.gate == "deltanet":
        log_g = torch.zeros_like(log_g)
    taken = F.normalize(key, dim=-1), v, log_g, fixed.strength * gate[..., -1:].sigmoid()
    if behind:
        real = torch.arange(k.shape[1])[:, None, None] >= fixed.sinks
        taken = [F.pad(x * real, (0, 0, 0, 0, fixed.window, 0))[:, : k.shape[1]] for x in taken]
    before = k.new_zeros(len(k), k.shape[2], key.shape[-1], k.shape[-1])
    read, state = gated_delta.reference(F.normalize(query, dim=-1), *taken, before)
    if more.epsilon is not None:
        square = read.square().mean(-1, keepdim=True) + more.epsilon
        read = read / (square if more.floor is None else square + more.floor.double().exp().square()[:, None]).sqrt()
    if more.opening is not None:
        low, up = (x.double() for x in more.opening)
        read = read * 2 * (low @ up.mT).sigmoid().view_as(read)
    w = (mixing if more.mixing is None else (mixing + more.mixing.double()).sigmoid())[..., None]
    return w * read + (1 - w) * windowed, state


def assert_is_the_truth(run, given, fixed, more, angles=None, tolerance=1e-5, behind=None, shifts=0) -> Tensor:
    start = nothing(len(given[1]), *given[1].shape[2:], fixed, fixed.sinks, given[1].dtype, shifts)
    if behind:
        start = start[0], waiting(start[1], more, fixed)
        more = turning_back(more, fixed, angles if behind == "local" else None)
    if run in KERNELS:
        start[1].keys.fill_(torch.nan)  # nothing of what was never written is looked at
    output, state = stepped(run, given, fixed, angles, start=start, beyond=more)
    expected, final = truth(given, fixed, more, angles, behind, shifts)
    assert output.dtype == given[0].dtype
    assert_close(output, expected, tolerance)
    assert_close(state, final, tolerance)
    return output


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("shape", [{}, {"groups": 3, "KV": 1, "D": 40}], ids=str)
def test_a_soft_root_mean_square(shape, run):
    """With a floor of its own for each head: next to nothing, of the size of what is read, and far above it."""
    given, D = inputs(10, **shape), shape.get("D", 16)
    fixed = settings("gated_deltanet", D, feature_map="linear")
    more = beyond(10, **shape)._replace(epsilon=0.0, floor=torch.linspace(-9.0, 3.0, given[0].shape[2]))
    assert_is_the_truth(run, given, fixed, more, rope(10, D), behind="local")


def without(more: Beyond, *names: str) -> Beyond:
    return more._replace(**dict.fromkeys(names))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("gone", [(), ("opening",), ("epsilon", "opening"), ("mixing",), ("gate",), ("maps",)], ids=str)
def test_the_delta_rule(gone, run):
    fixed = settings("gated_deltanet", feature_map="softmax" if "maps" in gone else "linear", temperature=2.0)
    assert_is_the_truth(run, inputs(10), fixed, without(beyond(10), *gone), rope(10))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("more", [True, False])
def test_the_delta_rule_without_a_decay(more, run):
    """As published, too; eigenvalues down to -1."""
    fixed = settings("deltanet", feature_map="linear" if more else "none", strength=2.0)
    assert_is_the_truth(run, inputs(10), fixed, beyond(10, gates=1) if more else Beyond(), rope(10))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("shape", "kwargs", "rotated"),
    [
        ({"groups": 3, "D": 20}, {"window": 1, "sinks": 0}, 8),
        ({"groups": 1, "KV": 3}, {"window": 4, "sinks": 1}, 16),
        ({"D": 80, "KV": 1}, {"window": 8, "sinks": 9}, 40),
        ({"B": 1, "D": 12}, {"temperature": 1.0}, 0),
        ({"B": 3, "D": 64, "groups": 3}, {"window": 12}, 64),
        ({"B": 1, "KV": 1, "D": 128}, {"window": 3, "sinks": 2}, 128),
        ({"B": 1, "KV": 1, "groups": 9}, {"window": 20}, 16),  # whose maps take two products
        ({"B": 1, "KV": 1, "groups": 17, "D": 12}, {}, 12),  # more queries than the smallest product has rows
    ],
)
def test_shapes_of_the_delta_rule(shape, kwargs, rotated, run):
    D = shape.get("D", 16)
    fixed = settings("gated_deltanet", D, feature_map="linear", **kwargs)
    given, more = inputs(10, **shape), beyond(10, **shape)
    assert_is_the_truth(run, given, fixed, more, rope(10, rotated) if rotated else None)


def waiting(held: Held, more: Beyond, fixed: Settings) -> Held:
    """With what tokens in the window keep, of which there is none yet."""
    B, _, KV, gates = more.gate.shape
    return held._replace(late_gates=torch.full((B, fixed.window, KV, gates), torch.nan, device=DEVICE))


def turning_back(more: Beyond, fixed: Settings, angles: tuple[Tensor, Tensor] | None) -> Beyond:
    """With the angles of the token that leaves the window at each of these, where its key is turned back; before there
    is one, those of position 0."""
    if angles is None:
        return more
    T = len(angles[0])
    cos, sin = (F.pad(x, (0, 0, fixed.window, 0), value=value)[:T] for x, value in zip(angles, (1.0, 0.0), strict=True))
    return more._replace(leaving=(cos, sin))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("turned", ["both", "local"])
@pytest.mark.parametrize(
    ("gate", "shape", "kwargs", "rotated"),
    [
        ("gated_deltanet", {}, {}, 16),
        ("gated_deltanet", {"groups": 3, "D": 20}, {"window": 1, "sinks": 0}, 8),
        ("deltanet", {"D": 80, "KV": 1}, {"window": 3, "sinks": 4, "strength": 2.0}, 80),
        ("gated_deltanet", {"B": 1, "KV": 1, "D": 128}, {"window": 6, "sinks": 1}, 0),
    ],
)
def test_behind_the_window(gate, shape, kwargs, rotated, turned, run):
    """A token is taken in when another has its place."""
    D = shape.get("D", 16)
    fixed = settings(gate, D, feature_map="linear", **kwargs)
    given, more = inputs(14, **shape), beyond(14, gates=1 + (gate == "gated_deltanet"), **shape)
    assert_is_the_truth(run, given, fixed, more, rope(14, rotated) if rotated else None, behind=turned)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("shifts", "gate", "shape", "behind", "floor"),
    [
        (1, "gated_deltanet", {}, None, False),
        (3, "deltanet", {"KV": 1, "groups": 3, "D": 20}, None, True),
        (3, "gated_deltanet", {"KV": 1}, "local", True),
        (1, "gated_deltanet", {"KV": 1, "D": 24}, "both", False),
        (2, "gated_deltanet", {"KV": 1, "groups": 3, "D": 20}, "local", False),
    ],
)
def test_products(shifts, gate, shape, behind, floor, run):
    """More keys than the head has channels, however many these are."""
    shape = {"B": 1, **shape}
    D = shape.get("D", 16)
    given, more = inputs(9, **shape), beyond(9, gates=1 + (gate == "gated_deltanet"), **shape)
    if floor:
        more = more._replace(epsilon=0.0, floor=torch.linspace(-3.0, 0.0, given[0].shape[2]))
    fixed = settings(gate, D, feature_map="products", window=3, sinks=2)
    assert_is_the_truth(run, given, fixed, more, rope(9, D), behind=behind, shifts=shifts)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("rotated", [8, 16])
def test_a_key_is_turned_back_from_angles_that_scale(rotated, run):
    """As YaRN's; by those of another token it would not be what it was."""
    given, more, fixed = inputs(14), beyond(14), settings("gated_deltanet", feature_map="linear")
    angles = tuple(1.3 * x for x in rope(14, rotated))
    output = assert_is_the_truth(run, given, fixed, more, angles, behind="local")
    clock, held = nothing(2, 2, 16, fixed, fixed.sinks)
    wrong = turning_back(more, fixed._replace(window=fixed.window + 1), angles)
    other, _ = stepped(run, given, fixed, angles, start=(clock, waiting(held, more, fixed)), beyond=wrong)
    assert relative(other, output) > 0.01


@pytest.mark.parametrize("run", RUNS)
def test_behind_the_window_padding_is_not_taken_in(run):
    given, more, fixed = inputs(16), beyond(16), settings("gated_deltanet", feature_map="products")
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[0, :3] = False
    clock, held = nothing(2, 2, 16, fixed, fixed.sinks, shifts=1)
    start = clock, waiting(held, more, fixed)
    output, state = stepped(run, given, fixed, valid=valid, start=start, beyond=more)
    alone = [x[:1, 3:] for x in given[:3]]
    maps, gate, mixing, epsilon, (low, up), *_ = more
    its = Beyond(maps, gate[:1, 3:], mixing[:1, 3:], epsilon, (low[:1, 3:], up))
    expected, final = truth([*alone, given[3]], fixed, its, behind="local", shifts=1)
    assert_close(output[:1, 3:], expected)
    assert_close(state[:1], final)


@needs_triton
@pytest.mark.parametrize(("B", "groups"), [(17, 3), (33, 9)])
def test_more_sequences_than_a_tile_has(B, groups):
    """And more query heads than a product has at least."""
    given, more = inputs(8, B=B, KV=1, groups=groups), beyond(8, B=B, KV=1, groups=groups)
    assert_is_the_truth("many", given, settings("gated_deltanet", feature_map="linear"), more, rope(8), behind="local")


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("block", [16, 32])
def test_value_channels_of_several_programs(block, run, monkeypatch):
    """Without a root mean square they need nothing of each other."""
    pytest.importorskip("triton", reason="the kernels are Triton's")
    from linearize.ops import step_many_triton, step_triton

    monkeypatch.setattr(step_triton, "program", lambda *_: (block, 4))
    monkeypatch.setattr(step_many_triton, "STATE", block)
    fixed = settings("gated_deltanet", 40, feature_map="linear")
    assert_is_the_truth(run, inputs(10, D=40), fixed, without(beyond(10, D=40), "epsilon"), rope(10, 40))


def told_on_a_gpu(reason: str):
    """That steps run unfused and why; on a CPU it goes without saying."""
    dispatch._warn.cache_clear()  # it says so once
    return pytest.warns(UserWarning, match=f"run unfused, several times slower: .*{reason}") if GPU else nullcontext()


@needs_triton
@pytest.mark.parametrize(
    ("B", "D", "groups", "sinks", "dtype", "many"),
    [
        (95, 16, 1, 64, torch.bfloat16, False),
        (96, 16, 1, 64, torch.bfloat16, True),
        (96, 136, 1, 64, torch.bfloat16, False),
        (96, 16, 32, 64, torch.bfloat16, False),
        (96, 16, 1, 65, torch.bfloat16, False),
        (96, 16, 1, 64, torch.float32, False),
    ],
)
def test_what_goes_by_the_kernels_for_many_sequences(B, D, groups, sinks, dtype, many, monkeypatch):
    """So many sequences times heads, and no more channels, query heads, sinks and bits than fit."""
    from linearize.ops import step_many_triton, step_triton

    def program(*_):  # which only the other kernel asks for
        raise LookupError

    given, fixed = inputs(1, B=B, groups=groups, D=D), settings(D=D)
    heads, mixing = torch.cat(given[:3], 2)[:, 0].to(DEVICE, dtype), given[3].to(DEVICE)
    monkeypatch.setattr(step_many_triton, "run", lambda *_: "many")
    monkeypatch.setattr(step_triton, "program", program)
    with nullcontext() if many else pytest.raises(LookupError):
        assert step_triton.run(heads, mixing, fixed, None, None, *nothing(B, 2, D, fixed, sinks)) == "many"


@needs_triton
def test_the_window_is_a_kernel_where_the_recurrence_is_not(monkeypatch):
    """As under a root mean square over heads that no program has whole."""
    asked = []

    def why_not(heads, settings, *_):
        asked.append(settings.gate)
        return None if settings.gate == "none" else "heads are large"

    monkeypatch.setattr(step, "why_not_fused", why_not)
    fixed = settings("gated_deltanet", feature_map="linear")
    with told_on_a_gpu("heads are large"):
        assert_is_the_truth("dispatched", inputs(10), fixed, beyond(10), rope(10))
    assert asked == ["gated_deltanet", "none"] * 10


@needs_triton
def test_a_kernel_that_takes_more_than_the_device_has(monkeypatch):
    """Of shared memory, say: the recurrence goes by operations."""
    from triton.runtime.errors import OutOfResources

    from linearize.ops import step_triton

    run, refused = step_triton.run, []

    def too_much(heads, mixing, settings, *rest):
        if settings.gate != "none":
            refused.append(settings.gate)
            raise OutOfResources(120_000, 101_376, "shared memory")
        return run(heads, mixing, settings, *rest)

    monkeypatch.setattr(step, "why_not_fused", lambda *_: None)
    monkeypatch.setattr(step_triton, "run", too_much)
    fixed = settings("gated_deltanet", feature_map="linear")
    with told_on_a_gpu("shared memory"):
        assert_is_the_truth("dispatched", inputs(10), fixed, beyond(10), rope(10))
    assert len(refused) == 10


@needs_triton
def test_what_the_kernel_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def reason(D, beyond=step.NOTHING, dtype=torch.float32, gate="gated_deltanet", late=None, shifts=0, **kwargs):
        class OnGPU:
            shape = (2, 8, D)
            device, is_cuda = torch.device("cuda"), True

        OnGPU.dtype = dtype
        fixed = settings(gate, D, **kwargs)
        held = nothing(2, 2, D, fixed, 3, shifts=shifts)[1]._replace(late_gates=late)
        return step.why_not_fused(OnGPU(), fixed, None, held, beyond)

    more = at(beyond(1), 0)
    assert reason(16) is reason(16, more) is reason(256) is None
    assert "a root mean square over 256 channels" in reason(256, more)
    assert "256 channels behind the window" in reason(256, late=torch.zeros(2, 5, 2, 2))
    assert reason(256, late=torch.zeros(2, 5, 2, 2), gate="none") is None
    assert reason(64, shifts=3) is reason(128, shifts=1, gate="none") is None
    assert "512 keys of 64 channels in torch.float32" in reason(64, shifts=7)
    assert "a window of 129" in reason(16, window=129)
    assert "torch.float16 and a cache in torch.float32" in reason(16, dtype=torch.float16)


@pytest.mark.parametrize("run", RUNS)
def test_each_branch_alone(run):
    """Mixing weights of 0 and 1: the window, which is the published one's, and the recurrence."""
    given, more = inputs(10), without(beyond(10), "mixing")
    fixed, angles = settings("gated_deltanet", feature_map="linear"), rope(10)
    outputs = []
    for weight in (0.0, 1.0):
        given[3].fill_(weight)
        outputs.append(assert_is_the_truth(run, given, fixed, more, angles))
    given[3].fill_(0.0)
    assert_close(outputs[0], stepped(run, given, settings(), angles)[0])
    assert relative(*outputs) > 0.1


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("log_decay", [0.0, -8.0, -1e4])
def test_any_decay_of_the_delta_rule(log_decay, run):
    more = beyond(10)
    more.gate[:, ::3, :, 0] = log_decay
    more.gate[:, 1::3, :, 1] = log_decay
    assert_is_the_truth(run, inputs(10), settings("gated_deltanet", feature_map="linear", temperature=1.0), more)


@pytest.mark.parametrize("run", RUNS)
def test_padding_is_nothing_to_the_delta_rule(run):
    """Before a row begins and between its tokens."""
    given, more, fixed = inputs(16), beyond(16), settings("gated_deltanet", feature_map="linear", window=20)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[0, :3] = valid[0, 9] = False
    output, state = stepped(run, given, fixed, valid=valid, beyond=more)
    real = valid[0]
    own = more._replace(
        gate=more.gate[:1, real], mixing=more.mixing[:1, real], opening=(more.opening[0][:1, real], more.opening[1])
    )
    expected, final = truth([*(x[:1, real] for x in given[:3]), given[3]], fixed, own)
    assert_close(output[:1, real], expected)
    assert_close(state[:1], final)
    assert output.isfinite().all()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("gate", ["gla", "lightning"])
def test_readout_and_mixing_by_token_with_other_gates(gate, run):
    given, more = inputs(10), without(beyond(10), "maps", "gate")
    decay, angles, fixed = -torch.rand(2), rope(10), settings(gate)
    output, state = stepped(run, given, fixed, angles, decay, beyond=more)
    q, k, v, mixing = given
    windowed, _ = liger.reference(q, k, v, torch.zeros(4), fixed, angles, decay=decay)
    read, final = liger.reference(q, k, v, torch.ones(4), fixed, angles, decay=decay)
    low, up = (x.double() for x in more.opening)
    read = F.rms_norm(read, (16,), eps=more.epsilon) * 2 * (low @ up.mT).sigmoid().view_as(read)
    w = (mixing + more.mixing).double().sigmoid()[..., None]
    assert_close(output, w * read + (1 - w) * windowed)
    assert_close(state, final)


@pytest.mark.gpu
@pytest.mark.parametrize("run", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "groups", "B"), [(64, 3, 2), (128, 4, 3), (80, 1, 1)])
@pytest.mark.parametrize("gate", liger.GATES)
def test_sixteen_bits(run, gate, D, groups, B, dtype):
    given = inputs(80, B=B, groups=groups, D=D)
    given = [*(x.to(dtype) for x in given[:3]), given[3]]
    assert_is_the_equation(run, given, settings(gate, D, window=64, sinks=4), rope(80, D), tolerance=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("run", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "shifts"), [(16, 7), (40, 2), (64, 1), (64, 3)])
@pytest.mark.parametrize("behind", [None, "local"])
def test_products_in_sixteen_bits(run, behind, D, shifts, dtype):
    given, more = inputs(80, groups=3, D=D), beyond(80, groups=3, D=D)
    given = [*(x.to(dtype) for x in given[:3]), given[3]]
    fixed = settings("gated_deltanet", D, feature_map="products", window=64, sinks=4)
    assert_is_the_truth(run, given, fixed, more, rope(80, D), tolerance=1e-2, behind=behind, shifts=shifts)


@pytest.mark.gpu
@pytest.mark.parametrize("run", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "groups", "B"), [(16, 1, 2), (16, 3, 2), (64, 3, 2), (128, 4, 3), (80, 1, 1)])
@pytest.mark.parametrize("gate", liger.DELTA)
@pytest.mark.parametrize("behind", [None, "both", "local"])
def test_the_delta_rule_in_sixteen_bits(run, behind, gate, D, groups, B, dtype):
    """With a floor, or what is read, which may be little and is divided by its root mean square, is mostly rounding."""
    gates = 2 if gate == "gated_deltanet" else 1
    given, more = inputs(80, B=B, groups=groups, D=D), beyond(80, B=B, groups=groups, D=D, gates=gates)
    given, more = [*(x.to(dtype) for x in given[:3]), given[3]], more._replace(floor=torch.zeros(2 * groups))
    fixed = settings(gate, D, feature_map="linear", window=64, sinks=4)
    assert_is_the_truth(run, given, fixed, more, rope(80, D), tolerance=5e-3, behind=behind)


@needs_triton
@pytest.mark.parametrize("run", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["gated_deltanet", "gla"])
@pytest.mark.parametrize("feature_map", ["softmax", "none"])
def test_a_state_of_half_the_precision_in_a_model_of_half_the_precision(run, feature_map, gate, dtype):
    """Which is an operand as it is stored, where queries are bounded."""
    given = inputs(10)
    given = [*(x.to(dtype) for x in given[:3]), given[3]]
    fixed, angles = settings(gate, feature_map=feature_map), rope(10)
    clock, held = nothing(2, 2, 16, fixed, 3, dtype)
    start = clock, held._replace(state=held.state.half())
    output, state = stepped(run, given, fixed, angles, start=start)
    if gate == "gla":
        expected, final = liger.reference(*given, fixed, angles)
    else:
        expected, final = truth(given, fixed, Beyond(), angles)
    assert_close(output, expected, 5e-3)
    assert_close(state, final, 5e-3)


@needs_triton
@pytest.mark.parametrize("run", KERNELS)
@pytest.mark.parametrize(
    ("turned", "shifts", "shape"),
    [("both", 0, {}), ("local", 0, {}), ("local", 3, {"B": 1, "KV": 1, "groups": 3, "D": 64})],
)
def test_behind_the_window_in_half_the_precision(run, turned, shifts, shape):
    given, more, D = inputs(14, **shape), without(beyond(14, **shape), "opening"), shape.get("D", 16)
    angles, given = rope(14, D), [*(x.bfloat16() for x in given[:3]), given[3]]
    fixed = settings("gated_deltanet", D, feature_map="products" if shifts else "linear")
    clock, held = nothing(*given[1].shape[::2], D, fixed, 3, torch.bfloat16, shifts)
    held = waiting(held, more, fixed)
    start = clock, held._replace(state=held.state.half(), late_gates=held.late_gates.half())
    more = turning_back(more, fixed, angles if turned == "local" else None)
    output, state = stepped(run, given, fixed, angles, start=start, beyond=more)
    expected, final = truth(given, fixed, more, angles, turned, shifts)
    assert_close(output, expected, 1e-2)
    assert_close(state, final, 1e-2)


@needs_triton
@pytest.mark.parametrize("run", KERNELS)
def test_queries_past_what_a_state_of_half_the_precision_can_say(run):
    """Which only bf16 can be; nothing of them is rounded to fp16."""
    given, fixed, angles = inputs(3), settings(feature_map="none"), rope(3)
    given = [x.bfloat16() for x in given[:3]] + [given[3]]
    given[0] *= 1e6
    clock, held = nothing(2, 2, 16, fixed, 3, torch.bfloat16)
    start = clock, held._replace(state=held.state.half())
    output, _ = stepped(run, given, fixed, angles, start=start)
    assert_close(output, liger.reference(*given, fixed, angles)[0], 5e-3)


# --- states of half the precision ---


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate", ["gla", "mamba2", "gated_deltanet"])
def test_a_state_of_half_the_precision(gate, dtype, run):
    """Each step is that of a state in fp32, which is then rounded."""
    given, fixed = inputs(1), settings(gate)
    expected, narrow = (nothing(2, 2, 16, fixed, 3) for _ in range(2))
    narrow = narrow[0], narrow[1]._replace(state=torch.randn(2, 2, 16, 16).to(DEVICE, dtype))
    expected[1].state.copy_(narrow[1].state)
    output, state = stepped(run, given, fixed, start=narrow)
    right, whole = stepped(run, given, fixed, start=expected)
    assert state.dtype == dtype
    assert_close(output, right)
    assert_close(state, whole.to(dtype), 1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_a_state_too_large_for_its_dtype_stays_at_the_most_it_can_say(run):
    given, fixed = inputs(1), settings("mlstm", temperature=1e6, feature_map="none")
    start = nothing(2, 2, 16, fixed, 3)
    most = torch.finfo(torch.float16).max
    start = start[0], start[1]._replace(state=torch.full((2, 2, 16, 16), most).to(DEVICE, torch.float16))
    given[1], given[2] = torch.full_like(given[1], 100.0), torch.full_like(given[2], 100.0)
    _, state = stepped(run, given, fixed, start=start)
    assert (state == most).all()
