"""Readouts over a recurrence."""

import torch
from tiny import assert_close

from linearize.config import MixerConfig
from linearize.features import softmax
from linearize.readouts import READOUTS
from linearize.structures import STRUCTURES
from linearize.structures.base import Layer

LAYER = Layer(MixerConfig(), 1, 4, 6, 2, 8, 48)
HIDDEN = torch.randn(2, 30, 48, generator=torch.Generator().manual_seed(0))


def read(name: str, v=None):
    torch.manual_seed(0)
    q, k, values, gate = (torch.randn(2, 30, heads, 8) for heads in (6, 2, 2, 2))
    inputs = STRUCTURES["gla"].inputs(softmax(q), softmax(k), values if v is None else v, gate, LAYER)
    readout = READOUTS[name](LAYER)
    if hasattr(readout, "reset_parameters"):
        readout.reset_parameters()
    return readout(lambda given: STRUCTURES["gla"].operator(*given), inputs, HIDDEN), readout, inputs


def test_a_denominator_makes_a_weighted_mean():
    """Where all values are the same, so is every output."""
    found, _, inputs = read("denominator", torch.full((2, 30, 2, 8), 3.0))
    assert_close(found.output, torch.full((2, 30, 6, 8), 3.0), 1e-4)
    assert found.state.shape[-1] == 9
    total, _ = STRUCTURES["gla"].operator(*inputs._replace(v=torch.ones(2, 30, 2, 1)))
    assert_close(found.log_weight.exp(), total[..., 0])


def test_rms_has_length_one():
    found, _, _ = read("rms")
    assert_close(found.output.square().mean(-1), torch.ones(2, 30, 6), 1e-3)
    assert_close(found.output, torch.nn.functional.rms_norm(read("none")[0].output, (8,), eps=1e-6))


def test_a_soft_rms_has_length_one_of_what_is_large_and_leaves_what_is_small():
    plain, soft = read("none")[0].output, read("soft_rms")[1]
    soft.log_floor.data = torch.tensor([-20.0, 20.0, 0.0, 0.0, 0.0, 0.0])
    found = soft(lambda _: (plain, None), None, HIDDEN).output
    assert_close(found[:, :, 0].square().mean(-1), torch.ones(2, 30), 1e-3)
    assert_close(found[:, :, 1], plain[:, :, 1] / torch.tensor(20.0).exp(), 1e-3)
    for head in range(2, 6):
        assert_close(found[:, :, head], plain[:, :, head] / (plain[:, :, head].square().mean(-1, True) + 1).sqrt())


def test_a_gate_starts_open_and_is_made_from_the_input():
    found, gated, _ = read("gated")
    assert_close(found.output, read("rms")[0].output)
    for parameter in gated.parameters():
        parameter.data.normal_()
    gate = 2 * (HIDDEN @ gated.gate.down.T @ gated.gate.up.T).sigmoid().unflatten(-1, (6, 8))
    run = lambda inputs: (found.output, None)  # noqa: E731
    assert_close(gated(run, None, HIDDEN).output, gate * torch.nn.functional.rms_norm(found.output, (8,), eps=1e-6))
