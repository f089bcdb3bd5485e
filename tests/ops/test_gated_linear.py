"""Chunked and step against the equation: forward, state and all gradients."""

import pytest
import torch
from jaxtyping import TypeCheckError
from tiny import assert_close
from torch import Tensor

from linearize.ops import gated_linear as module
from linearize.ops.gated_linear import chunked, gated_linear, reference, reference_with_bonus, step, with_bonus


def inputs(T: int, B: int = 2, KV: int = 2, groups: int = 3, K: int = 12, V: int = 8, decay: float | None = None):
    """q, k, v, log_g and a state; decays random, or `decay` at every token."""
    q, k, v = torch.randn(B, T, KV * groups, K), torch.randn(B, T, KV, K), torch.randn(B, T, KV, V)
    log_g = -torch.rand(B, T, KV, K) if decay is None else torch.full((B, T, KV, K), decay)
    return [q, k, v, log_g, torch.randn(B, KV, K, V)]


def documents(T: int, starts: list[int]) -> Tensor:
    document = torch.zeros(T, dtype=torch.long)
    document[starts] = 1
    return document.cumsum(0)[None]


def assert_is_the_equation(given: list[Tensor], document: Tensor | None = None, **kwargs) -> None:
    """Outputs, final states and gradients of all five inputs."""
    ours = [x.clone().requires_grad_() for x in given]
    truth = [x.double().requires_grad_() for x in given]
    results, expected = chunked(*ours, document, **kwargs), reference(*truth, document)
    weights = [torch.randn_like(x) for x in expected]
    for result, other in zip(results, expected, strict=True):
        assert_close(result, other)
    sum((w * x.double()).sum() for w, x in zip(weights, results, strict=True)).backward()
    sum((w * x).sum() for w, x in zip(weights, expected, strict=True)).backward()
    for x, other in zip(ours, truth, strict=True):
        assert_close(x.grad, other.grad)


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
def test_chunked_is_the_equation(T, groups):
    assert_is_the_equation(inputs(T, groups=groups))


@pytest.mark.parametrize("sizes", [(16, 4), (4, 16), (5, 5)])
@pytest.mark.parametrize("groups", [1, 4])
def test_key_and_value_sizes(sizes, groups):
    assert_is_the_equation(inputs(70, K=sizes[0], V=sizes[1], groups=groups))


@pytest.mark.parametrize("chunk", [1, 2, 16, 32, 128])
def test_any_chunk_size(chunk):
    assert_is_the_equation(inputs(100), documents(100, [16, 40, 64]).expand(2, -1), chunk=chunk)


def test_without_a_state():
    *given, state = inputs(70)
    for result, other in zip(gated_linear(*given), reference(*given, torch.zeros_like(state)), strict=True):
        assert_close(result, other)


@pytest.mark.parametrize(
    "starts",
    [[64], [63], [65], [64, 128, 192], [1], [10, 11, 12, 13], [63, 64, 65], [199], [5, 130]],
    ids=str,
)
def test_documents_do_not_see_each_other(starts):
    rows = [documents(200, starts), documents(200, [100])]
    assert_is_the_equation(inputs(200), torch.cat(rows))


def test_first_document_continues_the_state():
    given = inputs(200)
    assert not torch.equal(chunked(*given)[0][:, :64], chunked(*given[:4], 2 * given[4])[0][:, :64])
    document = documents(200, [64]).expand(2, -1)
    one, other = chunked(*given, document)[0], chunked(*given[:4], 2 * given[4], document)[0]
    assert torch.equal(one[:, 64:], other[:, 64:])


@pytest.mark.parametrize("decay", [0.0, -8.0, -20.0, -1e4])
@pytest.mark.parametrize("starts", [[], [64, 100]], ids=str)
def test_any_decay(decay, starts):
    assert_is_the_equation(inputs(130, decay=decay), documents(130, starts).expand(2, -1))


def test_decays_from_nothing_to_all_in_one_sequence():
    given = inputs(130)
    choices = torch.tensor([0.0, -1e-3, -1.0, -8.0, -20.0, -1e4])
    given[3] = choices[torch.randint(len(choices), given[3].shape)]
    assert_is_the_equation(given)


@pytest.mark.parametrize("starts", [[], [30, 64, 100]], ids=str)
@pytest.mark.parametrize(
    ("each", "lowest"), [(-29 / 64, 0), (-31 / 64, 0), (-1e-3, -1.9), (-1e-3, -2.1), (-0.2, -18.0)]
)
def test_decays_on_both_sides_of_the_limits(each, lowest, starts):
    """One product for a chunk, or merges, by the chunk's sum and by its steepest decay; a chunk of each in a batch."""
    given = inputs(200, decay=each)
    given[3][:, 70, :, ::3] += lowest
    given[3][1, :64] *= 40
    assert_is_the_equation(given, documents(200, starts).expand(2, -1))


@pytest.mark.parametrize(("decay", "forms"), [(-0.4, ["_at_once"]), (-0.5, ["_by_merges"])])
def test_mild_chunks_are_read_at_once(monkeypatch, decay, forms):
    called = []
    for form in ("_at_once", "_by_merges"):
        original = getattr(module, form)
        monkeypatch.setattr(module, form, lambda *x, c=form, f=original, **told: (called.append(c), f(*x, **told))[1])
    chunked(*inputs(64, decay=decay))
    assert called == forms


@pytest.mark.parametrize("splits", [[1], [64], [63, 64, 65], [7, 100], [129]], ids=str)
def test_any_split_gives_the_same(splits):
    *given, state = inputs(130)
    expected, last = chunked(*given, state)
    parts = []
    for part in zip(*(x.tensor_split(splits, dim=1) for x in given), strict=True):
        output, state = gated_linear(*part, state)
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
    output, state = gated_linear(*rounded)
    assert output.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    expected, last = reference(*rounded)
    assert_close(output, expected, 4e-3)
    assert_close(state, last)


@pytest.mark.parametrize(("T", "name"), [(1, "step"), (2, "chunked"), (65, "chunked")])
def test_dispatch(monkeypatch, T, name):
    called = []
    for choice in ("step", "chunked"):
        original = getattr(module, choice)
        monkeypatch.setattr(module, choice, lambda *args, c=choice, f=original: (called.append(c), f(*args))[1])
    gated_linear(*inputs(T)[:4])
    assert called == [name]


def test_shapes_are_checked_here():
    q, k, v, log_g, _ = inputs(4)
    with pytest.raises(TypeCheckError):
        gated_linear(q, k, v, log_g[:, :3])


def assert_bonus_is_the_equation(given: list[Tensor], document: Tensor | None = None) -> None:
    """Outputs, final states and gradients of all six inputs."""
    bonus = torch.randn(*given[1].shape[2:])
    given = [*given[:4], bonus, given[4]]
    ours = [x.clone().requires_grad_() for x in given]
    truth = [x.double().requires_grad_() for x in given]
    results, expected = with_bonus(*ours, document), reference_with_bonus(*truth, document)
    weights = [torch.randn_like(x) for x in expected]
    for result, other in zip(results, expected, strict=True):
        assert_close(result, other)
    sum((w * x.double()).sum() for w, x in zip(weights, results, strict=True)).backward()
    sum((w * x).sum() for w, x in zip(weights, expected, strict=True)).backward()
    for x, other in zip(ours, truth, strict=True):
        assert_close(x.grad, other.grad)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("T", [1, 2, 5, 63, 64, 65, 130])
def test_bonus_is_the_equation(T, groups):
    assert_bonus_is_the_equation(inputs(T, groups=groups))


@pytest.mark.parametrize("starts", [[64], [63], [65], [64, 128], [1], [10, 11, 12], [129], [5, 70]], ids=str)
def test_bonus_in_documents(starts):
    assert_bonus_is_the_equation(inputs(130), torch.cat([documents(130, starts), documents(130, [100])]))


@pytest.mark.parametrize("decay", [0.0, -8.0, -20.0, -1e4])
def test_bonus_with_any_decay(decay):
    assert_bonus_is_the_equation(inputs(130, decay=decay), documents(130, [64, 100]).expand(2, -1))


@pytest.mark.parametrize("splits", [[1], [64], [63, 64, 65], [7, 100], range(1, 130)], ids=str)
def test_bonus_with_any_split(splits):
    *given, state = inputs(130)
    bonus = torch.randn(2, 12)
    expected, last = with_bonus(*given, bonus, state)
    parts = []
    for part in zip(*(x.tensor_split(list(splits), dim=1) for x in given), strict=True):
        output, state = with_bonus(*part, bonus, state)
        parts.append(output)
    assert_close(torch.cat(parts, 1), expected)
    assert_close(state, last)


def test_bonus_without_a_state_and_one_decay_a_head():
    q, k, v, log_g, state = inputs(70)
    given = [q, k, v, log_g[..., :1], torch.randn(2, 12)]
    for result, other in zip(with_bonus(*given), reference_with_bonus(*given, 0 * state), strict=True):
        assert_close(result, other)


def test_a_bonus_of_one_without_decay_is_the_plain_read():
    q, k, v, log_g, state = inputs(70, decay=0.0)
    for one, other in zip(
        with_bonus(q, k, v, log_g, torch.ones(2, 12), state), chunked(q, k, v, log_g, state), strict=True
    ):
        assert_close(one, other)


def test_bonus_in_bfloat16():
    *given, state = (x.bfloat16() for x in inputs(70))
    output, last = with_bonus(*given, torch.randn(2, 12), state.float())
    assert (output.dtype, last.dtype) == (torch.bfloat16, torch.float32)
