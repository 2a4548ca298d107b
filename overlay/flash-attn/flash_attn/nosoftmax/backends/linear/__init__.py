"""Run attention without softmax in linear time.

With f the identity and without softcap, dropout, ALiBi and window, attention is associative: Q (K^T V) costs
N d^2 in place of N^2 d. The causal form needs one state per head, the sum of k_j^T v_j so far, which
decay_slopes let decay from token to token. The output and
the gradients are forms of one primitive, the sum over visible j of (q_i . k_j) v_j. docs/linear.md has the
design.

    form.py       the masks and the normalization
    chunked.py    the primitive in PyTorch, any device
    kernels.py    the primitive in Triton, 16-bit CUDA tensors
    primitive.py  chooses between the two
    state.py      prefill, continue and step with a recurrent state
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Optional

import torch

from ...call import Call, Options
from .. import Result
from . import primitive
from .form import NOTHING, Form, Given, kind_of_factors

# (slope, offset) for each mask: both algorithms take the same time, forward and backward together, at
# seqlen_q = seqlen_k = slope * head_dim + offset. From benchmarks/linear_vs_quadratic.py: rounded up for
# CPUs, the shortest measured sequences for CUDA. docs/linear.md names the machines. "auto" is quadratic on
# other device types.
CROSSOVERS = {
    "cpu": {"full": (1.0, 64.0), "causal": (2.0, 64.0)},
    "cuda": {"full": (0.0, 1000.0), "causal": (0.0, 1000.0)},
}
# The number of scores of all heads and sequences, masked ones included, above which a quadratic kernel takes
# a GPU longer than the additional launches of the linear algorithm take the host. From an H100: one sequence
# of 4k tokens, or 16 of 1k tokens, with 16 heads each.
MIN_SCORES = {"cuda": 250e6}
_MAX_HEAD_DIM = 256  # of the kernels


def obstacle(call: Call) -> Optional[str]:
    """Why this call has no exact algorithm in linear time, by the first reason found; None if it has one."""
    if call.cache is not None:
        return "in place of a cache it has a state: flash_attn.linear.linear_attention_step"
    option = _inexact(call)
    if option is not None:
        return f"{option} has no exact algorithm in linear time"
    if primitive.has_kernels(call.q) and max(call.q.shape[-1], call.v.shape[-1]) > _MAX_HEAD_DIM:
        return (
            f"head_dim={call.q.shape[-1]}, head_dim_v={call.v.shape[-1]}: the kernels go up to "
            f"{_MAX_HEAD_DIM}"
        )
    return None


def _inexact(call: Call) -> Optional[str]:
    o = call.options
    if o.activation != "identity":
        return f"activation={o.activation!r}"
    if o.softcap > 0.0:
        return f"softcap={o.softcap}"
    if o.dropout_p > 0.0:
        return f"dropout_p={o.dropout_p}"
    if call.alibi_slopes is not None:
        return "alibi_slopes"
    if o.mask is not None:
        return "mask"
    # A side that reaches beyond every sequence limits nothing, if the last query is aligned with the last
    # key.
    aligned = call.diagonal is None
    if (0 <= o.window_left and not (aligned and o.window_left >= o.max_seqlen_k - 1)) or (
        0 < o.window_right and not (aligned and o.window_right >= o.max_seqlen_q - 1)
    ):
        return f"window_size={o.window_left, o.window_right}"
    for name in ("block_table", "seqused_k", "leftpad_k"):
        if getattr(call, name) is not None:
            return name
    return None


def disadvantage(call: Call) -> Optional[str]:
    """Why "auto" passes over the linear algorithm where it is exact; None if it does not."""
    q, k = call.q, call.k
    if q.device.type != "cpu" and not primitive.has_kernels(q):
        return f"no kernels for {q.dtype} on {q.device}: they take float16 and bfloat16, with triton"
    sequences = max(call.batch, 1) if call.varlen else 1
    heads = q.shape[-2] * (sequences if call.varlen else q.shape[0])
    causal = _causal(call) or call.decay_slopes is not None  # with a decay, the full form is two causal ones
    if not predicted_faster(
        q.device, q.shape[-1], causal, q.shape[-3] / sequences, k.shape[-3] / sequences, heads
    ):
        return (
            "not predicted faster at these lengths, this head_dim and this number of heads (docs/linear.md)"
        )
    return None


def predicted_faster(
    device: torch.device, head_dim: int, causal: bool, seqlen_q: float, seqlen_k: float, heads: int
) -> bool:
    """Predict whether the linear algorithm is faster for these mean lengths. heads: those of all sequences
    together.

    Quadratic costs seqlen_q * seqlen_k, linear seqlen_q + seqlen_k, so the harmonic mean of the lengths
    decides.
    """
    if device.type not in CROSSOVERS:
        return False
    slope, offset = CROSSOVERS[device.type]["causal" if causal else "full"]
    longer = 2 * seqlen_q * seqlen_k > (slope * head_dim + offset) * (seqlen_q + seqlen_k)
    return longer and heads * seqlen_q * seqlen_k >= MIN_SCORES.get(device.type, 0)


def _causal(call: Call) -> bool:
    # A single query at the last key sees every key either way, and the full form is cheaper.
    return call.options.window_right == 0 and (call.options.max_seqlen_q > 1 or call.diagonal is not None)


@lru_cache(512)  # a form takes longer to make than its calls take to compare
def _form_of(
    o: Options, causal: bool, factors: Optional[str], decay: Optional[tuple[int, ...]], aligned: bool
) -> Form:
    return Form(
        o.softmax_scale, causal, normalization=o.normalization, factor=o.factor, row_factors=factors,
        decay=decay, wide=o.wide,
        # Where every query sees every key alike, no position counts.
        diagonal=not aligned and (causal or decay is not None),
    )  # fmt: skip


def _form(call: Call) -> Form:
    slopes = call.decay_slopes
    decay = None if slopes is None else tuple(slopes.shape)
    return _form_of(call.options, _causal(call), kind_of_factors(call), decay, call.diagonal is None)


# The forms of calls that give no tensors beside q, k and v, by the identity of their options: a hash of all
# options would take longer than the rest of this module. An entry keeps its options, so that no others get
# their identity.
_MOST_FORMS = 512
_forms: dict[int, tuple[Options, Form]] = {}


def _arguments(call: Call) -> tuple:
    """Return the arguments of the primitive after the tensors: the form, the lengths and what is given."""
    o = call.options
    lengths = call.cu_seqlens_q, call.cu_seqlens_k, o.max_seqlen_q, o.max_seqlen_k
    if call.row_factors is not None or call.decay_slopes is not None or call.diagonal is not None:
        return _form(call), *lengths, Given(call.row_factors, call.decay_slopes, call.diagonal)
    known = _forms.get(id(o))
    if known is None:
        if len(_forms) >= _MOST_FORMS:
            _forms.clear()
        known = _forms[id(o)] = o, _form(call)
    return known[1], *lengths, NOTHING


def forward(call: Call) -> Result:
    return Result(primitive.attend(call.q, call.k, call.v, *_arguments(call)))


def prepared(call: Call) -> Callable[..., torch.Tensor]:
    arguments = _arguments(call)
    return lambda q, k, v: primitive.attend(q, k, v, *arguments)


def backward(call: Call, dout: torch.Tensor, rng_state: Optional[torch.Tensor]) -> tuple:
    return primitive.gradients(dout, call.q, call.k, call.v, *_arguments(call))
