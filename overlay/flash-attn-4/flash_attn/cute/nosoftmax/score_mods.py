"""Turn formulas into score_mods of the kernels, and mark the score_mods of users."""

import functools
from typing import Callable, NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Float32
from flash_attn.cute.nosoftmax.formulas import BY_HEAD, Bias, formula
from flash_attn.cute.nosoftmax.kernel import of_head, ramp
from flash_attn.cute.nosoftmax.marker import ATTRIBUTE, HSTUKind, NoSoftmax, WindowKind, marked


class ScoreMods(NamedTuple):
    """The score_mods of one call. Scores arrive multiplied by softmax_scale * unit. plans: see plan.py."""

    score_mod: Callable
    score_mod_bwd: Optional[Callable]
    unit: float
    plans: Optional[dict] = None


class _Kernel:
    """The operations of formulas.py on fragments of registers."""

    @staticmethod
    def tanh(x):
        return cute.math.tanh(x, fastmath=True)

    @staticmethod
    def exp2(x):
        return cute.math.exp2(x, fastmath=True)

    @staticmethod
    def abs(x):
        return cute.math.absf(x)

    @staticmethod
    def _each(function, x):
        out = cute.make_rmem_tensor(x.shape, Float32)
        out.store(x)
        for i in range(cute.size(out)):
            out[i] = function(out[i])
        return out.load()

    @staticmethod
    def rcp(x):
        return _Kernel._each(cute.arch.rcp_approx, x)

    @staticmethod
    def relu(x):
        return _Kernel._each(lambda v: cute.arch.fmax(v, 0.0, nan=True), x)

    @staticmethod
    def ramp(x, high):
        return _Kernel._each(lambda v: ramp(v, high), x)

    @staticmethod
    def where_positive(x, a, b):
        return cute.where(x > 0.0, a, b)


@functools.lru_cache(maxsize=None)
def of_activation(
    activation: str,
    sigmoid_bias: Bias,
    softcap: float,
    normalization: Optional[str],
    has_decay: bool,
    hstu: Optional[HSTUKind] = None,
    intervals: int = 0,
    has_diagonal: bool = False,
    window: Optional[WindowKind] = None,
    wide: bool = False,
) -> ScoreMods:
    """normalization and the arguments after it: as in NoSoftmax."""
    f = formula(activation, sigmoid_bias, softcap)
    has_biases = sigmoid_bias == BY_HEAD

    def n(batch_idx, head_idx, seqlen_info, aux_tensors):
        """Return the number of keys, or the bias of the head."""
        if not has_biases:
            return cute.arch.fmax(Float32(seqlen_info.seqlen_k), 1.0)
        biases = aux_tensors[-1 - has_decay]
        return of_head(biases, batch_idx[0], head_idx[0])  # with aux_tensors, vectors have one element

    def score_mod(score, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors, aux_scalars=None):
        return f.value(_Kernel, score, n(batch_idx, head_idx, seqlen_info, aux_tensors))

    def score_mod_bwd(
        grad, score, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors, aux_scalars=None
    ):
        return f.derivative(_Kernel, grad, score, n(batch_idx, head_idx, seqlen_info, aux_tensors))

    # The closures contain functions: hash the names of the arguments instead. The folder of the disk cache is
    # named after a hash of all sources, so that a changed formula never finds an old entry.
    name = f"nosoftmax {activation} {sigmoid_bias!r} {softcap!r}"
    score_mod.__cute_hash__ = name
    score_mod_bwd.__cute_hash__ = f"{name} backward"
    mark = NoSoftmax(
        normalization, finite_at_zero=True, inf_seen_in=f.inf_seen_in, has_biases=has_biases,
        has_decay=has_decay, hstu=hstu, intervals=intervals, has_diagonal=has_diagonal, window=window,
        wide=wide,
    )  # fmt: skip
    setattr(score_mod, ATTRIBUTE, mark)
    return ScoreMods(score_mod, score_mod_bwd, f.unit, plans={})


def of_user(
    score_mod: Callable, score_mod_bwd: Optional[Callable], normalization: Optional[str], has_decay: bool
) -> ScoreMods:
    mark = NoSoftmax(normalization, has_decay=has_decay)
    return ScoreMods(marked(score_mod, mark), score_mod_bwd, 1.0)
