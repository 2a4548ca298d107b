"""Choose which of upstream's million test cases to run, by the seed and the case's name alone.

Cases are ranked by sha256(seed, id), so a seed always gives the same sample, a larger sample holds the
smaller one, and a new parameter value upstream does not shuffle the rest. The sample is stratified: every
test function gets the same number of cases with use_softmax True and with False, as far as it has them.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Index = tuple[int, ...]
SOFTMAX = "use_softmax"


@dataclass(frozen=True, slots=True)
class Axis:
    """One parametrization of a test function: its parameter names, and pytest's label for each value."""

    names: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One test case: ``id`` as pytest writes it, ``index`` into each axis of the function."""

    function: str
    id: str
    index: Index
    use_softmax: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """Leave out the cases for which ``applies(function, parameters)`` holds. ``parameters`` are the labels of
    those parameters ``about`` that the function has; ``text`` describes the cases in words.
    """

    text: str
    about: frozenset[str]
    applies: Callable[[str, Mapping[str, str]], bool]


@dataclass(frozen=True, slots=True)
class Sample:
    """The chosen cases in order of rank, the number of eligible cases, and the number that each rule left
    out, by its text.
    """

    cases: tuple[Case, ...]
    eligible: int
    left_out: Mapping[str, int]


def _parameters(axes: Sequence[Axis], index: Index) -> dict[str, str]:
    """Map parameter name -> label. pytest joins the values of a label of several parameters by "-"."""
    found: dict[str, str] = {}
    for axis, i in zip(axes, index):
        values = axis.labels[i].split("-") if len(axis.names) > 1 else [axis.labels[i]]
        found.update(zip(axis.names, values))
    return found


def case_id(function: str, axes: Sequence[Axis], index: Index) -> str:
    """The id that pytest gives the case: the labels in order, joined by "-"."""
    return f"{function}[{'-'.join(axis.labels[i] for axis, i in zip(axes, index))}]" if axes else function


def eligible(
    function: str, axes: Sequence[Axis], rules: Sequence[Rule] = (), left_out: Counter[str] | None = None
) -> Iterator[Index]:
    """Yield the index of every case of ``function`` to which none of ``rules`` applies; count the others in
    ``left_out``.

    A rule is evaluated once for each combination of its parameters, so that a million cases take seconds.
    """
    looked_at = [[a for a, axis in enumerate(axes) if rule.about & set(axis.names)] for rule in rules]
    verdicts: list[dict[Index, bool]] = [{} for _ in rules]
    for index in itertools.product(*(range(len(axis.labels)) for axis in axes)):
        for rule, places, known in zip(rules, looked_at, verdicts):
            key = tuple([index[a] for a in places])
            if key not in known:
                known[key] = rule.applies(function, _parameters([axes[a] for a in places], key))
            if known[key]:
                if left_out is not None:
                    left_out[rule.text] += 1
                break
        else:
            yield index


def rank(seed: int, case_id: str) -> bytes:
    return hashlib.sha256(f"{seed} {case_id}".encode()).digest()


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """Distribute ``count`` over strata of the given sizes as evenly as they allow."""
    shares = [0] * len(sizes)
    left = min(count, sum(sizes))
    while left:
        open_strata = [i for i, size in enumerate(sizes) if shares[i] < size]
        each = max(1, left // len(open_strata))
        for i in open_strata:
            dealt = min(each, sizes[i] - shares[i], left)
            shares[i] += dealt
            left -= dealt
    return shares


def choose(
    functions: Mapping[str, Sequence[Axis]],
    seed: int,
    count: int | None,
    fraction: float,
    rules: Sequence[Rule] = (),
) -> Sample:
    """Choose from the cases that ``rules`` leave: ``count`` cases, or ``fraction`` (0 to 1) of each stratum
    if ``count`` is None.
    """
    strata: dict[tuple[str, bool], list[tuple[bytes, Index]]] = {}
    left_out: Counter[str] = Counter()
    for function, axes in functions.items():
        # A test that does not mention use_softmax uses its default, True.
        off = {
            (a, i)
            for a, axis in enumerate(axes)
            if axis.names == (SOFTMAX,)
            for i, v in enumerate(axis.labels)
            if v == "False"
        }
        ((switch, value),) = off or {(0, -1)}
        for index in eligible(function, axes, rules, left_out):
            stratum = strata.setdefault((function, not index or index[switch] != value), [])
            stratum.append((rank(seed, case_id(function, axes, index)), index))
    sizes = [len(s) for s in strata.values()]
    shares = _shares(sizes, count) if count is not None else [math.ceil(n * fraction) for n in sizes]
    chosen = [
        (key, Case(function, case_id(function, functions[function], index), index, use_softmax))
        for ((function, use_softmax), stratum), share in zip(strata.items(), shares)
        for key, index in heapq.nsmallest(share, stratum)
    ]
    chosen.sort(key=lambda entry: entry[0])
    return Sample(tuple(case for _, case in chosen), sum(sizes), left_out)
