"""The late gap: what is averaged, what is resampled, and what is refused."""

import math

import numpy as np
import pytest
import tiny
import torch

from linearize import LinearizeError
from linearize.evaluate.late_gap import closed, late_gap, late_losses, pooled, texts

RANDOM = np.random.default_rng(0)
HARD = RANDOM.normal(3, 0.5, 40)  # articles differ more than models do
ARTICLES = [number // 2 + 1 for number in range(40)]  # two sequences of each


def losses(gap: float, noise: float = 0.01, seed: int = 0) -> list[float]:
    return (HARD + gap + np.random.default_rng(seed).normal(0, noise, len(HARD))).tolist()


def test_the_share_and_its_interval():
    found = closed([losses(0.2, seed=1)], [losses(0.15, seed=2)], [losses(0.0, seed=3)], ARTICLES)
    assert found.low < 0.25 < found.high
    assert found.value == pytest.approx(0.25, abs=0.03)
    assert found.by_seed == pytest.approx([found.value])
    assert found.high - found.low < 0.15  # paired: how hard an article is does not count


def test_the_interval_covers_the_truth_as_often_as_it_says():
    hits = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        base, ours = (0.2 + random.normal(0, 0.1, 40), 0.15 + random.normal(0, 0.1, 40))
        found = closed([(HARD + base).tolist()], [(HARD + ours).tolist()], [HARD.tolist()], list(range(40)))
        hits += found.low <= 0.25 <= found.high
    assert 88 <= hits <= 99


def test_whole_articles_are_resampled():
    """Copies of the same sequence in an article tell nothing new, so they must not make the interval narrower."""
    base, ours = losses(0.2, 0.1, 1), losses(0.15, 0.1, 2)
    once = closed([base], [ours], [HARD.tolist()], list(range(40)))
    copies = [[x for x in row for _ in range(5)] for row in (base, ours, HARD.tolist())]
    again = closed([copies[0]], [copies[1]], [copies[2]], [number for number in range(40) for _ in range(5)])
    assert (again.value, again.low, again.high) == pytest.approx((once.value, once.low, once.high))


def test_seeds_are_averaged_and_told_apart():
    base, ours = [losses(0.2, seed=1), losses(0.2, seed=2)], [losses(0.1, seed=3), losses(0.16, seed=4)]
    found = closed(base, ours, [HARD.tolist()], ARTICLES)
    assert found.by_seed == pytest.approx([0.5, 0.2], abs=0.03)
    assert found.value == pytest.approx(np.mean(found.by_seed), abs=0.01)


@pytest.mark.parametrize(("base", "ours"), [(0.0, 0.1), (-0.1, 0.0), (math.nan, 0.1), (0.2, math.inf)])
def test_no_gap_no_share(base, ours):
    assert closed([(HARD + base).tolist()], [(HARD + ours).tolist()], [HARD.tolist()], ARTICLES) is None


def test_an_interval_without_an_end():
    """Where some resamples have no gap at all."""
    gap = np.where(np.arange(40) < 4, 2.0, -0.05)
    found = closed([(HARD + gap).tolist()], [HARD.tolist()], [HARD.tolist()], list(range(40)))
    assert found.value == pytest.approx(1)
    assert not math.isnan(found.low)
    assert not math.isnan(found.high)


def test_pooled_reports_are_seeds():
    def gap(seed: int):
        found = {"teacher": [HARD.tolist()], "window_only": [losses(0.2, seed=seed)], "converted": [losses(0.1)]}
        return late_gap(64, ARTICLES, found)

    both = pooled([gap(1), gap(2)])
    assert len(both.losses["converted"]) == 2
    assert both.closed["window_only"].by_seed == [gap(s).closed["window_only"].value for s in (1, 2)]
    with pytest.raises(LinearizeError, match="cannot be pooled"):
        pooled([gap(1), gap(2).model_copy(update={"length": 128})])


def test_texts_know_their_articles():
    documents = [np.arange(length) for length in (70, 30, 130)]
    found = texts(documents, [4, 7, 9], 60, 10)
    assert found.articles == [4, 9, 9]
    assert found.ids[:, 0].tolist() == [0, 0, 60]
    assert texts(documents, [4, 7, 9], 60, 2).articles == [4, 9]
    assert texts(documents, [4, 7, 9], 131, 10) is None


def test_late_losses_are_the_model_s():
    model, ids = tiny.tiny(), tiny.ids(2, 40)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].log_softmax(-1)
    expected = -logits.gather(2, ids[:, 1:, None])[..., 0][:, 20:].mean(1)
    assert late_losses(model, ids) == pytest.approx(expected.tolist(), rel=1e-5)


def test_of_one_article_nothing_is_known_of_others():
    found = closed([[3.2, 3.3]], [[3.15, 3.2]], [[3.1, 3.1]], [21, 21])
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == (-math.inf, math.inf)
