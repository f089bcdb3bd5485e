"""Third-order attention against its equation: forward, state and all gradients; its features against exp."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import assert_close
from torch import Tensor

from linearize.ops.kronecker import LEAST, kronecker, reference
from linearize.structures.kronecker import coefficients, monomials, projections

D = 3  # of projected queries and keys here


def features(*shape: int) -> Tensor:
    """Of random vectors of length 1."""
    return monomials(F.normalize(torch.randn(*shape, D), dim=-1))


def inputs(T: int, KV: int = 2, groups: int = 3, V: int = 8):
    """q, k, v and a state that seven tokens left."""
    q, v = features(2, T, KV * groups) * coefficients(D), torch.randn(2, T, KV, V)
    k = torch.cat([features(2, T, KV), features(2, T, KV)], dim=-1)
    if T == 7:
        return [q, k, v]
    before = inputs(7, KV, groups, V)
    return [q, k, v, reference(*before, torch.zeros(2, KV, q.shape[-1], V + 2))[1].float()]


def documents(T: int, starts: list[int]) -> Tensor:
    document = torch.zeros(T, dtype=torch.long)
    document[starts] = 1
    return document.cumsum(0)[None]


def assert_is_the_equation(given: list[Tensor], document: Tensor | None = None) -> None:
    """Outputs, final states and gradients of all four inputs."""
    ours = [x.clone().requires_grad_() for x in given]
    truth = [x.double().requires_grad_() for x in given]
    results, expected = kronecker(*ours, document), reference(*truth, document)
    weights = [torch.randn_like(x) for x in expected]
    for result, other in zip(results, expected, strict=True):
        assert_close(result, other)
    sum((w * x.double()).sum() for w, x in zip(weights, results, strict=True)).backward()
    sum((w * x).sum() for w, x in zip(weights, expected, strict=True)).backward()
    for x, other in zip(ours, truth, strict=True):
        assert_close(x.grad, other.grad)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 130])
def test_it_is_the_equation(T, groups):
    assert_is_the_equation(inputs(T, groups=groups))


@pytest.mark.parametrize("V", [1, 10, 16])  # 10: as many as features
def test_value_sizes(V):
    assert_is_the_equation(inputs(70, V=V))


def test_without_a_state():
    *given, state = inputs(70)
    for result, other in zip(kronecker(*given), reference(*given, torch.zeros_like(state)), strict=True):
        assert_close(result, other)


@pytest.mark.parametrize("starts", [[64], [63], [65], [64, 128], [1], [10, 11, 12], [129], [5, 70]], ids=str)
def test_documents_do_not_see_each_other(starts):
    assert_is_the_equation(inputs(130), torch.cat([documents(130, starts), documents(130, [100])]))


@pytest.mark.parametrize("splits", [[1], [64], [63, 64, 65], [7, 100], range(1, 130)], ids=str)
def test_any_split_gives_the_same(splits):
    *given, state = inputs(130)
    expected, last = kronecker(*given, state)
    parts = []
    for part in zip(*(x.tensor_split(list(splits), dim=1) for x in given), strict=True):
        output, state = kronecker(*part, state)
        parts.append(output)
    assert_close(torch.cat(parts, 1), expected)
    assert_close(state, last)


@pytest.mark.parametrize("T", [1, 70])
def test_bfloat16_in_bfloat16_out_and_an_fp32_state(T):
    given = inputs(T)
    rounded = [x.bfloat16() for x in given[:3]] + given[3:]
    output, state = kronecker(*rounded)
    assert output.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    expected, last = reference(*rounded)
    assert_close(output, expected, 4e-3)
    assert_close(state, last)


def test_it_is_a_mean_over_pairs_of_tokens():
    """By its definition, a weight for every triple."""
    q, k, v, _ = inputs(20, groups=1)
    k2, k3 = k.chunk(2, dim=-1)
    weights = torch.einsum("bthf,bihf,bjhf->bhtij", q, k2, k3)
    assert weights.min() >= 0.5 - 1e-6  # 1 + x + x²/2
    seen = torch.ones(20, 20).tril()
    weights = weights * seen[:, :, None] * seen[:, None, :]
    expected = torch.einsum("bhtij,bihv->bthv", weights, v) / weights.sum((-2, -1)).mT[..., None]
    assert_close(kronecker(q, k, v)[0], expected)


@pytest.mark.parametrize("scale", [2.0, 100.0])
def test_negative_weights_do_not_blow_up(scale):
    """Of degree 1 weights are 1 + x, and where x is large their sum is of either sign: it counts as LEAST a pair."""
    x = scale * torch.randn(3, 2, 90, 1, D)
    q, k2, k3 = (monomials(part, 1).requires_grad_() for part in x)
    v = torch.randn(2, 90, 1, 4)
    assert ((q * k2.cumsum(1) * k3.cumsum(1)).sum(-1) < 0).any()
    output, state = kronecker(q, torch.cat([k2, k3], dim=-1), v)
    assert torch.isfinite(output).all()
    bound = (1 + scale**3 * 100) / LEAST * v.abs().max()
    assert output.abs().max() <= bound
    output.square().sum().backward()
    assert all(torch.isfinite(part.grad).all() for part in (q, k2, k3))
    assert_close(state, reference(q, torch.cat([k2, k3], dim=-1), v, torch.zeros_like(state))[1])


def test_before_the_first_token_the_output_is_zero():
    q, k, v, _ = inputs(9)
    k[:, :4] = 0
    output, state = kronecker(q, k, v)
    assert torch.equal(output[:, :4], torch.zeros_like(output[:, :4]))
    alone, last = kronecker(q[:, 4:], k[:, 4:], v[:, 4:])
    assert_close(output[:, 4:], alone)
    assert_close(state, last)


@pytest.mark.parametrize(("size", "degree", "count"), [(8, 2, 45), (64, 2, 2145), (3, 4, 35), (3, 1, 4)])
def test_every_monomial_once(size, degree, count):
    primes = torch.tensor([p for p in range(2, 320) if all(p % n for n in range(2, p))][:size], dtype=torch.float64)
    values = monomials(primes, degree)
    assert len(set(values.tolist())) == len(values) == len(coefficients(size, degree)) == count
    assert values[0] == 1


def test_monomials_are_the_taylor_polynomial_of_the_exponential():
    a, b, c = (2 * torch.rand(40, D, dtype=torch.float64) - 1 for _ in range(3))
    x = torch.einsum("id,jd,kd->ijk", a, b, c)
    product = torch.einsum("f,if,jf,kf->ijk", coefficients(D, 4).double(), *(monomials(y, 4) for y in (a, b, c)))
    assert_close(product, sum(x**n / math.factorial(n) for n in range(5)), 1e-7)
    assert ((product - x.exp()).abs() <= x.abs() ** 5 / 120 * x.clamp(min=0).exp() + 1e-7).all()


def test_the_promised_error():
    """Third-order softmax attention over random entries within [-1, 1], D = 3, degree 4: 7e-5 on average."""
    a, b, c = (2 * torch.rand(40, D, dtype=torch.float64) - 1 for _ in range(3))
    v = torch.randn(40, 4, dtype=torch.float64)

    def attention(weights: Tensor) -> Tensor:
        return torch.einsum("ijk,jv->iv", weights, v) / weights.sum((1, 2))[:, None]

    product = torch.einsum("f,if,jf,kf->ijk", coefficients(D, 4).double(), *(monomials(y, 4) for y in (a, b, c)))
    truth = attention(torch.einsum("id,jd,kd->ijk", a, b, c).exp())
    assert (attention(product) - truth).abs().mean() <= 7e-5


def test_projections_are_made_anew_the_same():
    assert torch.equal(projections(16, 3), projections(16, 3))
    first, second = projections(16, 3)
    assert not torch.equal(first, second)
    assert not torch.equal(projections(16, 3), projections(16, 4))
