"""List wrong primitives of linear time, each with one step replaced by a mistake, and the check that must
fail for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from flash_attn.linear import linear_attention_prefill
from flash_attn.nosoftmax.backends.linear import chunked, primitive
from flash_attn.nosoftmax.backends.linear.form import NOTHING, Form, Given

import linear_checks as checks

_Chunks = chunked._Chunks


@dataclass(frozen=True)
class Mutant:
    """``owner.step`` is replaced by ``wrong``; ``check``, called with the package, then fails."""

    name: str
    owner: object
    step: str
    wrong: object
    check: Callable


def _later_mask(shift: int) -> Callable:
    def mask(self, scores, span):
        offset = self._rows_in(span).start - self._keys_in(span).start + shift
        split = (
            scores.unflatten(2, (self._k.shape[3], -1)).unflatten(1, (self._q.shape[3], -1)).transpose(2, 3)
        )
        (split.tril_ if self.form.mask == "causal" else split.triu_)(offset)
        return scores

    return mask


def _top_left(self, q, k, v, form, *given):
    """Let row i see the keys up to i, as if both began at the first position."""
    rows = min(q.shape[1], k.shape[1])
    _RIGHT_INIT(self, q[:, :rows], k[:, :rows], v[:, :rows], form, *given)


def _reads_everything(self, q, k, v, form, *given):
    _RIGHT_INIT(self, q, k, v, form, *given)
    self._from_row, self._from_key = self._first_row, self._first_key


def _ungrouped(self, x, span, first):
    part = x[:, span.start - first : span.stop - first].permute(0, 2, 1, 3, 4)
    return part.to(self.dtype, copy=True).reshape(x.shape[0] * self.heads, -1, x.shape[-1])


def _state_of_the_neighbour(q, k, v, form, cu_q=None, cu_k=None, max_q=0, max_k=0, given=None):
    """Treat packed sequences as one."""
    return (
        chunked.attend(q[None], k[None], v[None], form)[0][0]
        if cu_q is not None
        else chunked.attend(q, k, v, form)[0]
    )


def _unlimited(self, out, result, span):
    wide = out.float()
    _RIGHT_STORE(self, wide, result, span)
    out.copy_(wide)


def _clamped(self, out, result, span):
    limit = torch.finfo(torch.float16).max / abs(self._factor)
    _RIGHT_STORE(self, out, result.clamp_(-limit, limit), span)


def _factors_of_rows_only(self, x, of, span, first, first_seen):
    """Leave out the factors where the queries are keys, in dk and dv."""
    if not self.form.transposed:
        _RIGHT_WEIGH(self, x, of, span, first, first_seen)


def _without_the_last_token(q, k, v, form, state, cu_seqlens=None, given=NOTHING):
    out, after = _RIGHT_WITH_STATE(q, k, v, form, state, cu_seqlens, given)
    if q.shape[1] > 1:
        _, after = _RIGHT_WITH_STATE(*(x[:, :-1] for x in (q, k, v)), form, state, cu_seqlens, given)
    return out, after


_RIGHT_WITH_STATE = primitive.attend_with_state
_RIGHT_PASS_OVER = _Chunks.pass_over
_RIGHT_FROM_STATE, _RIGHT_TO_STATE = _Chunks._from_state, _Chunks._to_state
_RIGHT_WEIGH = _Chunks._weigh
_RIGHT_INIT, _RIGHT_STORE, _RIGHT_CONSTANT = _Chunks.__init__, _Chunks.store, Form.constant

_causal = partial(checks.check_lengths, causal=True, lengths=(300, 300))
_uneven = partial(checks.check_lengths, causal=True, lengths=(70, 300))
_decay = partial(checks.check_decay, causal=True, lengths=(300, 300))
_full_decay = partial(checks.check_decay, causal=False, lengths=(300, 300))
_factors = partial(checks.check_factors, causal=True, lengths=(300, 300))

MUTANTS = [
    Mutant("a query does not see its own key", _Chunks, "mask", _later_mask(-1), _causal),
    Mutant("a query sees the next key", _Chunks, "mask", _later_mask(1), _causal),
    Mutant("no mask inside a chunk", _Chunks, "mask", lambda self, scores, span: scores, _causal),
    Mutant("aligned at the first position", _Chunks, "__init__", _top_left, _uneven),
    Mutant("rows without keys are read", _Chunks, "__init__", _reads_everything,
    checks.check_rows_without_keys), Mutant("heads of a group interleaved with positions", _Chunks, "_cut",
    _ungrouped, _causal), Mutant("state runs on into the next sequence", primitive, "attend",
    _state_of_the_neighbour,
           partial(checks.check_packed, causal=True)),
    Mutant("gradients without the transposed mask", Form, "of_dk", Form.of_dq, _causal),
    Mutant("gradients saturate", Form, "of_dk", lambda self: self._replace(transposed=True),
           partial(checks.check_largest, dtype=torch.float16, largest=65504.0, causal=True, agree=True)),
    Mutant("Inf becomes the largest number", _Chunks, "store", _clamped, checks.check_not_finite),
    Mutant("weights do not saturate", _Chunks, "limit", lambda self, scores: scores,
    checks.check_weights_saturate), Mutant("scale forgotten", Form, "constant", lambda self, rows, keys: 1.0,
    _causal), Mutant("1/n of the other side", Form, "constant", lambda self, rows,
    keys: _RIGHT_CONSTANT(self, keys, rows),
           partial(_uneven, normalization="1/n")),
    Mutant("factors of rows not in dk and dv", _Chunks, "_weigh", _factors_of_rows_only, _factors),
    Mutant("factors of another sequence", Given, "of_sequence", lambda self, form, b, queries: Given(
    self.row_factors[:1]), partial(checks.check_packed, causal=True, normalization=torch.tensor(
    [1.0, 2.0, 0.0, 3.0, 0.5]))),
    Mutant("decay off by one at a chunk's edge", _Chunks, "_from_state", lambda self, span, backwards:
    _RIGHT_FROM_STATE(self, span, backwards) * self._exponents.neg().exp()[:, :, None], _decay),
    Mutant("keys decayed by one too much", _Chunks, "_to_state", lambda self, span, backwards:
    _RIGHT_TO_STATE(self, span, backwards) * self._exponents.exp()[:, :, None], _decay),
    Mutant("state decayed by the wrong length", _Chunks, "pass_over", lambda self, state, length:
    _RIGHT_PASS_OVER(self, state, length - 1), _decay),
    Mutant("decay from the wrong end of the span", _Chunks, "_to_state", lambda self, span, backwards:
    _RIGHT_TO_STATE(self, span, not backwards), _full_decay),
    Mutant("no decay inside a chunk", _Chunks, "decay", lambda self, scores, span: scores, _decay),
    Mutant("final state without the last token", primitive, "attend_with_state", _without_the_last_token,
    lambda package: checks.check_pieces(linear_attention_prefill, package, 2, torch.float32)),
    Mutant("rounding of a gentle decay adds up", _Chunks, "pass_over", lambda self, state, length:
    state.mul_((self._exponents[:, :, None] * length).exp()), checks.check_gentle_decay),
    Mutant("1/visible taken for 1/n", Form, "weighs_positions", False, partial(_causal,
    normalization="1/visible")), Mutant("last chunk left out", _Chunks, "has_keys", lambda self,
    span: len(span) == chunked.CHUNK, _causal), Mutant("outputs overflow", _Chunks, "store", _unlimited,
           partial(checks.check_largest, dtype=torch.float16, largest=65504.0, causal=True, agree=True)),
]  # fmt: skip
