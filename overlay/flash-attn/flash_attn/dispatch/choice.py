"""The rule by which a call gets its backend."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Optional

from ..call import Call
from ..linear import choice as linear
from . import fa2, fa4

ENVIRONMENT = "FLASH_ATTENTION_NOSOFTMAX_BACKEND"


def _cpu_obstacle(call: Call) -> Optional[str]:
    return None if call.q.device.type == "cpu" else f"q is on {call.q.device}, it takes CPU tensors"


def _no_disadvantage(call: Call) -> Optional[str]:
    return None


@dataclass(frozen=True)
class _Backend:
    algorithm: str
    obstacle: Callable[[Call], Optional[str]]  # why the backend can't run a call; None if it can
    disadvantage: Callable[[Call], Optional[str]] = _no_disadvantage  # why it is passed over though it can, if not forced


# The order is that of preference.
_BACKENDS = {
    "linear": _Backend("linear", linear.obstacle, linear.disadvantage),
    "fa4": _Backend("quadratic", fa4.obstacle, fa4.disadvantage),
    "fa2": _Backend("quadratic", fa2.obstacle),
    "cpu": _Backend("quadratic", _cpu_obstacle),
}
BACKENDS = ("auto", *_BACKENDS)
_NAMES = {
    algorithm: [name for name, backend in _BACKENDS.items() if algorithm in ("auto", backend.algorithm)]
    for algorithm in linear.ALGORITHMS
}


class Choice(NamedTuple):
    """What runs a call: the backend and its algorithm, both None if no backend can.

    passed_over: each backend that was considered before and the reason why it does not run the call. forced: the argument or
    the environment variable, with its value, that left one backend to choose from; None without. str() says all of it.
    """

    backend: Optional[str]
    algorithm: Optional[str]
    passed_over: dict[str, str]
    forced: Optional[str] = None

    def __str__(self) -> str:
        first = "no backend can run this call" if self.backend is None else f"{self.backend}, {self.algorithm} algorithm"
        if self.forced is not None:
            first += f", forced by {self.forced}"
        return "\n".join([first, *(f"  not {name}: {reason}" for name, reason in self.passed_over.items())])

    def refusal(self) -> Exception:
        """The error to raise if backend is None."""
        if self.forced is None:
            return NotImplementedError(str(self))
        (reason,) = self.passed_over.values()
        return ValueError(f"{self.forced} is not possible: {reason}; leave it out, and the call gets a backend that takes it")


def choose(call: Call, algorithm: str = "auto", backend: str = "auto") -> Choice:
    """The backend for a call; its score function must have been checked by score_function.resolve.

    Raises ValueError for an algorithm or a backend that does not exist, or if the two contradict each other.
    """
    names, forced = _candidates(algorithm, backend, call.use_softmax)
    passed_over = {}
    for name in names:
        reason = _BACKENDS[name].obstacle(call)
        if reason is None and forced is None:
            reason = _BACKENDS[name].disadvantage(call)
        if reason is None:
            return Choice(name, _BACKENDS[name].algorithm, passed_over, forced)
        passed_over[name] = reason
    return Choice(None, None, passed_over, forced)


def _candidates(algorithm: str, backend: str, use_softmax: bool) -> tuple[list[str], Optional[str]]:
    """The backends to consider, and what forces the choice if that is one alone."""
    if algorithm not in linear.ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} is not one of {linear.ALGORITHMS}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {BACKENDS}")
    names = _NAMES[algorithm]
    if backend != "auto":
        if backend not in names:
            raise ValueError(
                f'backend="{backend}" is {_BACKENDS[backend].algorithm}, but algorithm="{algorithm}": leave one of them out'
            )
        return [backend], f'backend="{backend}"'
    if algorithm == "linear":
        return names, 'algorithm="linear"'
    wanted = "auto" if use_softmax else _from_environment()
    if wanted in names:  # an argument that contradicts the environment wins
        return [wanted], f"{ENVIRONMENT}={wanted}"
    return names, None


def _from_environment() -> str:
    value = os.environ.get(ENVIRONMENT, "auto")
    if value not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT}={value} is not one of {BACKENDS}")
    return value
