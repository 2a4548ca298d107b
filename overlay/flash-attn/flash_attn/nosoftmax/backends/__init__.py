"""What runs a call. Each backend has the same four functions:

    obstacle(call)                   why it can't run a checked call on tensors of its device, for people;
                                     None if it can
    disadvantage(call)               why "auto" passes it over though it can; None if it does not
    forward(call)                    Result
    backward(call, dout, rng_state)  (dq, dk, dv), shaped as q, k and v

All work outside of autograd, and nothing in them checks an argument again. linear: linear time. fa4: the
CuTe-DSL kernels of flash-attn-4. fa2: the CUDA extension of this package. cpu: PyTorch. The order of
preference is in ../choice.py.
"""

from typing import NamedTuple, Optional

import torch


class Result(NamedTuple):
    """out: as q, with v's last dimension. rng_state: int64 (2,), what backward needs to drop the same again.
    s_dmask: which entries dropout kept, (batch, nheads, seqlen_q, seqlen_k) rounded up to multiples of 128,
    where it was asked for."""

    out: torch.Tensor
    rng_state: Optional[torch.Tensor] = None
    s_dmask: Optional[torch.Tensor] = None
