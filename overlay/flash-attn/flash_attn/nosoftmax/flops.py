"""Count the floating-point operations of a call for torch.utils.flop_counter.FlopCounterMode.

The count is that of scaled_dot_product_attention in torch.utils.flop_counter, so that the two compare: matrix
products over all pairs of a query and a key of a sequence, whatever a mask or a window hides and whichever
algorithm runs. A product over a pair costs 2 * head_dim.

The module of FlopCounterMode imports Triton, which takes half a second, so this one waits until a program
imports it.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any, Callable, Optional

import torch

from .call import Call

_COUNTER = "torch.utils.flop_counter"


def of_forward(call: Call) -> int:
    """Count two products: scores and output."""
    return 2 * _pairs(call) * call.q.shape[-2] * (call.q.shape[-1] + call.v.shape[-1])


def of_backward(call: Call) -> int:
    """Count five products: scores once more, dP, dV, dQ and dK."""
    return 2 * _pairs(call) * call.q.shape[-2] * (3 * call.q.shape[-1] + 2 * call.v.shape[-1])


def _pairs(call: Call) -> int:
    """Count the pairs of a query and a key of the same sequence."""
    q, o = call.q, call.options
    if call.varlen:
        of_q = _lengths(call.cu_seqlens_q, o.max_seqlen_q)
        of_k = _lengths(call.cu_seqlens_k, o.max_seqlen_k)
    else:
        of_q, of_k = [q.shape[1]] * q.shape[0], [o.max_seqlen_k] * q.shape[0]
    of_k = _read(call.seqused_k) or of_k
    if call.cache is not None:
        new = 0 if call.cache.k is None else call.cache.k.shape[1]
        filled = _read(call.cache.cache_seqlens)
        of_k = [length + new for length in filled] if filled else of_k
    return sum(queries * keys for queries, keys in zip(of_q, of_k))


def _lengths(offsets: torch.Tensor, longest: int) -> list:
    """Return the lengths of packed sequences. Without memory to read them from, all have the longest."""
    read = _read(offsets)
    return [longest] * (offsets.shape[0] - 1) if read is None else [b - a for a, b in zip(read, read[1:])]


def _read(x: Optional[torch.Tensor]) -> Optional[list]:
    has_memory = x is not None and not x.is_meta and type(x) is torch.Tensor
    return x.tolist() if has_memory else None


def register(counts: dict) -> None:
    """Register operator -> count(*arguments), now or when FlopCounterMode is imported."""

    def then(counter: ModuleType) -> None:
        for operator, count in counts.items():
            formula = counter.register_flop_formula(operator.overloadpacket, get_raw=True)
            formula(lambda *arguments, out_val=None, count=count: count(*arguments))

    if _COUNTER in sys.modules:
        then(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Then(then))


class _Then(MetaPathFinder):
    """Calls a function once with FlopCounterMode's module, as soon as that is imported."""

    def __init__(self, then: Callable[[ModuleType], None]) -> None:
        self.then = then

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.then(module)

        spec.loader.exec_module = exec_module
        return spec
