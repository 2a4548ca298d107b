"""List wrong kernels, each with the test that must fail for it.

A mutant is the kernel model with one step replaced by a mistake that a half-converted softmax kernel makes.
At the end there are two whole implementations: upstream's dense attention with its softmax commented out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from kernel import Kernel
from oracle import Options, Oracle, distances, rotate, visibility


@dataclass(frozen=True)
class Mutant:
    """``steps`` replace methods of the kernel model; ``caught_by`` is the ``module.test`` that fails for the
    result.
    """

    name: str
    caught_by: str
    steps: dict[str, Callable]

    def build(self) -> Kernel:
        return type("Mutant", (Kernel,), self.steps)()


def mutant(name: str, caught_by: str, **steps: Callable) -> Mutant:
    return Mutant(name, caught_by, steps)


def step(name: str) -> Callable:
    """Return the right step, to build a wrong step around it."""
    return getattr(Kernel, name)


def repeat(times: float, name: str) -> Callable:
    """Return the right step times a number."""
    return lambda self, *arguments: times * step(name)(self, *arguments)


# --- masks


def mask_scores_before_function(self, s, h, filling=0.0):
    """Give f zeros for masked scores, and do not mask after f."""
    visible = F.pad(self.visible(h), (0, 0, 0, len(s) - h.seqlen_q), value=True)
    return step("function")(self, torch.where(visible, s, filling), h)


def top_left(self, h):
    left, right = h.o.window
    distance = distances(h.seqlen_q, h.seqlen_k) + h.seqlen_k - h.seqlen_q
    return (distance >= -left) & (distance <= right)


def shifted_window(left: int, right: int) -> Callable:
    def visible(self, h):
        wide = [
            size if math.isinf(size) else int(size) + more for size, more in zip(h.o.window, (left, right))
        ]
        distance = distances(h.seqlen_q, h.seqlen_k)
        return (distance >= -wide[0]) & (distance <= wide[1])

    return visible


def swapped_window(self, h):
    right, left = h.o.window
    distance = distances(h.seqlen_q, h.seqlen_k)
    return (distance >= -left) & (distance <= right)


def ordinary_rows_leak(self, q, dout, k, v, h):
    """Fill a tile's rows beyond the last query from the memory behind it, here the last query again."""
    q, dout, *rest = step("load")(self, q, dout, k, v, h)
    for x in (q, dout):
        x[h.seqlen_q :] = x[max(h.seqlen_q - 1, 0)]
    rest[3] = rest[3] | (torch.arange(len(q)) >= h.seqlen_q)[:, None]
    return q, dout, *rest[:2], rest[2], rest[3], rest[4]


def unlimited(self, x, dtype):
    return x.to(dtype).to(x.dtype)


def multiply(self, x, visible, p=None):
    return x * visible


def load_everything(self, x, visible):
    return x


MASKS = [
    mutant(
        "-inf fill",
        "test_finite.test_masked_entries",
        mask_weights=lambda self, p, visible: torch.where(visible, p, -math.inf),
        narrow=unlimited,
    ),
    mutant(
        "-inf fill, saturated",
        "test_masks.test_causal",
        mask_weights=lambda self, p, visible: torch.where(visible, p, -math.inf),
    ),
    mutant(
        "mask by multiplying",
        "test_finite.test_poisoned_outside_every_window",
        mask_weights=multiply,
        mask_gradient=multiply,
        load_keys=load_everything,
    ),
    mutant(
        "values that nobody sees are loaded",
        "test_finite.test_poisoned_outside_every_window",
        load_keys=load_everything,
    ),
    mutant(
        "mask before f, filled with 0",
        "test_masks.test_masked_is_zero_not_function_of_zero",
        function=mask_scores_before_function,
        mask_weights=lambda self, p, visible: p,
    ),
    mutant(
        "mask before f, filled with -inf",
        "test_finite.test_masked_entries",
        function=lambda self, s, h: mask_scores_before_function(self, s, h, -math.inf),
        mask_weights=lambda self, p, visible: p,
    ),
    mutant("dS not masked", "test_masks.test_causal", mask_gradient=lambda self, ds, visible, p: ds),
    mutant(
        "P != 0 taken for the mask of dS",
        "test_scores.test_zero_query_has_a_gradient",
        mask_gradient=lambda self, ds, visible, p: torch.where(p != 0, ds, 0),
    ),
    mutant("causal aligned to the top left", "test_masks.test_causal", visible=top_left),
    mutant("causal hides the diagonal", "test_masks.test_causal", visible=shifted_window(0, -1)),
    mutant("window one too wide on the left", "test_masks.test_windows", visible=shifted_window(1, 0)),
    mutant("window one too wide on the right", "test_masks.test_windows", visible=shifted_window(0, 1)),
    mutant("window sides swapped", "test_masks.test_windows", visible=swapped_window),
    mutant(
        "window ignored",
        "test_masks.test_windows",
        visible=lambda self, h: torch.ones(h.seqlen_q, h.seqlen_k, dtype=torch.bool),
    ),
    mutant("rows past the last query leak", "test_scores.test_every_dtype", load=ordinary_rows_leak),
    mutant(
        "unmasked bias of rows past the last query",
        "test_alibi.test_bias_that_overflows_past_the_last_query",
        phantom_rows_see_keys=lambda self: True,
        add_bias=lambda self, u, dcap, h: (
            (u - h.slope * distances(len(u), h.seqlen_k).sub(h.seqlen_q - len(u)).abs()).to(u.dtype),
            dcap,
        ),
        narrow=unlimited,
    ),
]

# --- score, scale, softcap, bias


def row_maximum_subtracted(self, q, k, h):
    s, dcap = step("scores")(self, q, k, h)
    return s - s.amax(-1, keepdim=True), dcap


def cap_again(self, u, h):
    capped, dcap = step("cap")(self, u, h)
    return step("cap")(self, capped, h)[0], dcap


def cap_with_bias(self, u, dcap, h):
    """Take tanh' at the score that already has the bias."""
    s, _ = step("add_bias")(self, u, dcap, h)
    return s, 1 - (s / h.o.softcap).square() if h.o.softcap > 0 else dcap


def column_bias(self, h):
    """Drop the part of the bias that is constant in a row, as softmax allows under causal."""
    if not h.o.causal:
        return step("bias")(self, h)
    return -h.slope * torch.arange(h.seqlen_k).expand(h.seqlen_q, -1)


def unaligned_bias(self, h):
    return h.slope * (distances(h.seqlen_q, h.seqlen_k) + h.seqlen_k - h.seqlen_q).abs()


SCORES = [
    mutant(
        "negative scores dropped",
        "test_scores.test_negative_scores_count",
        function=lambda self, s, h: s.relu(),
    ),
    mutant("absolute scores", "test_scores.test_negative_scores_count", function=lambda self, s, h: s.abs()),
    mutant("exp left in place", "test_scores.test_every_dtype", function=lambda self, s, h: s.exp()),
    mutant("row maximum still subtracted", "test_scores.test_every_dtype", scores=row_maximum_subtracted),
    mutant("scale missing in P", "test_scores.test_scale", score_scale=lambda self, h: 1.0),
    mutant(
        "scale times log2(e)", "test_scores.test_scale", score_scale=repeat(math.log2(math.e), "score_scale")
    ),
    mutant(
        "scale missing in dV",
        "test_scores.test_scale",
        weights_again=lambda self, s, h: step("function")(self, s, h) / h.scale,
    ),
    mutant("scale twice in dQ and dK", "test_scores.test_scale", gradient_scale=lambda self, h: h.scale**2),
    mutant("scale missing in dQ and dK", "test_scores.test_scale", gradient_scale=lambda self, h: 1.0),
    mutant(
        "default scale from the padded head size",
        "test_scores.test_head_dims",
        score_scale=lambda self, h: (
            (-(-h.head_dim // 8) * 8) ** -0.5 if h.o.softmax_scale is None else h.scale
        ),
    ),
    mutant("softcap applied twice", "test_scores.test_softcap", cap=cap_again),
    mutant(
        "softcap not multiplied back",
        "test_scores.test_softcap",
        cap=lambda self, u, h: (lambda t, d: (t / (h.o.softcap or 1), d))(*step("cap")(self, u, h)),
    ),
    mutant(
        "softcap without its derivative",
        "test_scores.test_softcap",
        cap=lambda self, u, h: (step("cap")(self, u, h)[0], torch.ones_like(u)),
    ),
    mutant(
        "scale outside the softcap",
        "test_scores.test_softcap_and_scale",
        scores=lambda self, q, k, h: (lambda u, d: self.add_bias(u * h.scale, d, h))(*self.cap(q @ k.T, h)),
    ),
    mutant("softcap's derivative taken after ALiBi", "test_alibi.test_softcap", add_bias=cap_with_bias),
    mutant("column-only ALiBi when causal", "test_alibi.test_bias", bias=column_bias),
    mutant("ALiBi not aligned to the last key", "test_alibi.test_bias", bias=unaligned_bias),
    mutant(
        "ALiBi without the absolute value",
        "test_alibi.test_bias",
        bias=lambda self, h: -h.slope * distances(h.seqlen_q, h.seqlen_k),
    ),
    mutant(
        "ALiBi missing in dV",
        "test_alibi.test_bias_reaches_dv_alone",
        weights_again=lambda self, s, h: s + F.pad(self.bias(h), (0, 0, 0, len(s) - h.seqlen_q)).to(s.dtype),
    ),
    mutant(
        "ALiBi slopes of the first sequence for all",
        "test_alibi.test_slopes_per_batch",
        sequence=lambda self, q, k, v, o, batch=0, *rest, **x: step("sequence")(
            self, q, k, v, o, 0, *rest, **x
        ),
    ),
]

# --- dropout


def sign_bit(self, p, keep):
    """Store dropped weights with a minus sign and read it back: right only if every weight is positive."""
    return p if keep is None else torch.where(keep, p, -p).relu()


def one_mask(self, q, k, v, dropout_p, seed, **options):
    _, keep = step("dropped")(self, q, k, v, dropout_p, seed, **options)
    keep = keep[:1, :1].expand_as(keep)
    return self.dense(q, k, v, keep=keep, dropout_p=dropout_p, **options), keep


DROPOUT = [
    mutant("dropout in the sign bit", "test_dropout.test_signed_scores", drop_weights=sign_bit),
    mutant(
        "relu while converting in the backward",
        "test_dropout.test_signed_scores",
        drop_weights_again=lambda self, p, keep: p if keep is None else torch.where(keep, p, 0).relu(),
    ),
    mutant(
        "dropout not applied to P in the backward",
        "test_dropout.test_signed_scores",
        drop_weights_again=lambda self, p, keep: p,
    ),
    mutant(
        "dropout not applied to dS",
        "test_dropout.test_signed_scores",
        drop_gradient=lambda self, ds, keep, p: ds,
    ),
    mutant(
        "P > 0 taken for the keep mask of dS",
        "test_dropout.test_all_scores_negative",
        drop_gradient=lambda self, ds, keep, p: ds if keep is None else torch.where(p > 0, ds, 0),
    ),
    mutant(
        "P != 0 taken for the keep mask of dS",
        "test_dropout.test_zero_query_with_dropout",
        drop_gradient=lambda self, ds, keep, p: ds if keep is None else torch.where(p != 0, ds, 0),
    ),
    mutant("rescale by 1 / (1 - p) lost", "test_dropout.test_signed_scores", rescale=lambda self, h: 1.0),
    mutant(
        "rescale twice in dQ and dK",
        "test_dropout.test_signed_scores",
        gradient_scale=lambda self, h: h.scale / (1 - h.dropout_p),
    ),
    mutant(
        "1/visible counts what dropout left",
        "test_dropout.test_normalization_does_not_count_drops",
        row_factor=lambda self, visible, keep, h: step("row_factor")(
            self, visible if keep is None else visible & keep, keep, h
        ),
    ),
    mutant(
        "seed ignored",
        "test_dropout.test_seed_decides",
        dropped=lambda self, q, k, v, p, seed, **o: step("dropped")(self, q, k, v, p, 0, **o),
    ),
    mutant(
        "mask depends on use_softmax",
        "test_dropout.test_mask_does_not_depend_on_softmax",
        dropped=lambda self, q, k, v, p, seed, **o: step("dropped")(
            self, q, k, v, p, seed + o.get("use_softmax", False), **o
        ),
    ),
    mutant(
        "all heads and sequences share a mask",
        "test_dropout.test_rows_and_keys_are_independent",
        dropped=one_mask,
    ),
    mutant(
        "keeps with probability p",
        "test_dropout.test_fraction_kept",
        dropped=lambda self, q, k, v, p, seed, **o: step("dropped")(self, q, k, v, 1 - p, seed, **o),
    ),
]

# --- functions, normalizations, 16 bit


def hidden_normalization(self, visible, keep, h):
    """Average instead of summing, as if rows still added up to 1."""
    return 1 / visible.sum(-1, keepdim=True).clamp(min=1).double()


def padded_to(multiple: int, name: str) -> Callable:
    """Count padded keys in n."""

    def wrong(self, *arguments):
        *rest, h = arguments
        return step(name)(
            self, *rest, type(h)(**{**vars(h), "seqlen_k": -(-h.seqlen_k // multiple) * multiple})
        )

    return wrong


def factor_in_weights(self, p, dtype):
    """Multiply P by 1/n before rounding it to 16 bit, and divide it out after."""
    n = p.shape[-1] if p.shape[-1] > 1000 else 1
    return step("narrow")(self, p / n, dtype) * n


def clamped(self, x, dtype):
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).to(x.dtype)


def derivative_of(activation: str, wrong: Callable) -> Callable:
    return lambda self, s, h: wrong(s) if h.o.activation == activation else step("derivative")(self, s, h)


FUNCTIONS = [
    mutant("hidden average", "test_laws.test_disjoint_keys_add_up", row_factor=hidden_normalization),
    mutant("1/n with the padded n", "test_varlen.test_options", row_factor=padded_to(16, "row_factor")),
    mutant("-log n with the padded n", "test_varlen.test_options", function=padded_to(16, "function")),
    mutant(
        "1/visible with n",
        "test_functions.test_every_pair",
        row_factor=lambda self, visible, keep, h: step("row_factor")(self, torch.ones_like(visible), keep, h),
    ),
    mutant(
        "1/visible without a guard for 0",
        "test_finite.test_rows_without_keys",
        row_factor=lambda self, visible, keep, h: (
            1 / visible.sum(-1, keepdim=True).double()
            if h.o.normalization == "1/visible"
            else step("row_factor")(self, visible, keep, h)
        ),
    ),
    mutant(
        "normalization not in the gradients",
        "test_functions.test_every_pair",
        gradient_scale=lambda self, h: h.scale * (h.seqlen_k if h.o.normalization == "1/n" else 1),
    ),
    mutant(
        "normalization folded into float16 P",
        "test_functions.test_normalization_is_not_folded_into_16_bits",
        narrow=factor_in_weights,
    ),
    mutant(
        "sigmoid without its bias",
        "test_functions.test_every_pair",
        function=lambda self, s, h: (
            torch.sigmoid(s) if h.o.activation == "sigmoid" else step("function")(self, s, h)
        ),
    ),
    mutant(
        "+log n",
        "test_functions.test_minus_log_n",
        function=lambda self, s, h: (
            torch.sigmoid(s + math.log(max(h.seqlen_k, 1)))
            if h.o.sigmoid_bias == "-log n"
            else step("function")(self, s, h)
        ),
    ),
    mutant("activation ignored", "test_functions.test_every_pair", function=lambda self, s, h: s),
    mutant("f' ignored", "test_functions.test_every_pair", derivative=lambda self, s, h: torch.ones_like(s)),
    mutant(
        "relu2' without its 2",
        "test_functions.test_every_pair",
        derivative=derivative_of("relu2", lambda s: s.relu()),
    ),
    mutant(
        "silu' taken for sigmoid",
        "test_functions.test_every_pair",
        derivative=derivative_of("silu", torch.sigmoid),
    ),
    mutant(
        "relu' of identity",
        "test_functions.test_every_pair",
        derivative=derivative_of("identity", lambda s: (s > 0).to(s.dtype)),
    ),
    mutant("P and dS overflow in float16", "test_finite.test_weights_saturate_in_float16", narrow=unlimited),
    mutant(
        "dS saturates in float16",
        "test_finite.test_finite_gradients_are_right_in_float16",
        narrow_gradient=lambda self, x, dtype: step("narrow")(self, x, dtype),
    ),
    mutant(
        "gradients saturate in float16",
        "test_finite.test_largest_inputs_that_all_agree",
        narrow_result=lambda self, x, dtype: step("narrow_output")(self, x, dtype),
    ),
    mutant(
        "Inf in P becomes 65504",
        "test_law_nonfinite.test_visible_values_show",
        narrow=clamped,
        narrow_output=lambda self, x, dtype: x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max),
    ),
    mutant(
        "NaN in P becomes 0",
        "test_law_nonfinite.test_visible_values_show",
        narrow=lambda self, x, dtype: step("narrow")(self, x, dtype).nan_to_num(),
    ),
    mutant(
        "outputs overflow in float16",
        "test_finite.test_largest_inputs",
        narrow_output=lambda self, x, dtype: x,
    ),
    mutant(
        "relu2 unlimited in bfloat16",
        "test_finite.test_largest_inputs_in_several_blocks",
        narrow=lambda self, x, dtype: step("narrow_output")(self, x, dtype).to(dtype).to(x.dtype),
    ),
    mutant(
        "bfloat16 clamped like float16",
        "test_finite.test_weights_do_not_saturate_in_bfloat16",
        narrow=lambda self, x, dtype: step("narrow")(self, x.clamp(-65504, 65504), dtype),
    ),
]

# --- batches, groups, packed sequences, caches


def whole_sequence(self, q, k, v, o, batch=0, keep=None, dropout_p=0.0, used=slice(None), *more):
    return step("sequence")(self, q, k, v, o, batch, keep, dropout_p, slice(None), *more)


def used_shifted(start: int, stop: int) -> Callable:
    def sequence(self, q, k, v, o, batch=0, keep=None, dropout_p=0.0, used=slice(None), *more):
        if used != slice(None):
            used = slice(max(int(used.start) + start, 0), int(used.stop) + stop)
        return step("sequence")(self, q, k, v, o, batch, keep, dropout_p, used, *more)

    return sequence


def factors_by_sequence(self, q, k, v, o, batch=0, keep=None, dropout_p=0.0, used=slice(None), *more):
    return step("sequence")(self, q, k, v, o, batch, keep, dropout_p, used)


def no_factors(self, q, k, v, o, *more):
    given = o.normalization if isinstance(o.normalization, str) else None
    return step("sequence")(self, q, k, v, replace(o, normalization=given), *more)


def without_left_padding(self, q, k, v, o, batch=0, keep=None, dropout_p=0.0, used=slice(None), *more):
    return step("sequence")(self, q, k, v, o, batch, keep, dropout_p, slice(0, used.stop), *more)


def merged_splits(merge: Callable) -> Callable:
    """Make a split-key kernel whose parts, over disjoint keys, ``merge`` combines."""

    def kvcache(self, q, k_cache, v_cache, *new, cache_seqlens, num_splits=0, **options):
        if num_splits < 2 or options.get("causal"):
            return step("kvcache")(self, q, k_cache, v_cache, *new, cache_seqlens=cache_seqlens, **options)
        size, parts = -(-k_cache.shape[1] // num_splits), []
        for start in range(0, k_cache.shape[1], size):
            pair = [x[:, start : start + size] for x in (k_cache, v_cache)]
            lengths = (cache_seqlens - start).clamp(0, pair[0].shape[1])
            parts.append(step("kvcache")(self, q, *pair, cache_seqlens=lengths, **options))
        return merge(torch.stack(parts))

    return kvcache


def kvcache_with(change: Callable) -> Callable:
    """Make a decoding step that gets wrong arguments."""

    def kvcache(self, q, k_cache, v_cache, *new, **arguments):
        return step("kvcache")(self, q, k_cache, v_cache, *new, **change(dict(arguments)))

    return kvcache


def later_angles(arguments: dict) -> dict:
    return {
        name: x.roll(-1, 0) if name in ("rotary_cos", "rotary_sin") else x for name, x in arguments.items()
    }


def other_layout(arguments: dict) -> dict:
    return {**arguments, "rotary_interleaved": not arguments.get("rotary_interleaved", True)}


def all_queries_move(self, q, k_cache, v_cache, *new, rotary_cos=None, **arguments):
    """Rotate queries by their own position even where upstream rotates all by the length of the cache."""
    right = step("kvcache")
    if (
        rotary_cos is None
        or Options(**{n: arguments[n] for n in ("causal", "window_size") if n in arguments}).window
        != (math.inf,) * 2
    ):
        return right(self, q, k_cache, v_cache, *new, rotary_cos=rotary_cos, **arguments)
    angles, interleaved = (rotary_cos, arguments["rotary_sin"]), arguments["rotary_interleaved"]
    turned = []
    for row, length in zip(q, arguments["cache_seqlens"]):
        moving = rotate(row, *angles, length + torch.arange(len(row)), interleaved)
        turned.append(rotate(moving, angles[0], -angles[1], length.expand(len(row)), interleaved))
    return right(self, torch.stack(turned), k_cache, v_cache, *new, rotary_cos=rotary_cos, **arguments)


def swapped_group_order(self, q, k, v, **options):
    """Treat the heads of a group as a block of queries, and restore them in the wrong order."""
    out = step("dense")(self, q, k, v, **options)
    group = q.shape[2] // k.shape[2]
    return out if q.shape[1] > 1 else out.unflatten(2, (group, k.shape[2])).transpose(2, 3).flatten(2, 3)


def last_of_group(self, q, k, v, o, batch=0, keep=None, dropout_p=0.0, used=slice(None), *more):
    """Return dK and dV of the last query head instead of the group's sum."""
    group = q.shape[1] // k.shape[1]
    lone = [
        [x[:, h // group] if h % group == group - 1 else x[:, h // group].detach() for h in range(q.shape[1])]
        for x in (k, v)
    ]
    return step("sequence")(
        self, q, *(torch.stack(x, 1) for x in lone), o, batch, keep, dropout_p, used, *more
    )


SEQUENCES = [
    mutant(
        "row factors read by sequence",
        "test_given_n.test_as_many_sequences_as_rows",
        sequence=factors_by_sequence,
    ),
    mutant("given factors ignored", "test_given_n.test_dense", sequence=no_factors),
    mutant(
        "heads dealt out in turn",
        "test_gqa.test_groups",
        kv_head=lambda self, head, nheads, nheads_k: head % nheads_k,
    ),
    mutant("dK and dV not summed over the group", "test_gqa.test_groups", sequence=last_of_group),
    mutant("heads of a one-query group transposed", "test_gqa.test_one_query", dense=swapped_group_order),
    mutant(
        "averaged splits",
        "test_kvcache.test_splits_add_up",
        kvcache=merged_splits(lambda parts: parts.mean(0)),
    ),
    mutant(
        "the last split wins",
        "test_kvcache.test_splits_add_up",
        kvcache=merged_splits(lambda parts: parts[-1]),
    ),
    mutant(
        "empty splits add NaN",
        "test_kvcache.test_splits_add_up",
        kvcache=merged_splits(lambda parts: parts.where(parts != 0, math.nan).sum(0)),
    ),
    mutant(
        "averaged splits under a window",
        "test_kvcache.test_splits_that_a_window_empties",
        kvcache=merged_splits(lambda parts: parts.mean(0)),
    ),
    mutant("whole cache read", "test_kvcache.test_read_only", sequence=whole_sequence),
    mutant("one key past the end read", "test_finite.test_poisoned_cache", sequence=used_shifted(0, 1)),
    mutant("one key past seqused read", "test_finite.test_poisoned_padding", sequence=used_shifted(0, 1)),
    mutant("last key not read", "test_kvcache.test_append", sequence=used_shifted(0, -1)),
    mutant("left padding read", "test_kvcache.test_left_padding", sequence=without_left_padding),
    mutant("rotary position one too far", "test_kvcache.test_rotary", kvcache=kvcache_with(later_angles)),
    mutant("rotary layouts confused", "test_kvcache.test_rotary", kvcache=kvcache_with(other_layout)),
    mutant("every query turned by its own position", "test_kvcache.test_rotary", kvcache=all_queries_move),
    mutant(
        "slots ignored",
        "test_kvcache.test_batch_index",
        kvcache=kvcache_with(lambda a: {**a, "cache_batch_idx": None}),
    ),
    mutant(
        "new keys written one too far",
        "test_kvcache.test_append",
        write=lambda self, cache, row, slot, at, table: step("write")(self, cache, row, slot, at + 1, table),
    ),
    mutant(
        "new keys not written to the cache",
        "test_kvcache.test_append",
        kvcache=lambda self, q, k, v, *new, **o: step("kvcache")(self, q, k.clone(), v.clone(), *new, **o),
    ),
    mutant(
        "pages read in memory order",
        "test_kvcache.test_paged",
        gather=lambda self, pages, blocks: pages[blocks.long().sort().values].flatten(0, 1),
    ),
    mutant(
        "packed pages read in memory order",
        "test_varlen.test_paged",
        gather=lambda self, pages, blocks: pages[blocks.long().sort().values].flatten(0, 1),
    ),
    mutant(
        "neighbouring sequence read",
        "test_varlen.test_sequences_do_not_see_each_other",
        varlen=lambda self, q, k, v, *lengths, **o: step("varlen")(self, q, k.roll(1, 0), v, *lengths, **o),
    ),
]


# --- decay


def decay_of_later_keys_grows(self, h):
    """Take the signed distance, which only causal attention may."""
    return torch.exp((h.o.decay_slopes or 0.0) * distances(h.seqlen_q, h.seqlen_k).double())


DECAY = [
    mutant("no decay in dS", "test_decay.test_dense", decayed_again=lambda self, derivative, h: derivative),
    mutant("decay off by one", "test_decay.test_a_steep_slope_leaves_the_diagonal",
           decay=lambda self, h: step("decay")(self, h) * math.exp(-(h.o.decay_slopes or 0.0))),
    mutant("decay grows with later keys", "test_decay.test_dense", decay=decay_of_later_keys_grows),
    mutant("decay inside f", "test_decay.test_activations",
           function=lambda self, s, h: step("function")(self, step("decayed")(self, s, h), h),
           decayed=lambda self, p, h: p),
]  # fmt: skip


# --- recommenders' masks


def with_mask(change: Callable) -> Callable:
    """Return a step `visible` in which change(visible, rows, keys, history, mask) is seen. rows, keys: their
    positions, (seqlen_q, 1) and (seqlen_k,); history: where it ends.
    """

    def visible(self, h):
        seen, mask = step("visible")(self, h), h.o.mask
        rows = torch.arange(h.seqlen_k - h.seqlen_q, h.seqlen_k)[:, None]
        return change(seen, rows, torch.arange(h.seqlen_k), h.seqlen_k - mask.num_targets, mask) & (rows >= 0)

    return visible


def with_parts(**parts) -> Callable:
    """Return a step `visible` whose mask has other parts."""
    return lambda self, h: step("visible")(self, replace(h, o=replace(h.o, mask=h.o.mask._replace(**parts))))


def group_off_by_one(seen, rows, keys, history, mask):
    first = history + (rows - history + 1) // mask.target_group_size * mask.target_group_size - 1
    return torch.where((rows >= history) & (keys >= history), (keys >= first) & (keys <= rows), seen)


def window_from_the_candidate(seen, rows, keys, history, mask):
    too_far = (rows >= history) & (keys < history) & (rows - keys > (mask.max_attn_len or math.inf))
    return seen & (too_far.logical_not() | (keys < mask.num_contexts))


def window_over_contexts(seen, rows, keys, history, mask):
    """Let contextual keys lie as far as their index says."""
    near = rows.clamp(max=history) - keys <= (mask.max_attn_len or math.inf)
    of_history = (rows >= mask.num_contexts) & (keys < mask.num_contexts)
    return torch.where(of_history, near, seen)


RECOMMENDERS = [
    mutant("candidates see candidates", "test_hstu_masks.test_hstu",
           visible=with_parts(target_group_size=99)),
    mutant("candidates do not see themselves", "test_hstu_masks.test_hstu", visible=with_mask(
           lambda seen, rows, keys, history, mask: seen & ~((rows == keys) & (rows >= history)))),
    mutant("contextual rows see candidates", "test_hstu_masks.test_hstu", visible=with_mask(
           lambda seen, rows, keys, history, mask: seen | (rows < mask.num_contexts))),
    mutant("contextual rows are causal", "test_hstu_masks.test_hstu", visible=with_mask(
           lambda seen, rows, keys, history, mask: seen & (keys <= rows))),
    mutant("window counted from the candidate", "test_hstu_masks.test_hstu",
           visible=with_mask(window_from_the_candidate)),
    mutant("window counted over contextual keys", "test_hstu_masks.test_hstu",
           visible=with_mask(window_over_contexts)),
    mutant("max_attn_len ignored", "test_hstu_masks.test_hstu", visible=with_parts(max_attn_len=0)),
    mutant("no row sees everything", "test_hstu_masks.test_hstu",
           visible=with_parts(min_full_attn_seq_len=0)),
    mutant("group off by one", "test_hstu_masks.test_hstu", visible=with_mask(group_off_by_one)),
]  # fmt: skip

MUTANTS = MASKS + SCORES + DROPOUT + FUNCTIONS + SEQUENCES + DECAY + RECOMMENDERS


class SoftmaxCommentedOut(Oracle):
    """Upstream's dense attention with only ``softmax(scores)`` replaced by ``scores``."""

    filling = -math.inf

    def attend(self, q, k, v, o, slope, keep, dropout_p):
        return self.masked(q, k, v, o, slope, visibility(len(q), len(k), o))

    def masked(self, q, k, v, o, slope, visible):
        scores = (q * (q.shape[-1] ** -0.5 if o.softmax_scale is None else o.softmax_scale)) @ k.T
        scores = torch.tanh(scores / o.softcap) * o.softcap if o.softcap > 0 else scores
        bias = slope * distances(*visible.shape).abs()
        return self.function((scores - bias).to(q.dtype).masked_fill(~visible, self.filling), o) @ v

    def function(self, scores, o):
        return {
            "silu": F.silu,
            "relu": F.relu,
            "sigmoid": torch.sigmoid,
            "relu2": lambda s: F.relu(s) ** 2,
        }.get(o.activation, lambda s: s)(scores)

    def sequence(self, q, k, v, o, batch=0, keep=None, dropout_p=0.0, used=slice(None), *more):
        """Mask unused keys instead of cutting them off."""
        start, stop, _ = slice(*(None if x is None else int(x) for x in (used.start, used.stop))).indices(
            len(k)
        )
        visible = torch.zeros(len(q), len(k), dtype=torch.bool)
        visible[:, start:stop] = visibility(len(q), stop - start, o)
        group, out = q.shape[1] // k.shape[1], []
        for head in range(q.shape[1]):
            out.append(
                self.masked(
                    q[:, head], k[:, head // group], v[:, head // group], o, o.slope(batch, head), visible
                )
            )
        return torch.stack(out, 1)


class MaskedWithZero(SoftmaxCommentedOut):
    """The same with 0 for -inf: only the mask is right, and only for the identity."""

    filling = 0.0
