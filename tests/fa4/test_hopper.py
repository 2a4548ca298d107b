"""Test the Hopper kernels beyond tests/attention, which also runs on them: memory behind seqused and in free
pages, head sizes, forced pack_gqa, determinism, the user's own functions and blocks, CUDA graphs,
torch.compile, and saturation of tanh.approx.

Formulas and refusals are tested without a GPU, in test_formulas.py, test_checks.py and test_public.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mods import causal_with_gaps, even_distance, square, square_bwd

import oracle
from measure import (
    NAMES,
    compare,
    compare_output,
    compare_results,
    gradients,
    packed,
    poison_allocator,
    poisoned,
    qkv,
    randn,
)

NAN = float("nan")
LENGTHS = dict(lengths_q=[263, 1, 76, 150], lengths_k=[259, 218, 0, 77])
MASKED = [
    dict(activation="sigmoid"),
    dict(activation="silu", causal=True),
    dict(window_size=(64, 10), normalization="1/n"),
]


def check(run, q, k, v, **arguments) -> None:
    """Compare output and gradients of a call with the oracle, which takes ``arguments``."""
    dout = randn(*q.shape[:-1], v.shape[-1], seed=99).to(q)
    compare_results(gradients(run, q, k, v, dout=dout), q, k, v, dout, **arguments)


# --- Unused memory


@pytest.mark.parametrize("layout", ["batch", "packed"])
@pytest.mark.parametrize("options", MASKED, ids=str)
def test_nothing_behind_seqused_is_read(hopper, layout, options):
    """The result is that of the used parts alone, and 0 behind seqused."""
    batch, seqlen = len(LENGTHS["lengths_q"]), 300
    q, k, v = packed(hopper, **LENGTHS, head_dim=64)
    dout = randn(*q.shape, seed=99, like=hopper)
    used = [
        LENGTHS[name] for name in ("lengths_q", "lengths_q", "lengths_k", "lengths_k")
    ]  # used lengths of out and dout, q, k, v

    def slots(x, lengths):
        padded = torch.stack(
            [F.pad(s, (0, 0, 0, 0, 0, seqlen - len(s)), value=NAN) for s in x.split(lengths)]
        )
        return padded.flatten(0, 1) if layout == "packed" else padded

    dout_, *tensors = map(slots, (dout, q, k, v), used)
    whole = dict(lengths_q=[seqlen] * batch, lengths_k=[seqlen] * batch) if layout == "packed" else {}
    seqused = {f"seqused_{x}": hopper.integers(LENGTHS[f"lengths_{x}"]) for x in "qk"}
    results = gradients(lambda *x: hopper.varlen(*x, **whole, **seqused, **options), *tensors, dout=dout_)
    results = [x.view(batch, seqlen, *x.shape[-2:]) for x in results]
    tight = tuple(torch.cat([s[:n] for s, n in zip(x, lengths)]) for x, lengths in zip(results, used))
    compare_results(tight, q, k, v, dout, "varlen", **LENGTHS, **options)
    for name, x, lengths in zip(NAMES, results, used):
        assert all((s[n:] == 0).all() for s, n in zip(x, lengths)), f"{name} is not 0 behind seqused"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("options", MASKED, ids=str)
def test_neighbours_in_a_packed_batch_are_not_read(hopper, head_dim, options):
    """NaN in every second sequence does not affect the others."""
    lengths = dict(lengths_q=[200, 150, 333, 64], lengths_k=[190, 77, 333, 130])
    q, k, v = packed(hopper, **lengths, head_dim=head_dim)
    dout = randn(*q.shape, seed=99, like=hopper)
    queries, keys = (
        torch.arange(4).repeat_interleave(torch.tensor(n)).to(hopper.device) % 2 == 0
        for n in lengths.values()
    )
    good = queries, queries, keys, keys
    poisoned_dout, *tensors = (poisoned(x, ~rows) for x, rows in zip((dout, q, k, v), good))
    results = gradients(lambda *x: hopper.varlen(*x, **lengths, **options), *tensors, dout=poisoned_dout)
    results = tuple(x[rows] for x, rows in zip(results, good))
    kept = {name: n[::2] for name, n in lengths.items()}
    compare_results(results, q[queries], k[keys], v[keys], dout[queries], "varlen", **kept, **options)


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("lengths_q, nheads", [([70, 3, 9], 2), ([1, 1, 1], 8)], ids=["prefill", "decode"])
def test_free_slots_of_pages_are_not_read(hopper, page_size, lengths_q, nheads):
    lengths_k = [400, 77, page_size]
    pages = -(-max(lengths_k) // page_size)
    table = hopper.integers(
        torch.randperm(3 * pages + 3, generator=torch.Generator().manual_seed(0))[: 3 * pages].tolist()
    ).view(3, pages)
    k, v = (randn(3 * pages + 3, page_size, 2, 64, seed=i, like=hopper) for i in (1, 2))
    free = torch.ones(3 * pages + 3, page_size, dtype=torch.bool)
    for row, length in zip(table.tolist(), lengths_k):
        for i, page in enumerate(row):
            free[page, : max(length - i * page_size, 0)] = False
    q = randn(sum(lengths_q), nheads, 64, seed=0, like=hopper)
    lengths = dict(lengths_q=lengths_q, lengths_k=lengths_k, block_table=table)
    compare_output(
        hopper,
        q,
        *(poisoned(x, free.to(x.device)) for x in (k, v)),
        method="varlen",
        **lengths,
        activation="silu",
        causal=True,
    )


@pytest.mark.parametrize(
    "options, unseen",
    [
        (dict(causal=True, activation="silu"), 230),
        (dict(causal=True, activation="sigmoid", normalization="1/n"), 230),
        (dict(window_size=(-1, 10), activation="relu", normalization="1/visible"), 220),
    ],
    ids=str,
)
@pytest.mark.parametrize("nheads_k", [1, 2])
def test_queries_that_see_no_key_reach_no_gradient(hopper, nheads_k, options, unseen):
    """Such queries share a tile with queries that see keys."""
    q, k, v = qkv(hopper, 2, 300, 70, nheads_k=nheads_k, head_dim=64)
    dout = randn(*q.shape, seed=99, like=hopper)
    rows = slice(None), slice(0, unseen)
    results = gradients(
        lambda *x: hopper.dense(*x, **options), poisoned(q, rows), k, v, dout=poisoned(dout, rows)
    )
    compare_results(results, q, k, v, dout, **options)
    assert not results[0][rows].any() and not results[1][rows].any()


# --- Shapes and schedules


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [8, 40, 48, 72, 104, 136, 200, 256])
def test_every_head_size_is_rounded_alike_by_all_kernels(hopper, head_dim, causal):
    compare(hopper, *qkv(hopper, 1, 260, 260, head_dim=head_dim), activation="silu", causal=causal)


@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 128), (128, 64), (192, 128), (256, 64), (40, 72)])
def test_v_may_have_another_head_size(hopper, head_dim, head_dim_v):
    q, k, v = (
        randn(2, 300, 2, size, seed=i, like=hopper) for i, size in enumerate((head_dim, head_dim, head_dim_v))
    )
    check(
        lambda *x: hopper.dense(*x, activation="silu", causal=True), q, k, v, activation="silu", causal=True
    )


def test_forward_takes_a_wider_v_than_the_backward(hopper):
    q, k, v = (randn(2, 300, 2, size, seed=i, like=hopper) for i, size in enumerate((64, 64, 256)))
    compare_output(hopper, q, k, v, method="dense", activation="silu", causal=True)


@pytest.mark.parametrize("pack_gqa", [False, True])
@pytest.mark.parametrize("nheads, nheads_k, head_dim", [(8, 2, 128), (8, 1, 64), (6, 2, 40)])
def test_packing_the_heads_of_a_group_changes_nothing(hopper, nheads, nheads_k, head_dim, pack_gqa):
    tensors = qkv(hopper, 2, 150, 190, nheads=nheads, nheads_k=nheads_k, head_dim=head_dim)
    options = dict(activation="silu", causal=True, normalization="1/visible")
    check(lambda *x: hopper.dense(*x, pack_gqa=pack_gqa, **options), *tensors, **options)


@pytest.mark.parametrize("nheads_k", [1, 4])
@pytest.mark.parametrize(
    "method, lengths", [("dense", {}), ("varlen", dict(lengths_q=[200, 500], lengths_k=[190, 510]))]
)
def test_deterministic_runs_are_equal_bit_for_bit(hopper, method, lengths, nheads_k):
    tensors = [
        x.flatten(0, 1) if lengths else x
        for x in qkv(hopper, 1, 700, 700, nheads=4, nheads_k=nheads_k, head_dim=64)
    ]
    options = dict(activation="silu", causal=True, deterministic=True, **lengths)
    runs = [gradients(lambda *x: getattr(hopper, method)(*x, **options), *tensors) for _ in range(4)]
    compare_results(runs[0], *tensors, randn(*tensors[0].shape, seed=99).to(tensors[0]), method, **options)
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


@pytest.mark.parametrize("nheads_k", [1, 4])
@pytest.mark.parametrize("head_dim", [128, 240, 256])
@pytest.mark.parametrize("options", MASKED, ids=str)
def test_tiles_of_the_backward_that_are_not_upstreams(hopper, head_dim, nheads_k, options):
    """Our own tiles serve dense and packed calls, grouped heads, and sums in a fixed order."""
    tensors = qkv(hopper, 1, 300, 270, nheads=4, nheads_k=nheads_k, head_dim=head_dim)
    check(lambda *x: hopper.dense(*x, deterministic=True, **options), *tensors, **options)
    tensors = packed(hopper, **LENGTHS, nheads=4, nheads_k=nheads_k, head_dim=head_dim)
    dout = randn(*tensors[0].shape, seed=99, like=hopper)
    results = gradients(lambda *x: hopper.varlen(*x, **LENGTHS, **options), *tensors, dout=dout)
    compare_results(results, *tensors, dout, "varlen", **LENGTHS, **options)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(causal=True, activation="silu", normalization="1/n"), dict(deterministic=True)],
    ids=str,
)
@pytest.mark.parametrize("nheads_k, dtype", [(4, torch.bfloat16), (1, torch.float16)])
def test_calls_that_look_the_same_use_their_own_tensors(hopper, nheads_k, dtype, options):
    """Calls after the first repeat its launches."""
    for seed in range(3):
        compare(
            hopper,
            *qkv(hopper, 2, 300, 290, nheads=4, nheads_k=nheads_k, head_dim=64, dtype=dtype, seed=seed),
            **options,
        )


# --- Factors and biases that the caller gives


def factors(like, *shape: int) -> torch.Tensor:
    """Float32 factors, all different, one of them 0."""
    return torch.linspace(0.0, 2.0, torch.Size(shape).numel()).reshape(shape).to(like.device)


def biases(like, *shape: int) -> torch.Tensor:
    return torch.linspace(-5.0, 2.0, torch.Size(shape).numel()).reshape(shape).to(like.device)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", [*MASKED[:2], dict(window_size=(64, 10))], ids=str)
@pytest.mark.parametrize("shape", [None, (2,), (2, 300)], ids=str)
def test_given_factors(hopper, head_dim, options, shape):
    given = 1 / 270 if shape is None else factors(hopper, *shape)
    tensors = qkv(hopper, 2, 300, 270, nheads=4, nheads_k=2, head_dim=head_dim)
    check(
        lambda *x: hopper.dense(*x, **options, normalization=given), *tensors, **options, normalization=given
    )


@pytest.mark.parametrize("pack_gqa", [False, True])
@pytest.mark.parametrize("nheads, nheads_k", [(8, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_dim, shape", [(64, (1,)), (128, (2,))])
def test_heads_have_their_own_biases(hopper, nheads, nheads_k, head_dim, shape, pack_gqa):
    """The heads are those of the queries, with a group packed into a tile or not, and rows keep their
    factors.
    """
    tensors = qkv(hopper, 2, 150, 190, nheads=nheads, nheads_k=nheads_k, head_dim=head_dim)
    options = dict(
        activation="sigmoid", causal=True, normalization=factors(hopper, 2, 150),
        sigmoid_bias=biases(hopper, *(() if shape == (1,) else shape), nheads),
    )  # fmt: skip
    check(lambda *x: hopper.dense(*x, pack_gqa=pack_gqa, **options), *tensors, **options)


@pytest.mark.parametrize("nheads_k", [1, 4])
@pytest.mark.parametrize("count", [len(LENGTHS["lengths_q"]), sum(LENGTHS["lengths_q"])])
def test_given_factors_and_biases_of_packed_sequences(hopper, nheads_k, count):
    tensors = packed(hopper, **LENGTHS, nheads=4, nheads_k=nheads_k, head_dim=64)
    dout = randn(*tensors[0].shape, seed=99, like=hopper)
    options = dict(
        activation="sigmoid", sigmoid_bias=biases(hopper, len(LENGTHS["lengths_q"]), 4),
        normalization=factors(hopper, count), deterministic=True,
    )  # fmt: skip
    for _ in range(2):  # the second call repeats the launches of the first
        results = gradients(lambda *x: hopper.varlen(*x, **LENGTHS, **options), *tensors, dout=dout)
        compare_results(results, *tensors, dout, "varlen", **LENGTHS, **options)
        options["normalization"] = options["normalization"].flip(0)
        options["sigmoid_bias"] = options["sigmoid_bias"].flip(0)


@pytest.mark.parametrize("by_row", [False, True])
def test_given_factors_with_seqused(hopper, by_row):
    """Factors behind seqused are not read: NaN there reaches nothing."""
    used_q, used_k, seqlen = LENGTHS["lengths_q"], LENGTHS["lengths_k"], 300
    q, k, v = packed(hopper, **LENGTHS, head_dim=64)
    dout = randn(*q.shape, seed=99, like=hopper)

    def slots(x, lengths, value):
        more = (0, 0) * (x.dim() - 1)
        return torch.stack([F.pad(s, (*more, 0, seqlen - len(s)), value=value) for s in x.split(lengths)])

    given = factors(hopper, sum(used_q) if by_row else len(used_q))
    padded = slots(given, used_q, NAN) if by_row else given
    seqused = dict(seqused_q=hopper.integers(used_q), seqused_k=hopper.integers(used_k))
    results = gradients(
        lambda *x: hopper.varlen(*x, **seqused, activation="silu", normalization=padded),
        *(slots(x, lengths, 0.0) for x, lengths in zip((q, k, v), (used_q, used_k, used_k))),
        dout=slots(dout, used_q, 0.0),
    )
    results = tuple(
        torch.cat([s[:n] for s, n in zip(x, lengths)])
        for x, lengths in zip(results, (used_q, used_q, used_k, used_k))
    )
    compare_results(results, q, k, v, dout, "varlen", **LENGTHS, activation="silu", normalization=given)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", ["number", "sequences", "rows"])
def test_the_size_of_given_factors_does_not_meet_float16(hopper, kind, head_dim):
    """A power of two that all factors share, and that dout undoes, changes no bit of dv: weights of that
    size would be subnormal in float16.
    """
    q, k, v = qkv(hopper, 2, 200, 200, head_dim=head_dim, dtype=torch.float16)
    dout = randn(*q.shape, seed=99).to(q).sign()
    given = {"number": 0.5, "sequences": factors(hopper, 2), "rows": factors(hopper, 2, 200)}[kind]

    def dv(size):
        run = lambda *x: hopper.dense(*x, activation="silu", normalization=given * size)  # noqa: E731
        return gradients(run, q, k, v * size, dout=dout / size)[3]

    assert dv(1.0).any() and torch.equal(dv(1.0), dv(2.0**-14))


@pytest.mark.parametrize("causal", [False, True])
def test_given_factors_of_more_sequences_than_a_grid_has_blocks(hopper, causal):
    batch = 65_537
    tensors = [randn(batch, 3, 2, 8, seed=i, like=hopper) for i in range(3)]
    given, bias = factors(hopper, batch, 3), biases(hopper, batch, 2)
    dout = torch.ones_like(tensors[0])

    def run(part):
        options = dict(
            activation="sigmoid", normalization=given[part], sigmoid_bias=bias[part], causal=causal
        )
        return gradients(lambda *x: hopper.dense(*x, **options), *(x[part] for x in tensors), dout=dout[part])

    for whole, alone in zip(run(slice(None)), run(slice(-2, None))):
        torch.testing.assert_close(whole[-2:], alone)


def test_given_factors_of_queries_that_see_no_key_do_not_count(hopper):
    q, k, v = qkv(hopper, 2, 300, 70, head_dim=64)
    given = factors(hopper, 2, 300)
    given[:, :230] = NAN
    rows = q[:, 230:]
    dout = randn(*rows.shape, seed=99).to(rows)
    results = gradients(
        lambda *x: hopper.dense(*x, causal=True, normalization=given)[:, 230:], q, k, v, dout=dout
    )
    compare_results(
        (results[0], results[1][:, 230:], *results[2:]), rows, k, v, dout, causal=True,
        normalization=given[:, 230:],
    )  # fmt: skip


# --- The user's own functions


def seen_by(mask_mod, q, k) -> torch.Tensor:
    """Return the mask for the oracle: (batch, nheads, seqlen_q, seqlen_k) bool."""
    seen = mask_mod(None, None, torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1]))
    return seen.expand(q.shape[0], q.shape[2], -1, -1)


@pytest.mark.parametrize(
    "options", [dict(), dict(causal=True), dict(causal=True, normalization="1/visible")], ids=str
)
def test_a_score_mod_is_the_weight(hopper, monkeypatch, options):
    monkeypatch.setitem(oracle.FUNCTIONS, "square", lambda s, bias: s.square())
    mods = dict(score_mod=square, score_mod_bwd=square_bwd)
    check(
        lambda *x: hopper.dense(*x, **mods, **options),
        *qkv(hopper, 2, 300, 300, head_dim=64),
        activation="square",
        **options,
    )


@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
def test_a_mask_mod_hides_after_the_activation(hopper, activation):
    q, k, v = qkv(hopper, 2, 300, 270, head_dim=64)
    run = lambda *x: hopper.dense(*x, mask_mod=even_distance, activation=activation)  # noqa: E731
    check(run, q, k, v, activation=activation, keep=seen_by(even_distance, q, k))


@pytest.mark.parametrize("given", [1 / 270, (2,), (2, 300)], ids=str)
def test_given_factors_and_biases_beside_a_mask_mod(hopper, given):
    q, k, v = qkv(hopper, 2, 300, 270, nheads=4, head_dim=64)
    options = dict(
        activation="sigmoid", sigmoid_bias=biases(hopper, 4),
        normalization=given if isinstance(given, float) else factors(hopper, *given),
    )  # fmt: skip
    run = lambda *x: hopper.dense(*x, mask_mod=even_distance, **options)  # noqa: E731
    check(run, q, k, v, keep=seen_by(even_distance, q, k), **options)


@pytest.mark.parametrize("hidden", [0.0, NAN])
@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
def test_blocks_that_are_not_listed_are_not_read(hopper, activation, hidden):
    """Blocks of 128 x 128 may be full, partial or empty, in forward and backward."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = qkv(hopper, 2, 512, 512, head_dim=64)
    k[:, 128:256] = v[:, 128:256] = 0
    dout = randn(*q.shape, seed=99, like=hopper)
    lists = create_block_mask(causal_with_gaps, None, None, 512, 512, hopper.device, 128).as_tuple()[2:10]
    by_query, by_key = (
        BlockSparseTensorsTorch(*some, block_size=(128, 128)) for some in (lists[:4], lists[4:])
    )
    options = dict(mask_mod=causal_with_gaps, block_sparse_tensors=by_query, block_sparse_tensors_bwd=by_key)
    keys = (poisoned(x, (slice(None), slice(128, 256)), hidden) for x in (k, v))
    results = gradients(lambda *x: hopper.dense(*x, activation=activation, **options), q, *keys, dout=dout)
    compare_results(results, q, k, v, dout, activation=activation, keep=seen_by(causal_with_gaps, q, k))


# --- Torch around the kernels


def test_a_captured_graph_replays_on_other_numbers(hopper):
    options = dict(causal=True, activation="relu", normalization="1/n")
    q, k, v = (x.requires_grad_() for x in qkv(hopper, 2, 512, 512, head_dim=64))
    dout = randn(*q.shape, seed=98, like=hopper)

    def step():
        out = hopper.dense(q, k, v, **options)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x, new in zip((q, k, v), qkv(hopper, 2, 512, 512, head_dim=64, seed=1)):
            x.copy_(new)
    graph.replay()
    compare_results(captured, q, k, v, dout, **options)


def test_torch_compile_gives_the_eager_result_in_one_graph(hopper):
    from flash_attn.cute import flash_attn_func

    def attend(q, k, v):
        return flash_attn_func(
            q,
            k,
            v,
            causal=True,
            deterministic=True,
            use_softmax=False,
            activation="silu",
            normalization="1/n",
        )[0]

    tensors = qkv(hopper, 2, 300, 300, head_dim=64)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(attend, fullgraph=True, backend="aot_eager"), *tensors)
    assert all(map(torch.equal, compiled, gradients(attend, *tensors)))


def test_operators_pass_opcheck(hopper):
    from flash_attn.cute.nosoftmax import ops
    from flash_attn.cute.nosoftmax.call import TENSORS, Options

    q, k, v = (x.requires_grad_() for x in qkv(hopper, 2, 64, 64, head_dim=64))
    shared = dict(
        max_seqlen_q=64, max_seqlen_k=64, dropout_p=0.0, softmax_scale=0.1, window_left=-1, window_right=0,
        softcap=0.0, deterministic=False, return_attn_probs=False, activation="sigmoid", sigmoid_bias=0.0,
        normalization=None, factor=1.0,
    )  # fmt: skip
    given = factors(hopper, 2, 64), biases(hopper, 2)
    more = (None,) * (TENSORS + 1 - 11)  # with seqused_q
    options = *(None,) * 6, *given, *more, *Options(**shared), None, None, False
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.forward, (q, k, v, *options), test_utils=checks)
    torch.library.opcheck(ops.backward, (*(x.detach() for x in (q, q, k, v)), *options), test_utils=checks)


def test_softmax_is_upstreams_beside_a_call_without(hopper):
    """For equal shapes, calls with and without softmax are different kernels under different keys."""
    tensors = qkv(hopper, 2, 300, 300, head_dim=64)
    for use_softmax in (False, True, False):
        compare(hopper, *tensors, causal=True, use_softmax=use_softmax)


# --- The ends of the range


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_tanh_saturates_where_it_must(hopper, activation):
    """With one query and one key a sequence, the output is f(s) and dk is f'(s). tanh.approx is off by 2^-11,
    which counts s times in f and f' of silu. At large s it must be 1, or s * (1 - tanh^2) is meaningless.
    """
    s = torch.tensor(
        [sign * x for x in (3.0, 5.0, 7.0, 9.0, 10.0, 16.0, 100.0, 6e4) for sign in (1, -1)],
        dtype=torch.float64,
    )
    unit = F.one_hot(torch.zeros(len(s), 1, 1, dtype=torch.long), 8).to(hopper.device, torch.float16)
    k = unit * s.to(unit)[:, None, None, None]
    out, _, dk, _ = gradients(
        lambda *x: hopper.dense(*x, softmax_scale=1.0, activation=activation), unit, k, unit, dout=unit
    )
    value, derivative = gradients(lambda s: oracle.FUNCTIONS[activation](s, 0.0), s, dout=torch.ones_like(s))
    for name, actual, expected in (("f", out, value), ("f'", dk, derivative)):
        allowed = 1e-3 * (1 + s.abs().clamp(max=16) + expected.abs())
        error = (actual[:, 0, 0, 0].double().cpu() - expected).abs()
        assert (error <= allowed).all(), (
            f"{name} at {s[error > allowed].tolist()} is off by {error[error > allowed].tolist()}"
        )


@pytest.mark.parametrize("activation", list(oracle.FUNCTIONS))
@pytest.mark.parametrize(
    "dtype, largest", [(torch.float16, 65504.0), (torch.bfloat16, 1e9)], ids=["float16", "bfloat16"]
)
def test_largest_inputs_of_grouped_heads(hopper, dtype, largest, activation):
    """The output stays finite. Gradients, whose sums pass through other kernels, show it if float16 cannot
    hold them.
    """
    q, k, v = (
        x.sign() * largest for x in qkv(hopper, 1, 300, 300, nheads=8, nheads_k=2, head_dim=64, dtype=dtype)
    )
    dout = randn(*q.shape, seed=99).to(q).sign() * largest
    out, _, _, dv = gradients(
        lambda *x: hopper.dense(*x, causal=True, activation=activation), q, k, v, dout=dout
    )
    assert torch.isfinite(out).all(), (
        f"out has {(~torch.isfinite(out)).sum()} of {out.numel()} values NaN or Inf"
    )
    if dtype == torch.float16:
        assert not torch.isfinite(dv).all()


@pytest.mark.parametrize("nheads_k", [1, 2])
def test_gradients_that_overflow_float16_show(hopper, nheads_k):
    """dq and dk overflow through dS, dv through its sum. A loss scale that is small enough makes them
    right.
    """
    q, k, v = qkv(hopper, 1, 200, 200, nheads=2, nheads_k=nheads_k, head_dim=64, dtype=torch.float16)
    for scale, finite in ((1.0, True), (2.0**13, False)):  # dout itself stays finite
        dout = randn(*q.shape, seed=99).to(q) * scale
        _, *grads = gradients(lambda *x: hopper.dense(*x, activation="silu"), q, k, v, dout=dout)
        assert [bool(torch.isfinite(x).all()) for x in grads] == [finite] * 3


SCORES = ["identity", "relu", "relu2", "sigmoid", "silu", "gelu", "softplus"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", SCORES)
@pytest.mark.parametrize(
    "options", [dict(), dict(causal=True), dict(causal=True, normalization="1/visible")], ids=str
)
def test_what_is_not_finite_shows(hopper, dtype, activation, options):
    """A non-finite value shows in every result of its sequence that depends on it, in tiles with and without
    masked keys, and in no other sequence.
    """
    tensors = qkv(hopper, 2, 400, 400, nheads=2, head_dim=64, dtype=dtype)
    dout = randn(*tensors[0].shape, seed=99).to(tensors[0])
    run = lambda *x: hopper.dense(*x, activation=activation, **options)  # noqa: E731
    row, causal = 201, "causal" in options
    seen, seeing = slice(0, row + 1 if causal else 400), slice(row if causal else 0, 400)
    for value in (NAN, float("inf"), -float("inf")):
        for which, name in enumerate("qkv"):
            place = 1, row, 0, 5
            out, dq, dk, dv = gradients(
                run,
                *(poisoned(x, place, value) if i == which else x for i, x in enumerate(tensors)),
                dout=dout,
            )
            assert all(
                torch.isfinite(x[0]).all() and torch.isfinite(x[1, :, 1]).all() for x in (out, dq, dk, dv)
            )
            nan = value != value
            if name == "q":
                # relu and softplus make -Inf finite, sigmoid both; with so many keys a row has +Inf too.
                shown = [out[1, row, 0]] if nan or activation != "sigmoid" else []
                shown += [dk[1, seen, 0, 5]]
                shown += [dv[1, seen, 0]] if nan or activation == "identity" else []
            elif name == "k":
                shown = [out[1, seeing, 0]] if nan or activation == "identity" else []
                shown += [dq[1, seeing, 0, 5]]
            else:
                shown = [out[1, seeing, 0, 5]]
            for x in shown:
                assert not torch.isfinite(x).any(), f"{value} in {name} is lost"


def test_an_infinite_dout_shows(hopper):
    q, k, v = qkv(hopper, 1, 300, 300, nheads=2, head_dim=64, dtype=torch.float16)
    dout = poisoned(torch.ones_like(q), (0, 7, 0, 3), float("inf"))
    _, dq, dk, dv = gradients(lambda *x: hopper.dense(*x, activation="silu"), q, k, v, dout=dout)
    assert not any(torch.isfinite(x).any() for x in (dq[0, 7, 0], dk[0, :, 0], dv[0, :, 0, 3]))


# --- Rows of no sequence, and many sequences


@pytest.mark.parametrize("nheads_k", [1, 2])
@pytest.mark.parametrize("first, slack", [(0, 300), (5, 0), (3, 1)])
def test_rows_of_no_sequence_are_zero(hopper, nheads_k, first, slack):
    """Rows of no sequence are 0, also in the second call, which repeats the launches of the first."""
    from flash_attn.cute import flash_attn_varlen_func

    lengths = [100, 1, 130]
    ends = torch.tensor([0, *lengths]).cumsum(0) + first
    cu = ends.to(hopper.device, torch.int32)
    total = int(ends[-1]) + slack
    q, k, v = (randn(total, n, 64, seed=i, like=hopper) for i, n in enumerate((2, nheads_k, nheads_k)))
    dout = randn(*q.shape, seed=99, like=hopper)
    options = dict(
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        max_seqlen_q=130,
        max_seqlen_k=130,
        activation="silu",
        use_softmax=False,
    )
    inside = slice(first, int(ends[-1]))
    for _ in range(2):
        poison_allocator(hopper.device)
        results = gradients(lambda *x: flash_attn_varlen_func(*x, **options)[0], q, k, v, dout=dout)
        assert not any(x[:first].any() or x[int(ends[-1]) :].any() for x in results)
        inner = (x[inside] for x in (q, k, v, dout))
        compare_results(
            tuple(x[inside] for x in results),
            *inner,
            "varlen",
            lengths_q=lengths,
            lengths_k=lengths,
            activation="silu",
        )


@pytest.mark.parametrize("causal", [False, True])
def test_more_sequences_than_a_grid_has_blocks(hopper, causal):
    """The last sequences give the same as alone."""
    batch = 65_537
    tensors = [
        randn(1, 3, 2, 8, seed=i, like=hopper).expand(batch, -1, -1, -1).contiguous() for i in range(3)
    ]
    with torch.no_grad():
        for i, x in enumerate(tensors):
            x[-2:] = randn(2, 3, 2, 8, seed=10 + i, like=hopper)
    run = lambda *x: hopper.dense(*x, activation="silu", causal=causal)  # noqa: E731
    dout = torch.ones_like(tensors[0])
    whole = gradients(run, *tensors, dout=dout)
    for part, alone in zip(whole, gradients(run, *(x[-2:] for x in tensors), dout=dout[-2:])):
        torch.testing.assert_close(part[-2:], alone)
