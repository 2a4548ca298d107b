"""Describe the score function of a registered name, and the form in which model.config keeps it."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Optional, Union

import torch
from flash_attn.nosoftmax.score import MINUS_LOG_N, resolve

CONFIG_KEY = "no_softmax"

Numbers = tuple[float, ...]


class ScoreFunction(NamedTuple):
    """The score function of all layers of a model: arguments of flash_attn_func that JSON can hold.

    sigmoid_bias, decay_slopes: a tuple has a number for each query head. n: a given number of keys, which
    "1/n", "1/sqrt(n)" and "-log n" then use in place of the keys in the call.
    """

    activation: str = "identity"
    sigmoid_bias: Union[float, str, Numbers] = 0.0
    normalization: Union[None, str, float] = None
    decay_slopes: Optional[Numbers] = None
    n: Optional[float] = None

    @property
    def saved(self) -> dict:
        """The value of model.config.no_softmax: equal for equal score functions, also after JSON."""
        given = {name: list(x) if isinstance(x, tuple) else x for name, x in self._asdict().items()}
        return {name: x for name, x in given.items() if name in _ALWAYS or x is not None}

    @property
    def counts_keys(self) -> str:
        """The argument whose value depends on the number of keys in a call, or ""."""
        if self.n is not None:
            return ""
        if self.normalization in _COUNTED:
            return f'normalization="{self.normalization}"'
        return 'sigmoid_bias="-log n"' if self.sigmoid_bias == MINUS_LOG_N else ""

    def options(self, device: torch.device) -> dict:
        """Return the keyword arguments of flash_attn's functions."""
        return _options(self, device)


_ALWAYS = ("activation", "sigmoid_bias", "normalization")
_COUNTED = {"1/n": lambda n: 1.0 / n, "1/sqrt(n)": lambda n: n**-0.5}


def checked(options: Mapping[str, Any]) -> ScoreFunction:
    """Check the arguments of a score function. Raises TypeError or ValueError, which name the argument."""
    unknown = sorted(options.keys() - set(ScoreFunction._fields))
    if unknown:
        raise TypeError(f"{unknown[0]} is no argument here: give {', '.join(ScoreFunction._fields)}")
    score = ScoreFunction(**{name: _numbers(name, x) for name, x in options.items()})
    by_head = isinstance(score.sigmoid_bias, tuple)
    resolve(False, score.activation, 0.0 if by_head else score.sigmoid_bias, score.normalization)
    if by_head and score.activation != "sigmoid":
        raise ValueError(f'sigmoid_bias={list(score.sigmoid_bias)} needs activation="sigmoid"')
    if score.decay_slopes is not None and not isinstance(score.decay_slopes, tuple):
        raise TypeError(f"decay_slopes={score.decay_slopes!r}: give a list with a number for each query head")
    if score.decay_slopes is not None and min(score.decay_slopes) < 0.0:
        raise ValueError(f"decay_slopes={list(score.decay_slopes)}: give numbers that are not negative")
    if score.n is not None:
        _check_n(score)
    return score


def _numbers(name: str, x: Any) -> Any:
    """Return a list or tensor of numbers as a tuple of finite floats, and anything else unchanged."""
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    if isinstance(x, str) or not isinstance(x, Sequence):
        return x
    if not x or not all(isinstance(i, (int, float)) and math.isfinite(i) for i in x):
        raise ValueError(f"{name}={x!r}: give a finite number for each query head")
    return tuple(float(i) for i in x)


def _check_n(score: ScoreFunction) -> None:
    if isinstance(score.n, bool) or not isinstance(score.n, (int, float)) or not 1.0 <= score.n < math.inf:
        raise ValueError(f"n={score.n!r}: give a number of keys, at least 1")
    if score.normalization not in _COUNTED and score.sigmoid_bias != MINUS_LOG_N:
        raise ValueError(
            f'n={score.n!r} without "1/n", "1/sqrt(n)" or "-log n", which would use it: leave it out'
        )


def _options(score: ScoreFunction, device: torch.device) -> dict:
    bias, normalization = score.sigmoid_bias, score.normalization
    if score.n is not None:
        normalization = _COUNTED[normalization](score.n) if normalization in _COUNTED else normalization
        bias = -math.log(score.n) if score.sigmoid_bias == MINUS_LOG_N else bias
    # A tensor made under a compiler or a mode belongs to it, and may not be kept.
    kept = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0
    tensor = _tensor if kept else _new_tensor
    return {
        "use_softmax": False,
        "activation": score.activation,
        "sigmoid_bias": tensor(bias, device) if isinstance(bias, tuple) else bias,
        "normalization": normalization,
        "decay_slopes": score.decay_slopes and tensor(score.decay_slopes, device),
    }


def _new_tensor(numbers: Numbers, device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@lru_cache(256)
def _tensor(numbers: Numbers, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # one made in inference mode could not be saved for a later backward
        return _new_tensor(numbers, device)
