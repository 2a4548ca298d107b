"""Choose the backend of a call: the requested one, or the first without an obstacle or a disadvantage."""

import os
from types import ModuleType
from typing import NamedTuple, Optional

from .backends import cpu, fa2, fa4, linear
from .call import Call

ENVIRONMENT = "FLASH_ATTENTION_NOSOFTMAX_BACKEND"
ALGORITHMS = ("auto", "quadratic", "linear")


class _Backend(NamedTuple):
    """module: has obstacle, disadvantage, forward and backward. device_types: the devices whose tensors it
    takes.
    """

    module: ModuleType
    algorithm: str
    device_types: tuple


# In order of preference.
_BACKENDS = {
    "linear": _Backend(linear, "linear", ("cpu", "cuda")),
    "fa4": _Backend(fa4, "quadratic", ("cuda",)),
    "fa2": _Backend(fa2, "quadratic", ("cuda",)),
    "cpu": _Backend(cpu, "quadratic", ("cpu",)),
}
BACKENDS = ("auto", *_BACKENDS)
MODULES = {name: backend.module for name, backend in _BACKENDS.items()}
_NAMES = {
    algorithm: [name for name, backend in _BACKENDS.items() if algorithm in ("auto", backend.algorithm)]
    for algorithm in ALGORITHMS
}


class Choice(NamedTuple):
    """The backend and the algorithm that run a call.

    passed_over: each backend considered earlier, with the reason why it does not run the call. forced: the
    argument or environment variable, with its value, that left a single backend, or None. str() describes the
    whole choice.
    """

    backend: Optional[str]
    algorithm: Optional[str]
    passed_over: dict
    forced: Optional[str] = None

    def __str__(self) -> str:
        first = (
            "no backend can run this call"
            if self.backend is None
            else f"{self.backend}, {self.algorithm} algorithm"
        )
        if self.forced is not None:
            first += f", forced by {self.forced}"
        return "\n".join([first, *(f"  not {name}: {reason}" for name, reason in self.passed_over.items())])


class Wanted(NamedTuple):
    """The backends to consider, and the setting that forces the choice if it leaves only one."""

    names: list
    forced: Optional[str] = None


try:
    # os.environ.get encodes the name and raises an error inside, which takes 1 µs of a call's time.
    _VARIABLES, _NAME = os.environ._data, os.environ.encodekey(ENVIRONMENT)
except AttributeError:
    _VARIABLES, _NAME = os.environ, ENVIRONMENT


def choice_of_environment() -> Optional[str]:
    """Return what the environment variable says, or None."""
    return os.environ[ENVIRONMENT] if _NAME in _VARIABLES else None


def wanted(algorithm: str, backend: str) -> Wanted:
    """Return the backends that the arguments and the environment allow. Raises ValueError if a name does not
    exist or the arguments contradict each other.
    """
    if algorithm == backend == "auto" and not choice_of_environment():
        return _ANY
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} is not one of {ALGORITHMS}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {BACKENDS}")
    names = _NAMES[algorithm]
    if backend != "auto":
        if backend not in names:
            raise ValueError(
                f'backend="{backend}" is {_BACKENDS[backend].algorithm}, but algorithm="{algorithm}": leave '
                "one of them out"
            )
        return Wanted([backend], f'backend="{backend}"')
    if algorithm == "linear":
        return Wanted(names, 'algorithm="linear"')
    named = choice_of_environment() or "auto"
    if named not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT}={named} is not one of {BACKENDS}")
    if named in names:  # an argument that contradicts the environment wins
        return Wanted([named], f"{ENVIRONMENT}={named}")
    return Wanted(names)


_ANY = Wanted(_NAMES["auto"])


def choose(call: Call, among: Wanted = _ANY) -> Choice:
    """Choose the backend for a checked call.

    Raises ValueError if the requested backend can't run the call, NotImplementedError if none can.
    """
    passed_over: dict = {}
    device, forced = call.q.device, among.forced
    for name in among.names:
        backend = _BACKENDS[name]
        if device.type not in backend.device_types:
            reason = (
                f"q is on {device}, it takes {' and '.join(kind.upper() for kind in backend.device_types)} "
                "tensors"
            )
        else:
            reason = backend.module.obstacle(call)
            if reason is None and forced is None:
                reason = backend.module.disadvantage(call)
        if reason is None:
            return Choice(name, backend.algorithm, passed_over, forced)
        passed_over[name] = reason
    if forced is None:
        raise NotImplementedError(str(Choice(None, None, passed_over)))
    raise ValueError(
        f"{forced} is not possible: {reason}; leave it out, and the call gets a backend that takes it"
    )
