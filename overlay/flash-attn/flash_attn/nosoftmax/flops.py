"""Count the floating-point operations of a call for torch.utils.flop_counter.FlopCounterMode.

The count is that of scaled_dot_product_attention in torch.utils.flop_counter, so that the two compare: matrix
products over all pairs of a query and a key of a sequence, whatever a mask or a window hides and whichever
algorithm runs. A product over a pair costs 2 * head_dim. A recurrent state adds its own products: a query
with the state before it, and a key with its value.

Both wheels have a copy of this module, so it imports only torch and its sibling modules.

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


def of_forward(call: Call, seqused_q: Optional[torch.Tensor] = None) -> int:
    """Count two products: scores and output. seqused_q: int32 (batch,) or None, the queries that count."""
    return 2 * _pairs(call, seqused_q) * call.q.shape[-2] * (call.q.shape[-1] + call.v.shape[-1])


def of_backward(call: Call, seqused_q: Optional[torch.Tensor] = None) -> int:
    """Count five products: scores once more, dP, dV, dQ and dK."""
    return 2 * _pairs(call, seqused_q) * call.q.shape[-2] * (3 * call.q.shape[-1] + 2 * call.v.shape[-1])


def of_piece(call: Call, has_state: bool) -> int:
    """Count the forward pass of a piece by itself, its queries with the state before it, and its keys with
    its values.
    """
    tokens = call.q.shape[0] if call.varlen else call.q.shape[0] * call.q.shape[1]
    heads = call.k.shape[-2] + (call.q.shape[-2] if has_state else 0)
    return of_forward(call) + of_state(tokens, heads, call.q.shape[-1], call.v.shape[-1])


def of_state(tokens: int, heads: int, head_dim: int, head_dim_v: int) -> int:
    """Count one product of each token and head with a state, or into one."""
    return 2 * tokens * heads * head_dim * head_dim_v


def _pairs(call: Call, seqused_q: Optional[torch.Tensor]) -> int:
    """Count the pairs of a query and a key of the same sequence."""
    q, k, o = call.q, call.k, call.options
    if call.varlen:
        of_q = _lengths(call.cu_seqlens_q, o.max_seqlen_q or q.shape[0])
    else:
        of_q = [q.shape[1]] * q.shape[0]
    if call.cu_seqlens_k is not None:
        of_k = _lengths(call.cu_seqlens_k, o.max_seqlen_k or k.shape[0])
    else:  # dense, or pages, of which only seqused_k says how many keys count
        of_k = [k.shape[1] * (1 if call.block_table is None else call.block_table.shape[1])] * len(of_q)
    of_q, of_k = _read(seqused_q) or of_q, _read(call.seqused_k) or of_k
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
