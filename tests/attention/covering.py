"""Choose cases of which every two values meet, in place of all combinations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product


def covering(*axes: Sequence, full: int = 2) -> list[tuple]:
    """Return some of the combinations of the axes: all those of the first `full` axes, and every pair of
    values of two axes. The list is always the same.
    """
    parts = [tuple(range(min(full, len(axes))))] + list(combinations(range(len(axes)), 2))

    def shows(case: tuple[int, ...]) -> set[tuple]:
        return {(part, tuple(case[i] for i in part)) for part in parts}

    candidates = {case: shows(case) for case in product(*(range(len(axis)) for axis in axes))}
    missing, chosen = set().union(*candidates.values()), []
    while missing:
        best = max(candidates, key=lambda case: len(candidates[case] & missing))  # of equal ones the first
        chosen.append(best)
        missing -= candidates.pop(best)
    return [tuple(axis[i] for axis, i in zip(axes, case)) for case in sorted(chosen)]
