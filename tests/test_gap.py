"""Tokens by what was said before."""

import numpy as np
import pytest
import torch

from benchmarks.gap import KINDS, kinds_of, sums


def test_kinds():
    ids = [1, 2, 3, 4, 5, 6, 1, 2, 3, 9, 2, 3, 1, 7]
    found = ["new"] * 5 + ["one", "two", "three", "new", "window", "near", "one", "new"]
    assert kinds_of(ids, 4).tolist() == found


def test_the_window_ends_where_the_query_before_the_token_sees_no_further():
    for distance, kind in ((4, "window"), (5, "one")):
        assert kinds_of([1, *range(2, distance + 1), 1], 4)[-1] == kind


def test_sums_are_of_late_tokens_and_leave_none_out():
    loss = torch.rand(3, 40)
    kinds = np.array(list(KINDS))[torch.randint(len(KINDS), (3, 20)).numpy()]
    found = sums(loss, kinds)
    for row in range(3):
        assert sum(x[row] for x in found.values()) == pytest.approx(loss[row, 20:].sum().item(), abs=1e-3)
