"""Say how DTensors may be sharded in attention without softmax: over the batch, over heads, over queries, and
over keys with a partial sum.

Importing flash_attn.distributed registers these rules. A DTensor that is sharded in another way, such as the
tokens of causal attention, is gathered by DTensor first: ContextParallel is for these. All tensors of a call
are DTensors then, slopes and factors too.
"""

from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ..nosoftmax import ops
from ..nosoftmax.call import TENSORS, Call, Options
from .problem import unknown

_BY_HEAD = ("alibi_slopes", "sigmoid_biases", "decay_slopes")
_BY_SEQUENCE = (
    "row_factors", "diagonal", "target_counts", "context_counts", "interval_starts", "interval_ends",
)  # fmt: skip
_SUMMABLE = (torch.float32, torch.float64)  # 16-bit parts would be rounded before they are added


def _shardings(call: Call) -> list:
    """Return the ways to shard a call, each as the placements of q, of k and v, of dq, of dk and dv, and by
    field of other tensors, which are replicated where they are not named. The output is placed as dq is.
    """
    q, k, o = call.q, call.k, call.options
    found = [(Replicate(), Replicate(), Replicate(), Replicate(), {})]
    if unknown(call, "diagonal") is not None:
        return found
    given = {name: x for name, x in zip(Call._fields, call.tensors) if x is not None}
    by_head = {name: Shard(given[name].ndim - 1) for name in _BY_HEAD if name in given}
    heads = Shard(q.ndim - 2)
    if all(k.shape[-2] % ranks == 0 for ranks in q.mesh.shape):
        found.append((heads, heads, heads, heads, by_head))
    if call.varlen:
        return found
    batch, tokens = Shard(0), Shard(1)
    of_batch = {name: batch for name in _BY_HEAD if name in given and given[name].ndim == 2}
    of_batch |= {name: batch for name in _BY_SEQUENCE if name in given}
    found.append((batch, batch, batch, batch, of_batch))
    limited = o.mask is not None or o.window_left >= 0 or o.window_right >= 0
    positional = limited or {"alibi_slopes", "decay_slopes"} & given.keys()
    if positional or q.tensor_meta.dtype not in _SUMMABLE:
        return found
    rows = {"row_factors": tokens} if "row_factors" in given and given["row_factors"].ndim == 2 else {}
    found.append((tokens, Replicate(), tokens, Partial("sum"), rows))
    if o.normalization is None and o.sigmoid_bias is not None:  # else the parts count their own keys
        found.append((Replicate(), tokens, Partial("sum"), tokens, {}))
    return found


def _of_tensors(call: Call, q: Any, kv: Any, others: dict) -> list:
    """Return the placements of the tensors of a call, None where absent."""
    places = {"q": q, "k": kv, "v": kv, **others}
    return [
        None if x is None else places.get(name, Replicate()) for name, x in zip(Call._fields, call.tensors)
    ]


def _call(tensors: tuple, options: tuple) -> Call:
    return Call(*tensors, Options(*options))


@register_sharding(ops.forward_operator())
def _forward(*arguments):
    tensors, (*options, _) = arguments[:TENSORS], arguments[TENSORS:]
    call = _call(tensors, options)
    missing, found = [None] * (len(options) + 1), []
    for q, kv, out, _, others in _shardings(call):
        found.append(([out, Replicate(), Replicate()], [*_of_tensors(call, q, kv, others), *missing]))
    return found


@register_sharding(ops.backward_operator())
def _backward(dout, *arguments):
    tensors, rng_state, (*options, _) = arguments[:TENSORS], arguments[TENSORS], arguments[TENSORS + 1 :]
    call = _call(tensors, options)
    missing, found = [None] * (len(options) + 1), []
    for q, kv, dq, dkv, others in _shardings(call):
        of_state = None if rng_state is None else Replicate()
        inputs = [q, *_of_tensors(call, q, kv, others), of_state, *missing]
        found.append(([dq, dkv, dkv], inputs))
    return found
