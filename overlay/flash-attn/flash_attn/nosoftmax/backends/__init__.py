"""Run calls. Each backend is a module with the same four functions:

    obstacle(call)                   a text that says why the backend can't run a checked call on tensors of
                                     its device; None if it can
    disadvantage(call)               why "auto" passes over the backend although it can run the call; None if
                                     it does not
    forward(call)                    Result
    backward(call, dout, rng_state)  (dq, dk, dv), shaped as q, k and v

A backend may have one more, prepared(call): forward for calls that differ from this one in q, k and v alone,
as a function of these three that returns the output, where a call has no other tensors and no dropout. It
saves the host what does not change.

Backends work outside autograd and check no argument again. linear: linear time. fa4: the CuTe-DSL kernels of
flash-attn-4. fa2: the CUDA extension of this package. cpu: PyTorch. The order of preference is in
../choice.py.
"""

from typing import NamedTuple, Optional

import torch


class Result(NamedTuple):
    """out: shaped as q, with v's last dimension. rng_state: int64 (2,), with which backward drops the same
    entries again. s_dmask: the entries that dropout kept, (batch, nheads, seqlen_q, seqlen_k) with lengths
    rounded up to multiples of 128, if requested."""

    out: torch.Tensor
    rng_state: Optional[torch.Tensor] = None
    s_dmask: Optional[torch.Tensor] = None
