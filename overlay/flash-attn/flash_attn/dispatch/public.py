"""The decorator that gives the public attention functions `algorithm` and `backend`, and the question which would run."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ..call import Call, call_of
from ..linear import public as linear
from ..score_function import resolve
from . import fa4
from .choice import Choice, choose

_DOC = """\
        algorithm: with use_softmax=False "auto" takes linear time (flash_attn/linear) where that is exact and predicted
            faster; "quadratic" and "linear" choose.
        backend: with use_softmax=False "auto" takes the first of "linear" (linear time), "fa4" (flash-attn-4 of this patch
            set, on Hopper; not for little work that "fa2" can do), "fa2" (this package's CUDA extension) and "cpu" that can
            run the call; a name forces that one, and so does the environment variable FLASH_ATTENTION_NOSOFTMAX_BACKEND
            where this is "auto". With use_softmax=True the tensors' device decides; a KV cache is for "fa2" and "cpu" alone.
            flash_attn.explain says which would run, and why. ValueError if what is forced can't run the call,
            NotImplementedError if nothing can.
"""
_DEVICES = ("cpu", "cuda")
_CHOICES = ("algorithm", "backend")


def dispatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with the keyword arguments `algorithm` and `backend`; it runs what `choose` chooses.

    function: a public function as upstream has it, which runs the quadratic algorithm on the tensors' device.
    """
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    accepted = [p.name for p in parameters]
    required = [p.name for p in parameters if p.default is p.empty]
    softmax_at = positional.index("use_softmax")

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """inspect.Signature.bind without defaults, in what torch.compile can trace."""
        arguments = {**dict(zip(positional, args)), **kwargs}
        if (
            len(arguments) < len(args) + len(kwargs)
            or any(name not in accepted for name in arguments)
            or any(name not in arguments for name in required)
        ):
            function(*args, **kwargs)  # raises the TypeError of a wrong call
        return arguments

    @functools.wraps(function)
    def run(*args, algorithm="auto", backend="auto", **kwargs):
        use_softmax = args[softmax_at] if len(args) > softmax_at else kwargs.get("use_softmax", True)
        if use_softmax and algorithm == backend == "auto":
            return function(*args, **kwargs)
        call = _checked_call(bind(args, kwargs))
        if call.q.device.type not in _DEVICES:  # such as meta: the operators beneath the function know what to do
            return function(*args, **kwargs)
        choice = choose(call, algorithm, backend)
        if choice.backend is None:
            raise choice.refusal()
        if choice.backend == "linear":
            return linear.attend(call)
        if choice.backend == "fa4":
            return fa4.attend(call)
        return function(*args, **kwargs)

    run.bind = bind
    run.__doc__ = (function.__doc__ or "").replace("\n    Return:\n", f"\n{_DOC}    Return:\n", 1)
    run.__signature__ = inspect.signature(function).replace(
        parameters=[*parameters, *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default="auto") for name in _CHOICES)]
    )
    return run


def _checked_call(arguments: dict[str, Any]) -> Call:
    call = call_of(arguments)
    resolve(call.use_softmax, call.activation, call.sigmoid_bias, call.normalization)
    return call


def explain(function: Callable[..., Any], *args: Any, algorithm: str = "auto", backend: str = "auto", **kwargs: Any) -> Choice:
    """Which backend would run function(*args, algorithm=..., backend=..., **kwargs), and why not those before it.

    function: one of the attention functions of flash_attn, such as flash_attn_func; the other arguments are those of the
    call. Nothing is computed. print() the result, or read its attributes: see Choice, whose backend is None where the call
    would raise. Raises TypeError for another function, and what the call raises for a wrong argument.

        >>> print(flash_attn.explain(flash_attn_func, q, k, v, causal=True, use_softmax=False, activation="silu"))
        cpu, quadratic algorithm
          not linear: activation='silu' has no exact algorithm in linear time
          not fa4: q is on cpu, it takes CUDA tensors
          not fa2: q is on cpu, it takes CUDA tensors
    """
    bind = getattr(function, "bind", None)
    if bind is None:
        raise TypeError(f"{function!r} is none of the attention functions of flash_attn, such as flash_attn.flash_attn_func")
    return choose(_checked_call(bind(args, kwargs)), algorithm, backend)
