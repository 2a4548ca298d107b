"""Run attention on the CPU in PyTorch, in blocks of queries, so that memory grows linearly with the sequence
length.

forward_loop.py, backward_loop.py  the two loops over blocks
blocks.py                the steps on a block that they share
visibility.py            which keys a query sees
sequences.py             cuts a call into sequences of one length
dropout.py, s_dmask.py   the dropout mask, and the result that shows it
kvcache.py, paged.py, rotary.py  attention with a KV cache
softmax.py               the functions of the compiled extension, with softmax
"""

from typing import Optional

import torch

from ...call import Call
from .. import Result
from . import backward_loop, forward_loop, kvcache, s_dmask
from .dropout import new_rng_state, seed_of
from .sequences import parts


def obstacle(call: Call) -> Optional[str]:
    return None


def disadvantage(call: Call) -> Optional[str]:
    return None


def forward(call: Call) -> Result:
    # Record no graph, and keep autocast from lowering the precision of the products.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        if call.cache is not None:
            return Result(kvcache.forward(call))
        q, k, v, o = *call.tensors[:3], call.options
        out = (q.new_zeros if call.varlen else q.new_empty)(*q.shape[:-1], v.shape[-1], dtype=call.out_dtype)
        if o.dropout_p == 0.0:
            for part in parts(call, 0):
                forward_loop.forward(
                    part.sequences,
                    part.of_queries(q),
                    part.of_keys(k),
                    part.of_keys(v),
                    part.of_queries(out),
                    None,
                )
            return Result(out)
        rng_state = new_rng_state(o.dropout_p, None)
        mask = s_dmask.empty(call) if o.return_attn_probs else None
        for part in parts(call, seed_of(rng_state)):
            keys = part.of_keys(k)
            forward_loop.forward(
                part.sequences, part.of_queries(q), keys, part.of_keys(v), part.of_queries(out), None
            )
            if mask is not None:
                s_dmask.write(
                    part.sequences, part.of_queries(q), keys, mask[part.batch.start : part.batch.stop]
                )
        return Result(out, rng_state, mask)


def backward(call: Call, dout: torch.Tensor, rng_state: Optional[torch.Tensor]) -> tuple:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        q, k, v = call.tensors[:3]
        dq, dk, dv = (
            (x.new_zeros if call.varlen else x.new_empty)(x.shape, dtype=call.out_dtype) for x in (q, k, v)
        )
        for part in parts(call, 0 if rng_state is None else seed_of(rng_state)):
            backward_loop.backward(
                part.sequences, part.of_queries(dout), part.of_queries(q), part.of_keys(k), part.of_keys(v),
                None, None,
                part.of_queries(dq), part.of_keys(dk), part.of_keys(dv), None,
            )  # fmt: skip
        return dq, dk, dv
