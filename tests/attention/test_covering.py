"""Test covering.py: no pair is missing, and there are not many more cases than needed."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from covering import covering

AXES = ([0, 1], ["a", "b", "c"], [None, 2.0], range(4))


@pytest.mark.parametrize("full", range(5))
def test_every_pair_is_there(full):
    cases = covering(*AXES, full=full)
    assert len(set(cases)) == len(cases) and set(cases) <= set(product(*AXES))
    for i, j in combinations(range(len(AXES)), 2):
        assert {(case[i], case[j]) for case in cases} == set(product(AXES[i], AXES[j]))
    assert {case[:full] for case in cases} == set(product(*AXES[:full]))


@pytest.mark.parametrize("axes, full, most", [
    ((range(2), range(3)), 2, 6), ((range(3),), 2, 3), ((), 2, 1), ((range(2),) * 8, 2, 8),
    (AXES, 2, 14), (AXES, 3, 14), (AXES, 4, 48), ((range(2), range(2), range(2), range(3)), 3, 8),
])  # fmt: skip
def test_there_are_few(axes, full, most):
    assert len(covering(*axes, full=full)) <= most
