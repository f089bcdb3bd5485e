"""Gated slots, in two passes and by steps, against the equation: forward, state and all gradients."""

import pytest
import torch
from jaxtyping import TypeCheckError
from tiny import assert_close
from torch import Tensor

from linearize.ops import slots as module
from linearize.ops.slots import gated_slots, in_two_passes, reference, step


def inputs(T: int, KV: int = 2, groups: int = 3, K: int = 12, V: int = 8, M: int = 5):
    """q, k, v, log_g and a state."""
    q, k, v = torch.randn(2, T, KV * groups, K), torch.randn(2, T, KV, K), torch.randn(2, T, KV, V)
    return [q, k, v, -torch.rand(2, T, KV, M), torch.randn(2, KV, M, K + V)]


def documents(T: int, starts: list[int]) -> Tensor:
    document = torch.zeros(T, dtype=torch.long)
    document[starts] = 1
    return document.cumsum(0)[None]


def assert_is_the_equation(given: list[Tensor], document: Tensor | None = None) -> None:
    """Outputs, final states and gradients of all five inputs."""
    ours = [x.clone().requires_grad_() for x in given]
    truth = [x.double().requires_grad_() for x in given]
    results, expected = in_two_passes(*ours, document), reference(*truth, document)
    weights = [torch.randn_like(x) for x in expected]
    for result, other in zip(results, expected, strict=True):
        assert_close(result, other)
    sum((w * x.double()).sum() for w, x in zip(weights, results, strict=True)).backward()
    sum((w * x).sum() for w, x in zip(weights, expected, strict=True)).backward()
    for x, other in zip(ours, truth, strict=True):
        assert_close(x.grad, other.grad)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 130])
def test_in_two_passes_is_the_equation(T, groups):
    assert_is_the_equation(inputs(T, groups=groups))


@pytest.mark.parametrize("sizes", [(16, 4, 3), (4, 16, 33), (5, 5, 5), (4, 4, 1)])
def test_key_value_and_slot_sizes(sizes):
    assert_is_the_equation(inputs(70, K=sizes[0], V=sizes[1], M=sizes[2]))


def test_documents():
    assert_is_the_equation(inputs(100), documents(100, [16, 40, 64]).expand(2, -1))


def test_without_a_state():
    *given, state = inputs(70)
    for result, other in zip(gated_slots(*given), reference(*given, torch.zeros_like(state)), strict=True):
        assert_close(result, other)


@pytest.mark.parametrize("starts", [[64], [63], [65], [64, 128], [1], [10, 11, 12], [129], [5, 70]], ids=str)
def test_documents_do_not_see_each_other(starts):
    assert_is_the_equation(inputs(130), torch.cat([documents(130, starts), documents(130, [100])]))


@pytest.mark.parametrize("decay", [0.0, -1e-3, -8.0, -20.0, -1e4])
@pytest.mark.parametrize("starts", [[], [64, 100]], ids=str)
def test_any_decay(decay, starts):
    given = inputs(130)
    given[3][..., ::2] = decay  # not all: slots that are alike have scores without a gradient
    assert_is_the_equation(given, documents(130, starts).expand(2, -1))


def test_slots_that_forget_all_hold_the_last_token():
    q, k, v, log_g, state = inputs(130)
    output, last = gated_slots(q, k, v, torch.full_like(log_g, -1e4), state)
    assert_close(output, v.repeat_interleave(3, dim=2))
    assert_close(last, torch.cat([k, v], dim=-1)[:, -1, :, None].expand_as(last))


def test_decays_from_nothing_to_all_in_one_sequence():
    given = inputs(130)
    choices = torch.tensor([0.0, -1e-3, -1.0, -8.0, -20.0, -1e4])
    given[3] = choices[torch.randint(len(choices), given[3].shape)]
    assert_is_the_equation(given)


@pytest.mark.parametrize("log_decay", [-1e-6, -1e-8])
def test_what_hardly_forgets_still_writes(log_decay):
    """1 - α is exact where α rounds to 1."""
    q, k, v, log_g, state = inputs(64)
    given = [q, k, v, torch.full_like(log_g, log_decay)]
    for result, other in zip(gated_slots(*given), reference(*given, torch.zeros_like(state)), strict=True):
        assert_close(result, other)


def test_a_log_decay_of_zero_changes_nothing():
    q, k, v, log_g, state = inputs(70)
    assert torch.equal(gated_slots(q, k, v, 0 * log_g, state)[1], state)


@pytest.mark.parametrize("splits", [[1], [64], [63, 64, 65], [7, 100], [129]], ids=str)
def test_any_split_gives_the_same(splits):
    *given, state = inputs(130)
    expected, last = in_two_passes(*given, state)
    parts = []
    for part in zip(*(x.tensor_split(splits, dim=1) for x in given), strict=True):
        output, state = gated_slots(*part, state)
        parts.append(output)
    assert_close(torch.cat(parts, 1), expected)
    assert_close(state, last)


def test_steps_are_the_equation():
    *given, state = inputs(40)
    expected, last = reference(*given, state)
    parts = []
    for part in zip(*(x.split(1, dim=1) for x in given), strict=True):
        output, state = step(*part, state)
        parts.append(output)
    assert_close(torch.cat(parts, 1), expected)
    assert_close(state, last)


@pytest.mark.parametrize("T", [1, 70])
def test_bfloat16_in_bfloat16_out_and_an_fp32_state(T):
    given = inputs(T)
    rounded = [x.bfloat16() for x in given[:4]] + given[4:]
    output, state = gated_slots(*rounded)
    assert output.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    expected, last = reference(*rounded)
    assert_close(output, expected, 4e-3)
    assert_close(state, last)


@pytest.mark.parametrize(("T", "name"), [(1, "step"), (2, "in_two_passes"), (65, "in_two_passes")])
def test_dispatch(monkeypatch, T, name):
    called = []
    for choice in ("step", "in_two_passes"):
        original = getattr(module, choice)
        monkeypatch.setattr(module, choice, lambda *args, c=choice, f=original: (called.append(c), f(*args))[1])
    gated_slots(*inputs(T)[:4])
    assert called == [name]


def test_outputs_lie_between_the_values():
    """Slots are means of values, and outputs are means of slots, once nothing is left of the empty state."""
    q, k, v, log_g, _ = inputs(130)
    output, _ = gated_slots(q, k, torch.full_like(v, 3.0), log_g)
    assert_close(output[:, 60:], torch.full_like(output[:, 60:], 3.0))


def test_shapes_are_checked_here():
    q, k, v, log_g, _ = inputs(4)
    with pytest.raises(TypeCheckError):
        gated_slots(q, k, v, log_g[..., :1], torch.zeros(2, 2, 5, 20))
