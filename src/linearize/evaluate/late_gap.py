"""The late gap at several lengths: every model's late loss on the same held-out texts, and what of it is closed."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from linearize.errors import LinearizeError
from linearize.evaluate.perplexity import score
from linearize.measures import Interval, LateGap
from linearize.train.sequences import heldout_windows

BASELINES = ("window_only", "window_equal_memory")
RESAMPLED = 4000  # bootstrap samples


class Texts(NamedTuple):
    """Held-out sequences of one length, and the article of each, counted from 1."""

    ids: Int[Tensor, "N T"]
    articles: list[int]


def texts(documents: Sequence[np.ndarray], numbers: Sequence[int], length: int, most: int) -> Texts | None:
    """Up to `most` sequences of `length` tokens: the first of every document, then the second ones, and so on.

    `numbers` are the documents' own, for `Texts.articles`. None where no document is as long as that.
    """
    if max(map(len, documents), default=0) < length:
        return None
    ids, places = heldout_windows(documents, length, most)
    return Texts(ids, [numbers[place] for place in places])


def late_losses(model: PreTrainedModel, ids: Int[Tensor, "N T"], label: str = "") -> list[float]:
    """The mean loss at positions T / 2 and up of each sequence, in nats."""
    loss = score(model, ids, f"{label}, {ids.shape[1]} tokens").loss
    return loss[:, ids.shape[1] // 2 :].double().mean(1).tolist()


def late_gap(length: int, articles: list[int], losses: Mapping[str, list[list[float]]]) -> LateGap:
    """What `converted` closes of the gap between each baseline in `losses` and the teacher."""
    gap = LateGap(length=length, articles=articles, losses=dict(losses))
    if "converted" in losses:
        gap.closed = {
            name: found
            for name in BASELINES
            if name in losses
            and (found := closed(losses[name], losses["converted"], losses["teacher"], articles)) is not None
        }
    return gap


def closed(
    baseline: list[list[float]], ours: list[list[float]], teacher: list[list[float]], articles: Sequence[int]
) -> Interval | None:
    """(baseline - ours) / (baseline - teacher), of mean losses, with its 95 % bootstrap interval.

    Losses are those of each training seed on each sequence; seeds are averaged. Whole articles are resampled, and all
    models together, since sequences of one article are alike and models err in the same places: of one article alone
    nothing is known of others, and the interval has no ends. None where the baseline is no worse than the teacher, or a
    loss is not finite.
    """
    base, mine = np.array(baseline, dtype=float), np.array(ours, dtype=float)
    best = np.array(teacher, dtype=float).mean(0)
    gain, gap = base.mean(0) - mine.mean(0), base.mean(0) - best
    if not (np.isfinite(gain).all() and np.isfinite(gap).all()) or gap.sum() <= 0:
        return None
    _, owner = np.unique(np.asarray(articles), return_inverse=True)
    sums = np.stack([np.bincount(owner, weights=values) for values in (gain, gap)])
    drawn = np.random.default_rng(0).integers(sums.shape[1], size=(RESAMPLED, sums.shape[1]))
    gains, gaps = sums[:, drawn].sum(-1)
    shares = np.copysign(np.inf, gains)  # of a sample without a gap there is no share: the interval has no end there
    np.divide(gains, gaps, out=shares, where=gaps > 0)
    low, high = np.percentile(shares, [2.5, 97.5], method="nearest") if sums.shape[1] > 1 else (-np.inf, np.inf)
    seeds = [float((b - m).sum() / (b - best).sum()) for b, m in zip(base, mine, strict=True)]
    return Interval(value=float(gain.sum() / gap.sum()), low=float(low), high=float(high), by_seed=seeds)


def pooled(gaps: Sequence[LateGap]) -> LateGap:
    """The same models of several training seeds as one; LinearizeError where they were not given the same texts."""
    first = gaps[0]
    for other in gaps[1:]:
        if (other.length, other.articles) != (first.length, first.articles):
            raise LinearizeError(
                f"late losses of {other.length} tokens on articles {sorted(set(other.articles))} cannot be pooled with "
                f"{first.length} tokens on {sorted(set(first.articles))}; evaluate all seeds with the same settings"
            )
    names = [name for name in first.losses if all(name in gap.losses for gap in gaps)]
    losses = {name: [row for gap in gaps for row in gap.losses[name]] for name in names}
    return late_gap(first.length, first.articles, losses)
