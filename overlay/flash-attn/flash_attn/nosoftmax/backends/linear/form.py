"""Which of the primitive's forms a call is: what its mask is, and which side the normalization counts."""

import math
from typing import NamedTuple, Optional

FULL, CAUSAL, ANTICAUSAL = "full", "causal", "anticausal"


class Form(NamedTuple):  # not a dataclass: to make and to hash one would take several times as long
    """out_i = norm * scale * sum over the visible j of (q_i . k_j) v_j, or its transpose.

    Rows are what the output has (i), keys are what is summed over (j). Both are aligned at their end: with
    T = max(rows, keys), row i has position i + T - rows and key j has position j + T - keys. Causal: a row
    sees the keys at its own position and before it. ``transposed``: the rows are the keys of the attention
    that was asked for and the keys its queries, which is what the gradients of k and v are; a causal mask is
    then anticausal (its own position and after it), and the normalization belongs to the keys.

    factor: on each row of the output, beside the normalization.

    weights_saturate: the products q_i . k_j are the weights P, which saturate in float16 where they are
    formed, and not dS. output_saturates: the result is the output, and not a gradient.
    """

    softmax_scale: float
    causal: bool
    transposed: bool = False
    normalization: Optional[str] = None
    factor: float = 1.0
    weights_saturate: bool = True
    output_saturates: bool = True

    @property
    def mask(self) -> str:
        if not self.causal:
            return FULL
        return ANTICAUSAL if self.transposed else CAUSAL

    def of_dq(self) -> "Form":
        """Of the gradient of q, where this is the form of the output: F(dO, V, K)."""
        return self._replace(weights_saturate=False, output_saturates=False)

    def of_dk(self) -> "Form":
        """F(V, dO, Q), transposed."""
        return self._replace(transposed=not self.transposed, weights_saturate=False, output_saturates=False)

    def of_dv(self) -> "Form":
        """F(K, Q, dO), transposed. Its products are P again."""
        return self._replace(transposed=not self.transposed, output_saturates=False)

    @property
    def weighs_positions(self) -> bool:
        """Whether the normalization differs between the queries of a sequence. Else it is `constant`."""
        return self.normalization == "1/visible" and self.causal

    def constant(self, seqlen_rows: int, seqlen_keys: int) -> float:
        """What all rows of a sequence share: softmax_scale, factor, and the normalization if that is a
        constant.
        """
        n, shared = max(seqlen_rows if self.transposed else seqlen_keys, 1), self.softmax_scale * self.factor
        if self.normalization == "1/n" or (self.normalization == "1/visible" and not self.causal):
            return shared / n
        if self.normalization == "1/sqrt(n)":
            return shared / math.sqrt(n)
        return shared
