"""The options of a call, and what follows from them for sequences of given lengths."""

import math
from dataclasses import dataclass
from typing import Optional

import torch

from .dropout import Dropout
from .visibility import Visibility, Window


@dataclass(frozen=True)
class Options:
    """What holds for every sequence of a call; the names are those of the extension's arguments."""

    dtype: torch.dtype
    softmax_scale: float
    window: Window
    softcap: float
    dropout_p: float
    use_softmax: bool
    activation: str
    sigmoid_bias: Optional[float]
    normalization: Optional[str]

    @property
    def compute_dtype(self) -> torch.dtype:
        """16-bit tensors are computed in float32, the others as they are."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def weight_limit(self) -> Optional[float]:
        """Where P saturates: as in the GPU kernels, which convert it to the dtype of the inputs."""
        return torch.finfo(self.dtype).max if self.dtype == torch.float16 and not self.use_softmax else None

    @property
    def grad_limit(self) -> Optional[float]:
        """Where dS saturates: as P, and for relu2, whose derivative is unbounded, well inside float32."""
        return self.weight_limit or (2.0**80 if self.activation == "relu2" else None)


@dataclass(frozen=True)
class Sequences:
    """Sequences of one length that are computed together: a dense batch, or one sequence of a ragged one.

    alibi_slopes: (batch * nheads_k, group) in the compute dtype, or None. dropout: None where nothing is dropped.
    """

    options: Options
    visibility: Visibility
    alibi_slopes: Optional[torch.Tensor]
    dropout: Optional[Dropout]

    @classmethod
    def of_batch(
        cls,
        options: Options,
        batch: range,
        seqlens: tuple[int, int],
        nheads: tuple[int, int],
        alibi_slopes: Optional[torch.Tensor],
        seed: int = 0,
    ) -> "Sequences":
        """The batch entries in `batch`, with (seqlen_q, seqlen_k), (nheads, nheads_k), and the whole call's slopes."""
        slopes = None
        if alibi_slopes is not None:
            slopes = alibi_slopes.expand(batch.stop, nheads[0]) if alibi_slopes.dim() == 1 else alibi_slopes
            slopes = slopes[batch.start : batch.stop].to(options.compute_dtype)
            slopes = slopes.reshape(len(batch) * nheads[1], nheads[0] // nheads[1])
        dropout = Dropout(seed, options.dropout_p, batch.start * nheads[0]) if options.dropout_p > 0.0 else None
        return cls(options, Visibility(*seqlens, options.window), slopes, dropout)

    @property
    def sigmoid_bias(self) -> float:
        bias = self.options.sigmoid_bias
        return -math.log(max(self.visibility.seqlen_k, 1)) if bias is None else bias

    def norm(self, rows: range) -> Optional[torch.Tensor]:
        """The factor of each row in the compute dtype, broadcastable to (len(rows), 1); None is 1."""
        n, dtype = max(self.visibility.seqlen_k, 1), self.options.compute_dtype
        normalization = self.options.normalization
        if normalization is None:
            return None
        if normalization == "1/n":
            return torch.tensor(1.0 / n, dtype=dtype, device="cpu")
        if normalization == "1/sqrt(n)":
            return torch.tensor(1.0 / math.sqrt(n), dtype=dtype, device="cpu")
        if normalization == "1/visible":
            return self.visibility.counts(rows).clamp(min=1).to(dtype).reciprocal()
        raise ValueError(f"normalization={normalization!r} is not known")
