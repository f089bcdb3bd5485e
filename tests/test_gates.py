"""Gates before their non-linearity."""

import pytest
import torch
from tiny import assert_close

from linearize.config import MixerConfig
from linearize.gates import Gate, few_outputs, pooled
from linearize.structures import STRUCTURES
from linearize.structures.base import Layer, absent


def test_pooling():
    x = torch.arange(6.0).expand(2, 3, 6)
    assert torch.equal(pooled(x, 6), x)
    assert torch.equal(pooled(x, 1), torch.full((2, 3, 1), 2.5))
    assert torch.equal(pooled(x, 3)[0, 0], torch.tensor([0.5, 2.5, 4.5]))
    assert torch.equal(pooled(x, 12), torch.cat([x, x], dim=-1))
    assert pooled(x, 0).shape == (2, 3, 0)


@pytest.mark.parametrize("temperature", [1.0, 16.0, 256.0])
@pytest.mark.parametrize("name", sorted(n for n, s in STRUCTURES.items() if s.decays and s.gate_size is not absent))
def test_time_scales_are_spread_from_one_token_to_the_longest(name, temperature):
    layer = Layer(MixerConfig(structure=name, time_scales=1000.0, gate_temperature=temperature), 0, 4, 12, 4, 8, 48)
    gate = Gate(STRUCTURES[name], layer, 8)
    gate.reset_parameters()
    zero = torch.zeros(1, 1, 4, 8)
    made = STRUCTURES[name].inputs(zero, zero, zero, gate(None, None, zero, zero), layer)
    times = -1 / made.log_g[0, 0].double()
    if times.shape[-1] > 1:
        assert_close(times, (1000 ** torch.linspace(0, 1, times.shape[-1], dtype=torch.float64)).expand_as(times), 1e-3)
    else:
        assert_close(times[:, 0], torch.tensor([1.0, 10.0, 100.0, 1000.0]), 1e-3)
    if name == "gated_deltanet":
        assert_close(made.beta, torch.full_like(made.beta, 0.5))


def test_a_learned_gate_is_its_own_map_of_the_input():
    layer = Layer(MixerConfig(gate_source="learned"), 0, 4, 12, 4, 8, 48)
    gate = Gate(STRUCTURES["gla"], layer, 8)
    gate.reset_parameters()
    hidden, q, k = torch.randn(2, 5, 48), torch.randn(2, 5, 12, 8), torch.randn(2, 5, 4, 8)
    assert torch.equal(gate(hidden, q, k, k), torch.zeros(2, 5, 4, 8))
    gate.learned.up.data.normal_()
    expected = (hidden @ gate.learned.down.T @ gate.learned.up.T).unflatten(-1, (4, 8))
    assert_close(gate(hidden, q, k, k), expected)
    scalar = Gate(STRUCTURES["mlstm"], layer._replace(config=MixerConfig(structure="mlstm", gate_source="learned")), 8)
    assert [p.shape for p in scalar.parameters()] == [(4, 48)]  # no more than 16 values: no detour


@pytest.mark.parametrize("outputs", [1, 6, 8, 9])
def test_few_outputs_are_those_of_the_weight(outputs):
    x, weight = torch.randn(2, 5, 12, requires_grad=True), torch.randn(outputs, 12, requires_grad=True)
    ours, expected = few_outputs(x, weight), x @ weight.T
    torch.testing.assert_close(ours, expected)
    given = torch.randn_like(expected)
    for found, other in zip(*(torch.autograd.grad(y, [x, weight], given) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(found, other)
