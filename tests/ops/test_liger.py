"""Kernels of Liger Attention against the equations: output, final state and every gradient.

Without a GPU the kernels run in Triton's interpreter, in fp32.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from equation import (
    ALL,
    assert_is_the_equation,
    assert_is_the_window,
    documents,
    in_groups,
    inputs,
    needs_interpreter,
    needs_triton,
    rope,
    settings,
)
from tiny import assert_close

from linearize.config import MixerConfig
from linearize.features import FEATURE_MAPS
from linearize.gates import pooled
from linearize.ops import gated_linear, liger
from linearize.ops.liger import first_tokens, fused, reference, unfused
from linearize.structures import STRUCTURES
from linearize.structures.base import Layer

pytestmark = pytest.mark.usefixtures("checked_kernels")


@needs_interpreter
@pytest.mark.parametrize("gate", ALL)
def test_every_gate(gate):
    assert_is_the_equation(inputs(65, groups=3), settings(gate), rope(65))


@needs_interpreter
@pytest.mark.parametrize("gate", ["gla", "gated_deltanet"])
@pytest.mark.parametrize("T", [1, 63, 64, 130])
def test_lengths(gate, T):
    assert_is_the_equation(inputs(T), settings(gate), rope(T))


@needs_interpreter
@pytest.mark.parametrize(
    ("gate", "spread"),
    [("gla", 4.0), ("gla", 20.0), ("gla", 1e4), ("rwkv6", 4.0), ("rwkv6", 20.0), ("hgrn2", 20.0), ("mlstm", 20.0)],
)
def test_any_decay(gate, spread):
    """Decays from nothing to all in one sequence; a key of -1e4 is a log decay of -1e4 with `gla`."""
    assert_is_the_equation(inputs(65, groups=1, spread=spread), settings(gate, temperature=1.0), rope(65))


@needs_interpreter
@pytest.mark.parametrize("total", [-59.0, -61.0])
@pytest.mark.parametrize("size", [1.0, 1e-9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 7e-3)], ids=str)
def test_decays_on_both_sides_of_the_limit(dtype, tolerance, size, total):
    """Where a chunk may decay by e^60, keys grow by as much and their gradients, however small, shrink; where by more,
    each is decayed to the end."""
    given, kept = inputs(130, D=32), torch.tensor(total / 64).exp()
    given[1] = 0.1 * torch.randn_like(given[1]) + 4.0
    given[1][..., ::3] = (kept / (1 - kept)).log()  # σ⁻¹: some channels decay so, the others hardly
    fixed = settings("gla", D=32, temperature=1.0)
    assert_is_the_equation(given, fixed, rope(130, 32), None, fused, dtype, tolerance, size)


@needs_interpreter
@pytest.mark.parametrize(("spread", "temperature"), [(20.0, 1.0), (400.0, 16.0), (1e3, 1.0)])
def test_any_decay_of_hgrn2(spread, temperature):
    """In the first layer, where keys round to 1. Of still larger keys hardly one has a gradient."""
    fixed = settings("hgrn2", temperature=temperature, scale=1 / spread, lower=0.0)
    assert_is_the_equation(inputs(65, groups=1, spread=spread), fixed, rope(65))


@needs_interpreter
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_delta_rule_with_any_decay(temperature):
    given, fixed = inputs(130, spread=20.0), settings("gated_deltanet", temperature=temperature)
    assert_is_the_equation(given, fixed, rope(130))


@needs_interpreter
@pytest.mark.parametrize("gate", liger.DELTA)
@pytest.mark.parametrize("feature_map", ["softmax", "none"])
def test_delta_rule_with_correlated_keys_and_eigenvalues_of_minus_one(gate, feature_map):
    given = inputs(130)
    given[1] = given[1][:, :1] + 0.3 * given[1] + 4.0  # β near 2
    assert_is_the_equation(given, settings(gate, feature_map=feature_map, strength=2.0), rope(130))


@needs_interpreter
@pytest.mark.parametrize("gate", liger.DELTA)
def test_delta_rule_with_correlated_keys_in_half_precision(gate):
    """What nearly cancels is not rounded; the mixing weights' gradient is a sum of large terms by itself."""
    given, fixed = inputs(200, D=64), settings(gate, D=64, strength=2.0)
    given[1] = given[1][:, :1] + 0.3 * given[1] + 2.0  # β around 1.8
    assert_is_the_equation(given, fixed, rope(200), None, fused, torch.bfloat16, 1.5e-2)


@needs_interpreter
@pytest.mark.parametrize("key", [-8.0, -20.0, -1e4])
def test_the_same_decay_everywhere(key):
    given = inputs(65, groups=1)
    given[1] = key + torch.randn_like(given[1])
    assert_is_the_equation(given, settings(temperature=1.0), rope(65))


@needs_interpreter
@pytest.mark.parametrize("gate", ["gla", "deltanet"])
@pytest.mark.parametrize("fixed", [{"sinks": 0}, {"sinks": 16, "window": 20}, {"feature_map": "none"}], ids=str)
def test_settings(gate, fixed):
    assert_is_the_equation(inputs(70), settings(gate, **fixed), rope(70))


@needs_interpreter
@pytest.mark.parametrize(("D", "R"), [(16, 0), (16, 8), (12, 12), (24, 6)])
@pytest.mark.parametrize("gate", ["gla", "gated_deltanet"])
def test_head_sizes_and_partial_rotation(gate, D, R):
    assert_is_the_equation(inputs(66, D=D), settings(gate, D=D), rope(66, R) if R else None)


@needs_interpreter
@pytest.mark.parametrize("gate", ["gla", "hgrn2", "rwkv6"])
def test_what_pads_a_head_has_no_decay(gate):
    """Keys that keep everything; the zeros beside them would be a decay that overflows."""
    given, sign = inputs(66, D=12), -1.0 if gate == "rwkv6" else 1.0
    given[1] = sign * 20.0 + given[1]
    assert_is_the_equation(given, settings(gate, D=12, temperature=0.1, lower=0.0), rope(66, 12))


@needs_interpreter
@pytest.mark.parametrize("gate", ["gla", "mamba2", *liger.DELTA])
def test_documents_do_not_see_each_other(gate):
    first = documents(130, [20, 23, 100], [64])
    assert_is_the_equation(inputs(130, B=2, groups=1), settings(gate), rope(130), first)


@needs_interpreter
def test_documents_with_steep_decays():
    fixed = settings("rwkv6", temperature=1.0)
    assert_is_the_equation(inputs(130, groups=1, spread=4.0), fixed, rope(130), documents(130, [5, 40, 90]))


@needs_interpreter
@pytest.mark.parametrize("gate", ["gla", "gated_deltanet"])
def test_left_padding_and_angles_of_each_sequence(gate):
    valid = torch.arange(130) >= torch.tensor([[70], [5]])
    given = inputs(130, B=2, groups=1)
    assert_is_the_equation(given, settings(gate), rope(130, B=2), first_tokens(None, valid))


@needs_interpreter
@pytest.mark.parametrize(("gate", "packed"), [("gla", True), ("gla", False), ("mlstm", False)])
def test_segments(monkeypatch, gate, packed):
    """A sequence cut into segments of two chunks, for one that has the device for itself."""
    from linearize.ops import liger_fused

    monkeypatch.setattr(liger_fused, "segments_of", lambda call, blocks: (-(-call.chunks // 2), 2))
    first = documents(200, [70, 150]) if packed else None
    assert_is_the_equation(inputs(200, groups=1), settings(gate), rope(200), first)


@needs_interpreter
@pytest.mark.parametrize(
    ("gate", "fixed", "size", "packed"),
    [
        ("gated_deltanet", {}, 2, False),
        ("deltanet", {}, 1, True),
        ("gated_deltanet", {"strength": 2.0}, 3, True),
        ("deltanet", {"strength": 2.0, "feature_map": "none"}, 1, False),
    ],
)
def test_segments_of_the_delta_rule(monkeypatch, gate, fixed, size, packed):
    """With keys that are nearly the same, and β up to 2."""
    from linearize.ops import liger_delta

    monkeypatch.setattr(liger_delta, "segments_of", lambda call, blocks: (-(-call.chunks // size), size))
    given = inputs(300, groups=3)
    given[1] = given[1][:, :1] + 0.3 * given[1] + fixed.get("strength", 0.0)
    first = documents(300, [70, 150]) if packed else None
    assert_is_the_equation(given, settings(gate, **fixed), rope(300), first)


@needs_interpreter
@pytest.mark.parametrize(
    ("gate", "groups", "heads", "fixed"),
    [
        ("gla", 4, 2, {}),
        ("gla", 3, 1, {"feature_map": "none", "sinks": 0}),
        ("mamba2", 4, 1, {"sinks": 0}),
        ("rwkv6", 3, 2, {}),
    ],
)
def test_groups_of_heads(monkeypatch, gate, groups, heads, fixed):
    launched = in_groups(monkeypatch, heads)
    given, first = inputs(130, B=2, groups=groups), documents(130, [20, 23, 100], [64])
    assert_is_the_equation(given, settings(gate, **fixed), rope(130, B=2), first)
    assert "group_output" in launched
    assert "output" not in launched


@needs_interpreter
@pytest.mark.parametrize(("D", "R"), [(16, 16), (24, 24), (16, 8), (16, 0)])
def test_groups_of_heads_by_rotated_channels(monkeypatch, D, R):
    in_groups(monkeypatch, 2)
    assert_is_the_equation(inputs(70, groups=2, D=D), settings(D=D), rope(70, R) if R else None)


@needs_interpreter
def test_heads_without_a_group(monkeypatch):
    launched = in_groups(monkeypatch)
    assert_is_the_equation(inputs(70, KV=2, groups=1), settings(), rope(70))
    assert "output" in launched
    assert "group_output" not in launched


@needs_triton
@pytest.mark.parametrize(
    ("heads", "dtype", "chunks", "memory", "expected"),
    [
        ((32, 8), torch.bfloat16, 128, 232448, 2),  # H100
        ((24, 8), torch.bfloat16, 128, 232448, 1),
        ((8, 8), torch.bfloat16, 128, 232448, 0),  # no group
        ((32, 8), torch.bfloat16, 16, 232448, 0),  # too few programs
        ((32, 8), torch.bfloat16, 128, 166912, 0),  # A100
        ((32, 8), torch.float32, 128, 232448, 0),
    ],
)
def test_where_a_program_has_a_group(monkeypatch, heads, dtype, chunks, memory, expected):
    from linearize.ops import liger_fused

    monkeypatch.setattr(liger_fused, "max_shared_mem", lambda device: memory)
    q, k = (SimpleNamespace(shape=(1, 64, n, 128), is_cuda=True, device=torch.device("cuda", 0)) for n in heads)
    call = SimpleNamespace(q=q, k=k, dtype=dtype, chunks=chunks, pairs=heads[1])
    assert liger_fused.heads_at_once(call) == expected


@needs_interpreter
@pytest.mark.parametrize("gate", ["gla", "mamba2"])
@pytest.mark.parametrize("feature_map", ["softmax", "none"])
def test_weights_of_zero_and_one(gate, feature_map):
    """Of a head that reads nothing of the recurrence, the mixing weight still has a gradient."""
    given = inputs(70)
    given[3] = torch.tensor([0.0, 1.0])
    assert_is_the_equation(given, settings(gate, feature_map=feature_map), rope(70))


@needs_interpreter
@pytest.mark.parametrize("fixed", [{}, {"sinks": 0}, {"sinks": 16, "window": 20}], ids=str)
def test_window_alone(fixed):
    assert_is_the_window(inputs(130, groups=3), settings("none", **fixed), rope(130, 8))


@needs_interpreter
@pytest.mark.parametrize("T", [2, 64, 130])  # of one token there is no gradient but of its values
def test_window_alone_by_heads(T, monkeypatch):
    """Programs of one query head, or of all."""
    for multiprocessors in (1, 1000):
        monkeypatch.setattr("linearize.ops.liger_fused.MULTIPROCESSORS", multiprocessors)
        assert_is_the_window(inputs(T, groups=3), settings("none", sinks=2, window=30), rope(T))


@needs_interpreter
@pytest.mark.parametrize("rotary", [64, 80])
def test_window_alone_of_large_heads(rotary):
    assert_is_the_window(inputs(130, D=80, groups=2), settings("none"), rope(130, rotary))


@needs_interpreter
@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("fixed", [{}, {"sinks": 16, "window": 30}, {"sinks": 0, "window": 129}], ids=str)
def test_window_alone_of_heads_that_are_rotated_whole(fixed, halves, monkeypatch):
    """Both halves of the channels apart, as `turned_parts` has them, or together."""
    monkeypatch.setattr("linearize.ops.liger_fused.from_hopper_on", lambda x: halves)
    first = None if "window" in fixed else documents(130, [20, 23, 100])
    assert_is_the_window(inputs(130, groups=2, D=32), settings("none", D=32, **fixed), rope(130, 32), first)


@needs_interpreter
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    ("gate", "fixed"),
    [("gla", {}), ("mamba2", {"sinks": 16, "window": 30}), ("hgrn2", {"sinks": 0}), ("gla", {"feature_map": "none"})],
    ids=str,
)
def test_by_halves(gate, fixed, groups, monkeypatch):
    """As above, with heads that are rotated whole and, of `mamba2`, not at all; by heads, and by groups of heads."""
    monkeypatch.setattr("linearize.ops.liger_fused.from_hopper_on", lambda x: True)
    monkeypatch.setattr("linearize.ops.liger_fused.MULTIPROCESSORS", 1)
    first = documents(70, [20, 23, 66]) if gate == "gla" else None
    angles = None if gate == "mamba2" else rope(70, 32)
    assert_is_the_equation(inputs(70, groups=groups, D=32), settings(gate, D=32, **fixed), angles, first)


@needs_interpreter
def test_window_alone_with_documents():
    assert_is_the_window(inputs(130, B=2), settings("none"), None, documents(130, [20, 23, 100], [64]))


@needs_interpreter
@pytest.mark.parametrize("window", [65, 129])
def test_longer_window_alone(window):
    """Chunk after chunk of keys, whole ones and not, and sinks that leave late."""
    first = documents(200, [20, 23], [64, 70])
    assert_is_the_window(inputs(200, groups=2), settings("none", window=window), rope(200, 8))
    assert_is_the_window(inputs(200, B=2, groups=1), settings("none", window=window, sinks=2), rope(200), first)
    assert_is_the_window(inputs(70, groups=1), settings("none", window=window, sinks=0), None)


@needs_interpreter
def test_without_a_state_and_with_slices():
    """No state is a state of zeros; tensors may be views."""
    *given, state = inputs(65, KV=2)
    fixed = settings()
    expected = reference(*given, fixed, None, torch.zeros_like(state))
    padded = [torch.nn.functional.pad(x, (0, 3))[..., :-3] for x in given[:3]]
    for result, other in zip(fused(*padded, given[3], fixed), expected, strict=True):
        assert_close(result, other)


def test_more_chunks_than_a_grid_has(monkeypatch):
    monkeypatch.setattr("linearize.ops.dispatch.no_device", lambda x: None)
    for T, reason in ((64 * 65535, None), (64 * 65535 + 1, "no kernel for 4194241 tokens")):
        q = torch.zeros(1, dtype=torch.bfloat16).expand(1, T, 1, 16)
        assert liger.why_not_fused(q, q, q, settings(), None, None) == reason
        assert gated_linear.why_not_fused(q, q, q) == reason


@pytest.mark.parametrize("gate", ALL)
def test_unfused_is_the_equation(gate):
    first = documents(140, [20, 23, 100], [64])
    given = inputs(140, B=2, groups=3)
    assert_is_the_equation(given, settings(gate), rope(140, 8), first, unfused)
    assert_is_the_equation(given, settings(gate), rope(140), None, unfused)


@pytest.mark.parametrize("gate", liger.DELTA)
def test_delta_rules_are_the_structures(gate):
    q, k, v, *_ = inputs(5, KV=3)
    layer = Layer(MixerConfig(structure=gate, negative_eigenvalues=True), 0, 1, 3, 3, k.shape[-1], 48)
    softmax, structure = FEATURE_MAPS["softmax"], STRUCTURES[gate]
    made = pooled(k, 1).repeat(1, 1, 1, structure.gates)
    expected = structure.inputs(softmax(q), softmax(k), v, made, layer)
    key, log_g, beta = liger.DELTA[gate](k, settings(gate, strength=2.0))
    assert_close(key, F.normalize(expected.k, dim=-1))
    assert structure.unit
    assert_close(log_g, expected.log_g)
    assert_close(beta, expected.beta)


@pytest.mark.parametrize("gate", liger.GATES)
def test_gates_are_the_structures(gate):
    q, k, v, *_ = inputs(5, KV=3)
    layer = Layer(MixerConfig(structure=gate), 3, 10, 3, 3, k.shape[-1], 48)
    softmax, structure = FEATURE_MAPS["softmax"], STRUCTURES[gate]
    made = pooled(k, structure.gate_size(layer.config, k.shape[-1]))
    expected = structure.inputs(softmax(q), softmax(k), v, made, layer)
    decay = expected.log_g[0, 0, :, 0] if gate == "lightning" else None
    key, log_g = liger.GATES[gate](k, settings(gate), decay)
    assert_close(key, expected.k)
    assert_close(log_g, expected.log_g)


@pytest.mark.parametrize("layer_idx", [0, 1, 29])
@pytest.mark.parametrize(("spread", "temperature"), [(1.0, 16.0), (20.0, 1.0), (400.0, 16.0), (1e4, 1.0)])
def test_any_gate_of_hgrn2(spread, temperature, layer_idx):
    """Key, log decay and its gradient against α = lower + (1 - lower) σ(k)^(1/temperature), from its logarithm."""
    k, lower = torch.randn(2, 30, 1, 16), layer_idx / 30
    k[1] *= spread
    layer = Layer(MixerConfig(structure="hgrn2", gate_temperature=temperature), layer_idx, 30, 1, 1, 16, 48)
    exact = k.double().requires_grad_()
    bound, rest = torch.tensor([lower, 1 - lower], dtype=torch.float64).log()
    expected = torch.logaddexp(bound, rest + F.logsigmoid(exact) / temperature)
    weights = torch.randn_like(k)
    (weights * expected).sum().backward()
    for made in (
        lambda k: liger.hgrn2(k, settings("hgrn2", temperature=temperature, lower=lower), None),
        lambda k: STRUCTURES["hgrn2"].inputs(k, k, k, k, layer)[1::2],
    ):
        given = k.clone().requires_grad_()
        key, log_g = made(given)
        assert_close(key, -torch.expm1(expected))
        assert_close(log_g, expected)
        (weights * log_g).sum().backward()
        assert_close(given.grad, exact.grad)


def test_unfused_with_any_decay_of_hgrn2():
    given, fixed = inputs(65, spread=400.0), settings("hgrn2", scale=1 / 400, lower=0.0)
    assert_is_the_equation(given, fixed, rope(65), None, unfused)


def test_first_tokens():
    document = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    valid = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
    assert first_tokens(None, None) is None
    assert documents(5, [2], [1, 3]).tolist() == [[0, 0, 2, 2, 2], [0, 1, 1, 3, 3]]
    assert first_tokens(None, valid).tolist() == [[0, 1, 2, 2, 2], [0, 0, 0, 0, 4]]
    assert first_tokens(document, valid).tolist() == [[0, 1, 2, 2, 2], [0, 1, 1, 3, 4]]


@pytest.mark.gpu
@pytest.mark.parametrize("given", [{"window": 65}, {"sinks": 17}, {"gate": "delta"}, {"feature_map": "relu"}], ids=str)
def test_what_is_not_fused(given):
    q, k, v, *_ = (x.cuda().bfloat16() for x in inputs(3))
    assert "no kernel for" in str(liger.why_not_fused(q, k, v, settings(**given), None, None))
    assert "float32" in str(liger.why_not_fused(q.float(), k.float(), v.float(), settings(), None, None))
    assert liger.why_not_fused(q, k, v, settings(), None, None) is None
