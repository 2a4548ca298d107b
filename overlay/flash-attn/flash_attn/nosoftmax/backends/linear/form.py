"""Describe a form of the linear-attention primitive: its mask, scale and normalization."""

import math
from typing import NamedTuple, Optional

import torch

from ...call import Call, compute_dtype

FULL, CAUSAL, ANTICAUSAL = "full", "causal", "anticausal"
SEQUENCE, ROW = "sequence", "row"


class Given(NamedTuple):
    """The tensors of a form.

    row_factors: float32, a factor for each sequence, (batch,), or for each query, (batch, seqlen) of the
    queries, packed (total,). Form.row_factors says which. decay_slopes: float32, not negative, (heads,) or
    (batch, heads), a decay for each state. diagonal: int32 (batch,), the key of the attention that query 0 of
    a sequence is aligned with.
    """

    row_factors: Optional[torch.Tensor] = None
    decay_slopes: Optional[torch.Tensor] = None
    diagonal: Optional[torch.Tensor] = None

    def of_sequence(self, form: "Form", b: int, queries: slice) -> "Given":
        """The tensors of one packed sequence, for a dense call with batch 1. queries: their place."""
        given = self.of_entry(b)
        if self.row_factors is not None and form.row_factors == ROW:
            given = given._replace(row_factors=self.row_factors[None, queries])
        return given

    def of_entry(self, b: int) -> "Given":
        """The tensors of one entry of a dense batch."""
        factors, slopes, diagonal = self
        return Given(
            None if factors is None else factors[b : b + 1],
            slopes if slopes is None or slopes.dim() == 1 else slopes[b : b + 1],
            None if diagonal is None else diagonal[b : b + 1],
        )


NOTHING = Given()


def kind_of_factors(call: Call) -> Optional[str]:
    """Whether Call.row_factors holds a factor for each sequence or for each row; None without it."""
    factors = call.row_factors
    if factors is None:
        return None
    by_row = factors.shape[0] == call.q.shape[0] if call.varlen else factors.dim() == 2
    return ROW if by_row else SEQUENCE


class Form(NamedTuple):  # not a dataclass, which takes several times as long to make and to hash
    """out_i = norm * scale * sum over the visible j of (q_i . k_j) v_j, or its transpose.

    Rows are the positions of the output (i), keys the positions summed over (j). Both are aligned at their
    end: with T = max(rows, keys), row i has position i + T - rows and key j has position j + T - keys.
    ``diagonal`` aligns them elsewhere: query i of the attention with its key i + Given.diagonal.
    Causal: a row sees the keys at its own position and before it. ``transposed``, for the gradients of k and
    v: the rows are the keys of the attention, and the keys its queries. A causal mask is then anticausal (its
    own position and after it), and the normalization belongs to the keys.

    factor: multiplies each row of the output, beside the normalization. row_factors: SEQUENCE or ROW if
    Given.row_factors does so too, with a number for each sequence or for each query; they belong to the
    queries, as the normalization does, and replace "1/visible".

    decay: the shape of Given.decay_slopes, or None. The product of row i and key j is multiplied by
    exp(-slope * the distance of their positions). There are as many slopes as the fewer heads of rows and
    keys, where the heads of a group share a state and its decay, or as many as the more: then each of these
    has its own state.

    weights_saturate: the products q_i . k_j are the weights P, which saturate in float16 where they are
    formed. False if they are dS. output_saturates: the result is the output, and not a gradient. wide: the
    result is left in the compute dtype.
    """

    softmax_scale: float
    causal: bool
    transposed: bool = False
    normalization: Optional[str] = None
    factor: float = 1.0
    row_factors: Optional[str] = None
    decay: Optional[tuple[int, ...]] = None
    weights_saturate: bool = True
    output_saturates: bool = True
    wide: bool = False
    diagonal: bool = False

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the result for tensors of this dtype."""
        return compute_dtype(dtype) if self.wide else dtype

    @property
    def mask(self) -> str:
        if not self.causal:
            return FULL
        return ANTICAUSAL if self.transposed else CAUSAL

    def of_dq(self) -> "Form":
        """The form of dq, F(dO, V, K), if this is the form of the output."""
        return self._replace(weights_saturate=False, output_saturates=False)

    def of_dk(self) -> "Form":
        """The form of dk, F(V, dO, Q), transposed."""
        return self._replace(transposed=not self.transposed, weights_saturate=False, output_saturates=False)

    def of_dv(self) -> "Form":
        """The form of dv, F(K, Q, dO), transposed. Its products are P again."""
        return self._replace(transposed=not self.transposed, output_saturates=False)

    @property
    def weighs_positions(self) -> bool:
        """Whether the normalization differs between the queries of a sequence. Otherwise `constant` contains
        it."""
        return self.normalization == "1/visible" and self.causal

    def constant(self, seqlen_rows: int, seqlen_keys: int) -> float:
        """The factor that all rows of a sequence share: softmax_scale * factor, times the normalization if
        constant.
        """
        n, shared = max(seqlen_rows if self.transposed else seqlen_keys, 1), self.softmax_scale * self.factor
        if self.normalization == "1/n" or (self.normalization == "1/visible" and not self.causal):
            return shared / n
        if self.normalization == "1/sqrt(n)":
            return shared / math.sqrt(n)
        return shared
