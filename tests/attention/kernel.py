"""Model the fused kernel: the same attention as the oracle, divided into a kernel's steps.

Unlike the oracle, the model writes its backward by hand, recomputes scores in tiles padded beyond the last
row, rounds the weights P and their gradient dS to the input dtype, and sums in float32. P and the output
saturate; dS and gradients overflow. Every step is a method, so that replacing one step makes a wrong kernel;
``mutations.py`` lists such kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from oracle import FUNCTIONS, ROW_FACTORS, Options, Oracle, decay, distances, sigmoid_bias, visibility

TILE_ROWS = 16
# relu2 grows with the square of its inputs. This limit is far below float32's largest value, so that sums
# stay finite.
WIDE_LIMIT = 2.0**80


@dataclass(frozen=True)
class Head:
    """The data of one call for one sequence and one head."""

    o: Options
    slope: object
    keep: Tensor | None
    dropout_p: float
    seqlen_q: int
    seqlen_k: int
    head_dim: int

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.o.softmax_scale is None else self.o.softmax_scale


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, kernel, head):
        ctx.save_for_backward(q, k, v)
        ctx.kernel, ctx.head = kernel, head
        return kernel.forward(q, k, v, head)

    @staticmethod
    def backward(ctx, dout):
        return (*ctx.kernel.backward(dout, *ctx.saved_tensors, ctx.head), None, None)


class Kernel(Oracle):
    """The kernel model. Every method below ``backward`` is a step that a mutant may replace."""

    def attend(self, q, k, v, o, slope, keep, dropout_p):
        if o.use_softmax:
            return super().attend(q, k, v, o, slope, keep, dropout_p)
        return _Attend.apply(q, k, v, self, Head(o, slope, keep, dropout_p, len(q), len(k), q.shape[-1]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, h: Head) -> Tensor:
        q, _, k, v, keep, visible, dtype = self.load(q, q, k, v, h)
        s, _ = self.scores(q, k, h)
        p = self.drop_weights(self.mask_weights(self.decayed(self.function(s, h), h), visible), keep)
        out = (
            self.matmul(self.narrow(p, dtype), v)
            * self.row_factor(visible, keep, h).to(v.dtype)
            * self.rescale(h)
        )
        return self.narrow_output(out, dtype)[: h.seqlen_q].to(dtype)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, h: Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, dout, k, v, keep, visible, dtype = self.load(q, dout, k, v, h)
        s, dcap = self.scores(q, k, h)
        factor = self.row_factor(visible, keep, h).to(v.dtype)
        p = self.mask_weights(self.decayed(self.weights_again(s, h), h), visible)
        p = self.drop_weights_again(p, keep)
        dv = self.matmul(self.narrow(p, dtype).T, dout * factor) * self.rescale(h)
        ds = (dout @ v.T) * factor * self.decayed_again(self.derivative(s, h), h) * dcap
        ds = self.narrow_gradient(self.drop_gradient(self.mask_gradient(ds, visible, p), keep, p), dtype)
        dq, dk = (
            x * self.gradient_scale(h) * self.rescale(h) for x in (self.matmul(ds, k), self.matmul(ds.T, q))
        )
        return tuple(self.narrow_result(x, dtype).to(dtype) for x in (dq[: h.seqlen_q], dk, dv))

    def load(self, q, dout, k, v, h: Head):
        """Load tiles in the accumulator's dtype. Rows past the last query are zeros, and keys that no query
        sees are not read.
        """
        rows = -h.seqlen_q % TILE_ROWS
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        visible = F.pad(self.visible(h), (0, 0, 0, rows), value=self.phantom_rows_see_keys())
        keep = None if h.keep is None else F.pad(h.keep, (0, 0, 0, rows), value=True)
        k, v = (self.load_keys(x.to(wide), visible) for x in (k, v))
        return *(F.pad(x.to(wide), (0, 0, 0, rows)) for x in (q, dout)), k, v, keep, visible, q.dtype

    def load_keys(self, x: Tensor, visible: Tensor) -> Tensor:
        return torch.where(visible.any(0)[:, None], x, 0)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply in two parts, as accumulators do: a part that holds Inf and one that holds -Inf make
        NaN.
        """
        middle = len(b) // 2
        return a[:, :middle] @ b[:middle] + a[:, middle:] @ b[middle:]

    def phantom_rows_see_keys(self) -> bool:
        return False

    def scores(self, q: Tensor, k: Tensor, h: Head) -> tuple[Tensor, Tensor]:
        """Scores s, and their derivative by scale * q·k."""
        u = q @ k.T * self.score_scale(h)
        u, dcap = self.cap(u, h)
        return self.add_bias(u, dcap, h)

    def score_scale(self, h: Head) -> float:
        return h.scale

    def cap(self, u: Tensor, h: Head) -> tuple[Tensor, Tensor]:
        if h.o.softcap <= 0:
            return u, torch.ones_like(u)
        t = torch.tanh(u / h.o.softcap)
        return h.o.softcap * t, 1 - t * t

    def add_bias(self, u: Tensor, dcap: Tensor, h: Head) -> tuple[Tensor, Tensor]:
        return u - F.pad(self.bias(h), (0, 0, 0, len(u) - h.seqlen_q)).to(u.dtype), dcap

    def bias(self, h: Head) -> Tensor:
        return h.slope * distances(h.seqlen_q, h.seqlen_k).abs()

    def function(self, s: Tensor, h: Head) -> Tensor:
        return FUNCTIONS[h.o.activation](s, sigmoid_bias(h.o, max(h.seqlen_k, 1)))

    def decayed(self, p: Tensor, h: Head) -> Tensor:
        return (
            p if h.o.decay_slopes is None else p * F.pad(self.decay(h), (0, 0, 0, len(p) - h.seqlen_q)).to(p)
        )

    def decay(self, h: Head) -> Tensor:
        return decay(h.seqlen_q, h.seqlen_k, h.o)

    def decayed_again(self, derivative: Tensor, h: Head) -> Tensor:
        """Apply the decay to dS, as to P."""
        return self.decayed(derivative, h)

    def weights_again(self, s: Tensor, h: Head) -> Tensor:
        """Recompute P in the backward, for dV."""
        return self.function(s, h)

    def derivative(self, s: Tensor, h: Head) -> Tensor:
        g = torch.sigmoid(s + sigmoid_bias(h.o, max(h.seqlen_k, 1)) if h.o.activation == "sigmoid" else s)
        return {
            "identity": torch.ones_like(s),
            "relu": torch.where(s.isnan(), s, s > 0).to(s.dtype),
            "relu2": 2 * s.relu(),
            "sigmoid": g * (1 - g),
            "silu": g * (1 + s * (1 - g)),
            "gelu": (1 + torch.erf(s / math.sqrt(2))) / 2
            + s * torch.exp(-s * s / 2) / math.sqrt(2 * math.pi),
            "softplus": torch.sigmoid(s),
        }[h.o.activation]

    def visible(self, h: Head) -> Tensor:
        return visibility(h.seqlen_q, h.seqlen_k, h.o)

    def mask_weights(self, p: Tensor, visible: Tensor) -> Tensor:
        return torch.where(visible, p, 0)

    def mask_gradient(self, ds: Tensor, visible: Tensor, p: Tensor) -> Tensor:
        return torch.where(visible, ds, 0)

    def drop_weights(self, p: Tensor, keep: Tensor | None) -> Tensor:
        return p if keep is None else torch.where(keep, p, 0)

    def drop_weights_again(self, p: Tensor, keep: Tensor | None) -> Tensor:
        return self.drop_weights(p, keep)

    def drop_gradient(self, ds: Tensor, keep: Tensor | None, p: Tensor) -> Tensor:
        return ds if keep is None else torch.where(keep, ds, 0)

    def rescale(self, h: Head) -> float:
        return 1 / (1 - h.dropout_p)

    def gradient_scale(self, h: Head) -> float:
        return h.scale

    def row_factor(self, visible: Tensor, keep: Tensor | None, h: Head) -> Tensor:
        return ROW_FACTORS[h.o.normalization](max(h.seqlen_k, 1), visible.sum(-1, keepdim=True).double())

    def narrow(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Round P to the input dtype for the matrix unit. Finite values stay finite; NaN and Inf show."""
        return self.saturated(x, min(torch.finfo(dtype).max, WIDE_LIMIT)).to(dtype).to(x.dtype)

    def saturated(self, x: Tensor, limit: float) -> Tensor:
        return torch.where(x.isfinite(), x.clamp(-limit, limit), x)

    def narrow_gradient(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Round dS to the input dtype, with Inf where it does not fit, so that too large a loss scale
        shows.
        """
        return x.to(dtype).to(x.dtype)

    def narrow_output(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.saturated(x, torch.finfo(dtype).max)

    def narrow_result(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Round dQ, dK and dV."""
        return x
