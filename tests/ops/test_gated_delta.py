"""Chunked and step against the equation: forward, state and all gradients; and what the rule can compute."""

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_close
from torch import Tensor

from linearize.ops.gated_delta import chunked, gated_delta, reference, step
from linearize.ops.gated_linear import reference as gated_linear


def inputs(T: int, correlation: float = 0.0, groups: int = 3, K: int = 12, V: int = 8, largest: float = 2.0):
    """q, k, v, log_g, beta in [0, largest] and a state; keys of length 1 that share a direction."""
    q, k, v = torch.randn(2, T, 2 * groups, K), torch.randn(2, T, 2, K), torch.randn(2, T, 2, V)
    k = F.normalize((1 - correlation) * k + correlation * torch.randn(K), dim=-1)
    log_g, beta = -torch.rand(2, T, 2, 1), largest * torch.rand(2, T, 2, 1)
    return [q, k, v, log_g, beta, torch.randn(2, 2, K, V)]


def assert_is_the_equation(given: list[Tensor], document: Tensor | None = None, **kwargs) -> None:
    """Outputs, final states and gradients of all six inputs."""
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


@pytest.mark.parametrize("correlation", [0.5, 0.9, 0.999])
def test_correlated_keys_and_large_beta(correlation):
    given = inputs(200, correlation)
    given[4] = torch.full_like(given[4], 2.0)
    assert_is_the_equation(given)


@pytest.mark.parametrize("chunk", [1, 16, 30])
def test_any_chunk_size_and_documents(chunk):
    document = torch.zeros(2, 90, dtype=torch.long)
    document[0, [1, 16, 30, 31, 64]] = 1
    document[1, 45] = 1
    assert_is_the_equation(inputs(90, K=8, V=12), document.cumsum(1), chunk=chunk)


@pytest.mark.parametrize("log_decay", [0.0, -8.0, -20.0, -1e4])
def test_strong_decay(log_decay):
    given = inputs(130)
    given[3][:, ::7] = log_decay
    assert_is_the_equation(given)


def test_steps_go_on_from_chunks():
    *given, state = inputs(40)
    whole, last = gated_delta(*given, state)
    first, state = gated_delta(*(x[:, :25] for x in given), state)
    outputs = [first]
    for t in range(25, 40):
        output, state = step(*(x[:, [t]] for x in given), state)
        outputs.append(output)
    assert_close(torch.cat(outputs, 1), whole)
    assert_close(state, last)


def test_without_erasing_it_only_decays_and_writes():
    q, k, v, log_g, beta, state = inputs(50)
    output, _ = gated_delta(q, k, v, log_g, torch.zeros_like(beta), state)
    truth, _ = gated_linear(q, torch.zeros_like(k), v, log_g, state)
    assert_close(output, truth)


def test_parity_over_5000_steps():
    """With beta = 2 a key reflects the state: one number carries the parity of all bits so far, exactly."""
    bits = torch.randint(0, 2, (1, 5000))
    ones = torch.ones(1, 5000, 1, 1)
    beta = 2.0 * bits[:, :, None, None]
    output, state = gated_delta(ones, ones, 0 * ones, 0 * ones, beta, torch.ones(1, 1, 1, 1))
    parity = 1 - 2 * (bits.cumsum(1) % 2)
    assert torch.equal(output.flatten(), parity.float().flatten())
    assert state.item() == parity[0, -1]
