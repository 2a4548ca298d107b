"""Say which keys each query sees, as recommenders need it: pass ``HSTU(...)`` or ``Intervals(...)`` as
``mask=`` to an attention function with use_softmax=False.

A sequence has n keys at positions 0 to n - 1: num_contexts contextual keys first (C), then the history, and
at the end num_targets candidates (T). H = n - T is where the history ends. The seqlen_q queries are the last
of these positions, aligned at the bottom right: query i has position i + seqlen_k - seqlen_q, and with fewer
queries than keys a call computes the last rows alone (delta-q). A query before position 0 sees nothing.
nosoftmax.forward and backward take other rows: with ``diagonal`` query i has position i + diagonal.

Both masks are values: tuples of numbers and tensors, which torch.compile, torch.export and torch.func take as
arguments. Neither builds anything of size seqlen_q * seqlen_k.
"""

from typing import NamedTuple, Union

import torch

Counts = Union[int, torch.Tensor]


class HSTU(NamedTuple):
    """The mask of HSTU (Zhai et al., arXiv 2402.17152), as generative-recommenders and FBGEMM compute it.

    num_targets, num_contexts: how many of the last keys of a sequence are candidates, and how many of its
    first are contextual; an int for all sequences, or a tensor (batch,), int32 (int64 is converted). A
    sequence holds at least num_contexts + num_targets keys; one without keys may meet any int.
    max_attn_len: how far a row sees back, in positions; 0 is without limit. min_full_attn_seq_len: with
    max_attn_len, how many of the last rows of the history see everything before them, and with more than 0
    all candidates do; 0 is none. target_group_size: how many successive candidates form a group.

    What a row at position i sees:

        contextual, i < C      [0, H): all contextual keys and the whole history
        history, C <= i < H    [lo, i + 1): itself, and what max_attn_len leaves of what came before it
        candidate, i >= H      [lo, H), and of its own group of candidates those up to itself

    Distances are those of compressed positions p, in which all contextual keys are one position: p(j) = 0 for
    j < C and p(j) = j - C + 1 after them (p(j) = j without contextual keys), and all candidates lie at
    Q = p(H). A row sees key j if p(row) - p(j) <= max_attn_len. All contextual keys are therefore equally
    far, and a short max_attn_len hides all of them from late rows; the window of a candidate counts from the
    end of the history, whichever candidate it is.

    These are the semantics of generative-recommenders. Elsewhere:

    - generative-recommenders has one num_contexts (contextual_seq_len) for all sequences, and no groups:
      candidates see none of each other, target_group_size=1.
    - FBGEMM and recsys-examples have num_contexts for each sequence, and target_group_size. They take
      contexts and targets only with window_size=(-1, 0), which is max_attn_len=0; their window_size=(w, 0)
      without either is max_attn_len=w.
    - ULTRA-HSTU's semi-local attention (arXiv 2602.16986) as TorchEasyRec builds it is no HSTU mask: give
      Intervals. Its candidates don't see themselves, and its local window counts keys, not positions.

    HSTU() is causal, and HSTU(max_attn_len=w) is window_size=(w, 0): such calls run as those do, on every
    backend.
    """

    num_targets: Counts = 0
    num_contexts: Counts = 0
    max_attn_len: int = 0
    min_full_attn_seq_len: int = 0
    target_group_size: int = 1


class Intervals(NamedTuple):
    """The keys that each query sees, as up to three half-open intervals [start, end), the same for all heads.

    starts, ends: integer tensors (batch, seqlen_q, k), packed (total_q, k), with k from 1 to 3; int32 (int64
    is converted). Columns count from the start of the own sequence. The intervals of a row ascend and do not
    overlap; start = end is an interval that is not used, wherever it lies. With context_parallel the rows are
    those of this rank's queries, and columns count from the start of the whole sequence.

    It is the general form: FBGEMM's func tensor with [0, F0), [F1, F2), ... is starts = (0, F1, ...), ends =
    (F0, F2, ...).
    """

    starts: torch.Tensor
    ends: torch.Tensor
