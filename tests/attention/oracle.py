"""Define attention with and without softmax independently of the package, as plainly as possible.

``attend`` holds all the maths for one sequence and one head. It follows the contract in the module docstring
of ``flash_attn.nosoftmax.score`` and shares no code with the package. Autograd differentiates it, which gives
the reference gradients. It computes in the dtype of its inputs: float64 inputs give the reference, 16-bit
inputs the error that is inherent in this precision (see ``measure``). ``Oracle`` only cuts batches, heads,
packed sequences and caches into such single sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """The options that every public attention function takes, under the same names and with the same
    meaning.
    """

    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    use_softmax: bool = False
    activation: str = "identity"
    sigmoid_bias: float | str | Tensor = 0.0
    normalization: str | float | Tensor | None = None
    decay_slopes: Tensor | float | None = None
    mask: object | None = None  # a flash_attn.masks.HSTU or Intervals
    deterministic: bool = False  # fixes the order of sums, which the oracle ignores

    def slope(self, batch: int, head: int) -> float | Tensor:
        """The ALiBi slope of one head; slopes are (nheads,) or (batch, nheads)."""
        return 0.0 if self.alibi_slopes is None else of_head(self.alibi_slopes, batch, head)

    def of_head(self, batch: int, head: int) -> Options:
        """The options of one head: bias and decay are numbers, and the factors of `factor` are left out."""
        bias, decay = self.sigmoid_bias, self.decay_slopes
        return replace(
            self,
            sigmoid_bias=of_head(bias, batch, head).item() if isinstance(bias, Tensor) else bias,
            normalization=self.normalization if isinstance(self.normalization, str) else None,
            decay_slopes=None if decay is None else of_head(decay, batch, head).item(),
        )

    def of_sequence(self, batch: int, rows: slice | None) -> Options:
        """The options of one sequence: the mask holds numbers, or the intervals of its rows."""
        if self.mask is None:
            return self
        at = batch if rows is None else rows
        return replace(
            self,
            mask=self.mask._replace(
                **{
                    name: x.cpu()[at if name in ("starts", "ends") else batch]
                    for name, x in self.mask._asdict().items()
                    if isinstance(x, Tensor)
                }
            ),
        )

    def factor(self, batch: int, rows: slice | None, total: int) -> float | Tensor:
        """The caller's factor for the rows of one sequence, a number or (seqlen_q, 1, 1). rows: their place
        among ``total`` packed rows.
        """
        given = self.normalization
        if given is None or isinstance(given, str):
            return 1.0
        if not isinstance(given, Tensor):
            return given
        if rows is not None and len(given) == total:
            return given.double()[rows, None, None]
        return given.double()[batch].reshape(-1, 1, 1)

    @property
    def window(self) -> tuple[float, float]:
        """How far a query sees to its left and to its right; causal is a right side of 0."""
        left, right = self.window_size[0], 0 if self.causal else self.window_size[1]
        return (math.inf if left < 0 else left, math.inf if right < 0 else right)


def of_head(given: Tensor, batch: int, head: int) -> Tensor:
    """The entry of one head in (nheads,) or (batch, nheads)."""
    return given.double()[batch, head] if given.dim() == 2 else given.double()[head]


def distances(seqlen_q: int, seqlen_k: int) -> Tensor:
    """(seqlen_q, seqlen_k): how far key j lies to the right of query i when the last of both are aligned."""
    return torch.arange(seqlen_k) - (torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q)


def decay(seqlen_q: int, seqlen_k: int, o: Options) -> Tensor:
    """(seqlen_q, seqlen_k): the factor that multiplies each weight of a head."""
    return torch.exp(-(o.decay_slopes or 0.0) * distances(seqlen_q, seqlen_k).abs().double())


def visibility(seqlen_q: int, seqlen_k: int, o: Options) -> Tensor:
    """(seqlen_q, seqlen_k) bool: may query i see key j?"""
    if o.mask is not None:
        return (in_intervals if hasattr(o.mask, "starts") else hstu)(seqlen_q, seqlen_k, o.mask)
    left, right = o.window
    distance = distances(seqlen_q, seqlen_k)
    return (distance >= -left) & (distance <= right)


def in_intervals(seqlen_q: int, seqlen_k: int, mask) -> Tensor:
    """(seqlen_q, seqlen_k) bool: does key j lie in an interval of row i?"""
    key = torch.arange(seqlen_k)
    return ((key >= mask.starts[..., None]) & (key < mask.ends[..., None])).any(1)


def hstu(seqlen_q: int, seqlen_k: int, mask) -> Tensor:
    """(seqlen_q, seqlen_k) bool: HSTU's mask by comparing positions, as generative-recommenders defines it,
    with the groups of candidates that FBGEMM adds. The last row is the last key.
    """
    contexts, window, whole = int(mask.num_contexts), mask.max_attn_len, mask.min_full_attn_seq_len
    history = seqlen_k - int(mask.num_targets)
    column = torch.arange(seqlen_k)
    row = torch.arange(seqlen_k - seqlen_q, seqlen_k)

    def position(index: Tensor) -> Tensor:
        return (
            (index - contexts + 1).clamp(0, history - contexts + 1) if contexts else index.clamp(max=history)
        )

    i, j, p, of_key = row[:, None], column, position(row)[:, None], position(column)
    target = history - contexts + 1 if contexts else history
    visible = (i == j) | (p > of_key)
    group = mask.target_group_size
    visible |= (j >= history) & (j <= i) & ((i - history) // group == (j - history) // group)
    if window:
        visible &= (p - of_key <= window) | (whole > 0) & (p >= target - whole)
    if contexts:
        visible |= (p == 0) & (of_key < target)
    return visible & (i >= 0)


def sigmoid_bias(o: Options, n: int) -> float:
    return -math.log(n) if o.sigmoid_bias == "-log n" else o.sigmoid_bias


def gaussian(s: Tensor) -> Tensor:
    """The standard normal distribution function."""
    return torch.special.erfc(-s / math.sqrt(2)) / 2


FUNCTIONS = {
    "identity": lambda s, bias: s,
    "relu": lambda s, bias: s.relu(),
    "relu2": lambda s, bias: s.relu().square(),
    "sigmoid": lambda s, bias: torch.sigmoid(s + bias),
    "silu": lambda s, bias: s * torch.sigmoid(s),
    "gelu": lambda s, bias: s * gaussian(s),
    "softplus": lambda s, bias: torch.logaddexp(s, torch.zeros_like(s)),
}
ROW_FACTORS = {
    None: lambda n, seen: torch.ones_like(seen),
    "1/n": lambda n, seen: torch.full_like(seen, 1 / n),
    "1/sqrt(n)": lambda n, seen: torch.full_like(seen, n**-0.5),
    "1/visible": lambda n, seen: 1 / seen.clamp(min=1),
}


def attend(
    q: Tensor, k: Tensor, v: Tensor, o: Options, slope, keep: Tensor | None, dropout_p: float
) -> Tensor:
    """One sequence, one head: q (seqlen_q, d), k and v (seqlen_k, d), keep bool (seqlen_q, seqlen_k)."""
    n, distance, visible = max(len(k), 1), distances(len(q), len(k)), visibility(len(q), len(k), o)
    k, v = (
        torch.where(visible.any(0)[:, None], x, 0) for x in (k, v)
    )  # keys that no query may see are never read
    s = (q @ k.T) * (q.shape[-1] ** -0.5 if o.softmax_scale is None else o.softmax_scale)
    s = o.softcap * torch.tanh(s / o.softcap) if o.softcap > 0 else s
    s = s - (slope * distance.abs()).to(s.dtype)
    if o.use_softmax:
        p = torch.where(visible | ~visible.any(-1, keepdim=True), s, -math.inf).softmax(-1)
    else:
        p = FUNCTIONS[o.activation](s, sigmoid_bias(o, n))
        p = p if o.decay_slopes is None else p * decay(len(q), len(k), o).to(p.dtype)
    p = torch.where(visible if keep is None else visible & keep, p, 0)
    return (
        p @ v * ROW_FACTORS[o.normalization](n, visible.sum(-1, keepdim=True).to(s.dtype)) / (1 - dropout_p)
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of x (seqlen, nheads, d) at the given positions; cos and sin are (seqlen_ro,
    rotary_dim / 2).
    """
    half = cos.shape[-1]
    cos, sin = cos[positions][:, None].to(x.dtype), sin[positions][:, None].to(x.dtype)
    halves, pairs = (slice(0, half), slice(half, 2 * half)), (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    first, second = pairs if interleaved else halves
    turned = x.clone()
    turned[..., first] = x[..., first] * cos - x[..., second] * sin
    turned[..., second] = x[..., first] * sin + x[..., second] * cos
    return turned


def split(x: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split(x, list(lengths))


class Oracle:
    """Computes batches, packed sequences and key-value caches, one sequence and one head at a time.

    ``dtype`` is the widest dtype that the implementation takes. Checks use it by default.
    """

    device = "cpu"
    dtype = torch.float64

    def attend(self, q: Tensor, k: Tensor, v: Tensor, o: Options, slope, keep, dropout_p: float) -> Tensor:
        return attend(q, k, v, o, slope, keep, dropout_p)

    def kv_head(self, head: int, nheads: int, nheads_k: int) -> int:
        return head // (nheads // nheads_k)

    def sequence(
        self, q, k, v, o: Options, batch=0, keep=None, dropout_p=0.0, used=slice(None), rows=None, total=0
    ) -> Tensor:
        """One sequence: q (seqlen_q, nheads, d), k and v (seqlen_k, nheads_k, d), of which ``used`` are the
        keys. rows: where q lies among ``total`` packed rows.
        """
        k, v, o = k[used], v[used], o.of_sequence(batch, rows)
        nheads, nheads_k = q.shape[1], k.shape[1]
        heads = []
        for head in range(nheads):
            group = self.kv_head(head, nheads, nheads_k)
            kept = None if keep is None else keep[head]
            of_head, slope = o.of_head(batch, head), o.slope(batch, head)
            heads.append(self.attend(q[:, head], k[:, group], v[:, group], of_head, slope, kept, dropout_p))
        return (torch.stack(heads, 1) * o.factor(batch, rows, total)).to(q.dtype)

    def dense(
        self, q: Tensor, k: Tensor, v: Tensor, *, keep=None, dropout_p: float = 0.0, **options
    ) -> Tensor:
        """q (batch, seqlen_q, nheads, d); k and v (batch, seqlen_k, nheads_k, d); keep as ``dropped`` returns
        it.
        """
        o = Options(**options)
        keep = [None] * len(q) if keep is None else keep
        return torch.stack([self.sequence(q[b], k[b], v[b], o, b, keep[b], dropout_p) for b in range(len(q))])

    def dropped(self, q, k, v, dropout_p: float, seed: int, **options) -> tuple[Tensor, Tensor]:
        """Return the output and the keep mask of the seed. Each implementation has its own masks.

        The call is packed if ``lengths_q`` and ``lengths_k`` are among the options.
        """
        packed = "lengths_q" in options
        lengths = (
            (options["lengths_q"], options["lengths_k"]) if packed else ([q.shape[1]] * len(q), [k.shape[1]])
        )
        shape = len(lengths[0]), q.shape[-2], max(lengths[0]), max(lengths[1])
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= dropout_p
        run = self.varlen if packed else self.dense
        return run(q, k, v, keep=keep, dropout_p=dropout_p, **options), keep

    def varlen(
        self, q, k, v, lengths_q, lengths_k, *, seqused_k=None, leftpad_k=None, block_table=None, keep=None,
        dropout_p: float = 0.0, **options,
    ) -> Tensor:  # fmt: skip
        """Packed: q (total_q, nheads, d); k and v (total_k, nheads_k, d), or pages (blocks, page, nheads_k,
        d).
        """
        o, out = Options(**options), []
        for b, q_b in enumerate(split(q, lengths_q)):
            if block_table is None:
                k_b, v_b = (split(x, lengths_k)[b] for x in (k, v))
            else:
                k_b, v_b = (self.gather(x, block_table[b]) for x in (k, v))
            used = slice(
                0 if leftpad_k is None else leftpad_k[b], lengths_k[b] if seqused_k is None else seqused_k[b]
            )
            kept = None if keep is None else keep[b, :, : lengths_q[b], : lengths_k[b]]
            rows = slice(sum(lengths_q[:b]), sum(lengths_q[: b + 1]))
            out.append(self.sequence(q_b, k_b, v_b, o, b, kept, dropout_p, used, rows, len(q)))
        return torch.cat(out)

    def gather(self, pages: Tensor, blocks: Tensor) -> Tensor:
        return pages[blocks.long()].flatten(0, 1)

    def kvcache(
        self, q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, rotary_cos=None, rotary_sin=None,
        rotary_interleaved=True, cache_batch_idx=None, cache_leftpad=None, block_table=None, num_splits=0,
        **options,
    ) -> Tensor:  # fmt: skip
        """One decoding step: appends k and v (batch, seqlen_new, nheads_k, d) to the caches in place, then
        attends.
        """
        o, out = Options(**options), []
        for b in range(len(q)):
            length, start = int(cache_seqlens[b]), 0 if cache_leftpad is None else int(cache_leftpad[b])
            slot = b if cache_batch_idx is None else int(cache_batch_idx[b])
            q_b, new = q[b], 0 if k is None else k.shape[1]
            if rotary_cos is not None:
                moving = (
                    torch.arange(len(q_b))
                    if o.window != (math.inf, math.inf)
                    else torch.zeros(len(q_b)).long()
                )
                q_b = rotate(q_b, rotary_cos, rotary_sin, length + moving, rotary_interleaved)
            for cache, fresh, turn in ((k_cache, k, rotary_cos is not None), (v_cache, v, False)):
                for t in range(new):
                    row = fresh[b, t : t + 1]
                    if turn:
                        row = rotate(
                            row, rotary_cos, rotary_sin, torch.tensor([length + t]), rotary_interleaved
                        )
                    self.write(cache, row[0], slot, length + t, block_table)
            k_b, v_b = (
                x[slot] if block_table is None else self.gather(x, block_table[b]) for x in (k_cache, v_cache)
            )
            used = slice(start, length + new)
            out.append(self.sequence(q_b, k_b, v_b, o, b, used=used))
        return torch.stack(out)

    def write(self, cache: Tensor, row: Tensor, slot: int, position: int, block_table: Tensor | None) -> None:
        if block_table is not None:
            slot, position = int(block_table[slot, position // cache.shape[1]]), position % cache.shape[1]
        cache[slot, position] = row
