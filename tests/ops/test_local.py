"""Windows and sinks in blocks against the whole score matrix."""

import pytest
import torch
from tiny import assert_close
from torch import Tensor

from linearize.ops.local import NEVER, Past, Scoring, Sinks, local_attention, reference

B, KV, GROUPS, D, V = 2, 2, 3, 8, 6
SCALE = 0.7
PLAIN = Scoring(SCALE)


def inputs(T: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, T, KV * GROUPS, D), torch.randn(B, T, KV, D), torch.randn(B, T, KV, V)


def sinks_of(time, document=None, q: Tensor | None = None) -> Sinks:
    """Sinks at the given times, the same in every row if there is one list of them."""
    time = torch.as_tensor(time, dtype=torch.long).expand(B, -1)
    document = None if document is None else torch.as_tensor(document).expand(B, -1)
    M = time.shape[1]
    return Sinks(torch.randn(B, M, KV, D), torch.randn(B, M, KV, V), time, document, q)


def past_of(window: int, valid: Tensor | None = None) -> Past:
    valid = torch.ones(B, window, dtype=torch.bool) if valid is None else valid
    return Past(torch.randn(B, window, KV, D), torch.randn(B, window, KV, V), valid)


def padded_left(*amounts: int, length: int) -> Tensor:
    return torch.arange(length) >= torch.tensor(amounts)[:, None]


def assert_is_the_equation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sinks: Sinks,
    past: Past | None = None,
    scoring: Scoring = PLAIN,
    **kwargs,
) -> None:
    """Output and the gradient of every tensor; a padded query's output means nothing, and is only finite."""
    tensors = [q, k, v, sinks.k, sinks.v]
    tensors += [] if sinks.q is None else [sinks.q]
    tensors += [] if past is None else [past.k, past.v]
    tensors += [] if scoring.null_logits is None else [scoring.null_logits]
    valid = kwargs.get("valid")
    weight, gradients = torch.randn(B, q.shape[1], KV * GROUPS, V), []
    if valid is not None:
        weight = weight * valid[:, :, None, None]
    outputs = []
    for function, dtype in ((local_attention, torch.float32), (reference, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        rest = iter(leaves[5:])
        own = sinks._replace(k=leaves[3], v=leaves[4], q=None if sinks.q is None else next(rest))
        before = None if past is None else past._replace(k=next(rest), v=next(rest))
        rule = scoring if scoring.null_logits is None else scoring._replace(null_logits=next(rest))
        output, normalizer = function(*leaves[:3], window, rule, own, before, **kwargs)
        assert torch.isfinite(output).all()
        loss = (output * weight).sum()
        if normalizer is not None and scoring.normalizer:
            loss = loss + (normalizer * weight[..., 0]).sum()
        loss.backward()
        outputs.append(output.detach() * (weight != 0))
        gradients.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    assert_close(*outputs)
    for gradient, expected in zip(*gradients, strict=True):
        assert_close(gradient, expected)


@pytest.mark.parametrize("T", [1, 29])
def test_the_normalizer(T):
    assert_is_the_equation(*inputs(T), 8, sinks_of(range(2)), scoring=Scoring(SCALE, normalizer=True))
    assert_is_the_equation(*inputs(T), 8, sinks_of([-30, -2]), past_of(8), scoring=Scoring(SCALE, normalizer=True))


@pytest.mark.parametrize("normalizer", [False, True])
@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("T", [1, 5, 29])
def test_softcaps_and_null_logits(T, softcap, null, normalizer):
    null_logits = 2 * torch.randn(KV * GROUPS) if null else None
    scoring = Scoring(SCALE, normalizer, softcap, null_logits)
    assert_is_the_equation(*inputs(T), 8, sinks_of(range(2)), scoring=scoring)
    valid = torch.ones(B, 8, dtype=torch.bool)
    valid[0, :3] = False
    before = past_of(8, valid)
    assert_is_the_equation(*inputs(T), 8, sinks_of([[-9, NEVER], [-30, -2]]), before, scoring=scoring)
    q, k, v = inputs(T)
    assert_is_the_equation(q, k, v, 8, sinks_of([-30, -2], q=torch.randn_like(q)), past_of(8), scoring=scoring)
    assert_is_the_equation(q, k, v, 3, sinks_of(range(4)), scoring=scoring, valid=padded_left(0, T // 3, length=T))


def test_softcaps_and_null_logits_are_their_equations():
    """What one query over one key gives can be written down."""
    q, k, v = (torch.full((B, 1, heads, 1), 2.0) for heads in (KV * GROUPS, KV, KV))
    null_logits = torch.linspace(-1, 2, KV * GROUPS)
    output, normalizer = local_attention(
        q,
        k,
        v,
        1,
        Scoring(0.5, True, 1.5, null_logits),
        sinks_of([])._replace(k=torch.zeros(B, 0, KV, 1), v=torch.zeros(B, 0, KV, 1)),
    )
    score = 1.5 * torch.tanh(torch.tensor(2 / 1.5))
    expected = 2 * score.exp() / (score.exp() + null_logits.exp())
    assert_close(output[0, 0, :, 0], expected)
    assert_close(normalizer[0, 0], (score.exp() + null_logits.exp()).log())


@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("T", [1, 3, 29])
def test_softplus_with_reweighting(T, power):
    scoring = Scoring(SCALE, power=power)
    q, k, v = inputs(T)
    assert_is_the_equation(q, k, v, 8, sinks_of(range(2)), scoring=scoring)
    assert_is_the_equation(q, k, v, 8, sinks_of([-30, -2]), past_of(8), scoring=scoring)
    assert_is_the_equation(q, k, v, 8, sinks_of(range(2), q=torch.randn_like(q)), scoring=scoring)


def test_equal_scores_are_not_reweighted_away():
    q, k, v = inputs(20)
    output, _ = local_attention(q, k[:, :1].expand_as(k), v, 8, Scoring(SCALE, power=3), sinks_of([]))
    assert_close(output[:, 7, 0], v[:, :8, 0].mean(1))


@pytest.mark.parametrize("T", [1, 5, 8, 29])
@pytest.mark.parametrize("block", [1, 3, 8])
def test_blocks_of_tokens(block, T):
    """Rows whose blocks begin at different times, after a past and without one."""
    t = torch.arange(T)
    begins = torch.stack([t - t % block, t - (t + 2) % block])
    assert_is_the_equation(*inputs(T), block, sinks_of(range(2)), first=begins)
    assert_is_the_equation(*inputs(T), block, sinks_of([-30, -2]), past_of(block), first=begins)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("T", [1, 5, 8, 16, 29])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_blocks_are_the_whole_matrix(window, T, sinks):
    assert_is_the_equation(*inputs(T), window, sinks_of(range(sinks)))


@pytest.mark.parametrize("T", [1, 5, 8, 29])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_after_a_past(window, T):
    valid = torch.ones(B, window, dtype=torch.bool)
    valid[0, : window // 2] = False
    assert_is_the_equation(
        *inputs(T), window, sinks_of([[-9, -2, 1, NEVER], [-50, -49, -8, -1]]), past_of(window, valid)
    )


@pytest.mark.parametrize("T", [1, 29])
def test_clamped_sink_queries(T):
    q, k, v = inputs(T)
    assert_is_the_equation(q, k, v, 8, sinks_of(range(4), q=torch.randn_like(q)))
    assert_is_the_equation(q, k, v, 8, sinks_of(range(-20, -16), q=torch.randn_like(q)), past_of(8))


@pytest.mark.parametrize("window", [1, 3, 8, 40])
def test_padding_is_not_seen(window):
    valid = padded_left(0, 11, length=29)
    assert_is_the_equation(*inputs(29), window, sinks_of([[0, 1, 2, 3], [11, 12, 13, 14]]), valid=valid)


def test_padding_after_a_past():
    assert_is_the_equation(*inputs(9), 4, sinks_of([[-6], [NEVER]]), past_of(4), valid=padded_left(0, 3, length=9))


@pytest.mark.parametrize("window", [1, 3, 8])
def test_documents_do_not_see_each_other(window):
    document = torch.zeros(B, 29, dtype=torch.long)
    document[0, 1:], document[0, 16:], document[1, 8:] = 1, 2, 1
    time = [[0, NEVER, 1, 2, 16, 17], [0, 1, 8, 9, NEVER, NEVER]]
    sinks = sinks_of(time, document=[[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]])
    assert_is_the_equation(*inputs(29), window, sinks, document=document)


@pytest.mark.parametrize("T", [6, 20])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_exactly_the_window_is_seen(window, T):
    """The last query sees the key at distance window - 1 and not the one at distance window."""
    q, k, v = inputs(T)
    empty = sinks_of([])
    before = local_attention(q, k, v, window, PLAIN, empty)[0]

    def moved(distance: int) -> bool:
        other_k, other_v = k.clone(), v.clone()
        other_k[:, -1 - distance] += 1
        other_v[:, -1 - distance] += 1
        return not torch.equal(local_attention(q, other_k, other_v, window, PLAIN, empty)[0][:, -1], before[:, -1])

    assert [moved(distance) for distance in range(T)] == [distance < window for distance in range(T)]


def test_a_sink_is_seen_once_it_has_left_the_window():
    q, k, v = inputs(6)
    one = sinks_of([1])
    other = one._replace(v=one.v + 1)
    changed = local_attention(q, k, v, 3, PLAIN, one)[0] != local_attention(q, k, v, 3, PLAIN, other)[0]
    assert changed.all(-1).all(-1).all(0).tolist() == [False, False, False, False, True, True]


def test_a_sink_that_is_not_there_is_never_seen():
    q, k, v = inputs(20)
    expected = local_attention(q, k, v, 3, PLAIN, sinks_of([]))[0]
    assert_close(local_attention(q, k, v, 3, PLAIN, sinks_of([NEVER, NEVER]))[0], expected)


def test_bfloat16():
    tensors = [x.bfloat16() for x in inputs(20)]
    sinks = sinks_of(range(2))
    sinks = sinks._replace(k=sinks.k.bfloat16(), v=sinks.v.bfloat16())
    output, _ = local_attention(*tensors, 8, PLAIN, sinks)
    assert output.dtype == torch.bfloat16
    assert_close(output, reference(*tensors, 8, PLAIN, sinks)[0], 1e-2)
