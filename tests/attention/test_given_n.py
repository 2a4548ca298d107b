"""Test factors and biases that the caller gives: a number, or a tensor for sequences, rows or heads."""

from __future__ import annotations

import flash_attn
import pytest
import torch

from caches import CAPACITY, LENGTHS, caches, check, step
from measure import compare, compare_output, gradients, integers, packed, qkv, randn, slopes
from package import cumulative

RAGGED = (5, 0, 9, 2)
SCORES = [
    dict(activation="identity"),
    dict(activation="silu"),
    dict(activation="sigmoid", sigmoid_bias="-log n"),
]


def factors(like, *shape: int) -> torch.Tensor:
    """Float32 factors, all different, one of them 0."""
    return torch.linspace(0.0, 2.0, torch.Size(shape).numel()).reshape(shape).to(like.device)


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score["activation"])
@pytest.mark.parametrize("shape", [None, (2,), (2, 20)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dense(attention, score, shape, causal):
    """A factor may be one number, or one for each sequence or each query."""
    given = 1 / 24 if shape is None else factors(attention, *shape)
    tensors = qkv(attention, 2, 20, 24, nheads=4, nheads_k=2)
    compare(attention, *tensors, causal=causal, normalization=given, **score)


@pytest.mark.parametrize("normalization", [1 / 24, "1/n", "1/sqrt(n)", "1/visible"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_bfloat16(attention, normalization, dropout_p):
    """Factors that all rows share, which the CUDA extension takes in this dtype."""
    tensors = qkv(attention, 2, 20, 24, nheads=4, nheads_k=2, dtype=torch.bfloat16)
    if dropout_p == 0.0:
        compare(attention, *tensors, normalization=normalization)
        return
    out, keep = attention.dropped(*tensors, dropout_p, 3, normalization=normalization)
    plain, kept = attention.dropped(*tensors, dropout_p, 3)
    assert torch.equal(keep, kept)
    factor = {"1/sqrt(n)": 24**-0.5, 1 / 24: 1 / 24}.get(normalization, 1 / 24)
    torch.testing.assert_close(out.float(), plain.float() * factor, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score["activation"])
@pytest.mark.parametrize("count", [None, len(RAGGED), sum(RAGGED)], ids=str)
def test_packed(attention, score, count):
    given = 1 / 24 if count is None else factors(attention, count)
    tensors = packed(attention, RAGGED, RAGGED, nheads=4)
    compare(
        attention, *tensors, method="varlen", lengths_q=RAGGED, lengths_k=RAGGED, causal=True,
        normalization=given, **score,
    )  # fmt: skip


@pytest.mark.scores
@pytest.mark.parametrize("size", [2.0**-118, 2.0**127])
def test_extreme_factors(attention, size):
    """A kernel divides the factors of rows by the largest, and a fast division by 2^127 gives 0. The sizes of
    v and dout keep everything else within float32's normal numbers: kernels may take smaller ones for 0.
    """
    q, k, v = qkv(attention, 2, 20, 24, dtype=torch.bfloat16)
    dout = randn(*q.shape, seed=99).to(q) * size ** (-1 / 16)
    given = factors(attention, 2, 20) / 2 * size
    compare(attention, q, k, v * size ** (-7 / 8), dout, normalization=given, activation="silu")


def test_as_many_sequences_as_rows(attention):
    """If both readings fit, a tensor has a factor for each row."""
    lengths = (2, 0, 1)
    tensors = packed(attention, lengths, lengths)
    given = factors(attention, 3)
    compare(attention, *tensors, method="varlen", lengths_q=lengths, lengths_k=lengths, normalization=given)


@pytest.mark.parametrize("batch, seqlen_q", [(2, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("by_row", [False, True])
def test_nothing_to_normalize(attention, batch, seqlen_q, by_row):
    given = factors(attention, *((batch, seqlen_q) if by_row else (batch,)))
    tensors = qkv(attention, batch, seqlen_q, 6)
    results = gradients(lambda *x: attention.dense(*x, normalization=given), *tensors)
    assert all(x.shape == like.shape and not x.any() for x, like in zip(results, (tensors[0], *tensors)))


@pytest.mark.parametrize("given", [0.02, (3,), (3, 2)], ids=str)
def test_cache(attention, given):
    """A given factor applies when two tokens are appended to each sequence, whatever the lengths."""
    lengths = integers(attention, *LENGTHS)
    given = given if isinstance(given, float) else factors(attention, *given)
    new = step(attention, seqlen=2)
    check(
        attention, new[0], *caches(attention), *new[1:], cache_seqlens=lengths, causal=True,
        activation="silu", normalization=given,
    )  # fmt: skip


@pytest.mark.scores
@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=str)
def test_bias_of_each_head(attention, shape):
    tensors = qkv(attention, 2, 20, 24, nheads=4, nheads_k=2)
    bias = slopes(attention, *shape) - 1.0
    compare(attention, *tensors, activation="sigmoid", sigmoid_bias=bias, causal=True)


@pytest.mark.scores
@pytest.mark.parametrize("shape", [(4,), (len(RAGGED), 4)], ids=str)
def test_bias_of_each_head_packed(attention, shape):
    tensors = packed(attention, RAGGED, RAGGED, nheads=4)
    compare(
        attention, *tensors, method="varlen", lengths_q=RAGGED, lengths_k=RAGGED, activation="sigmoid",
        sigmoid_bias=slopes(attention, *shape) - 1.0, normalization="1/n",
    )  # fmt: skip


@pytest.mark.scores
def test_bias_in_a_cache(attention):
    lengths = integers(attention, *LENGTHS)
    q, k, v = step(attention)
    bias = slopes(attention, 3, 4) - 1.0
    compare_output(
        attention, q, *caches(attention), k, v, method="kvcache", cache_seqlens=lengths,
        activation="sigmoid", sigmoid_bias=bias,
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_decoding_equals_prefill(attention, activation):
    """Decoding token by token equals one full pass with a number as factor; with "1/n" they differ."""
    q, k, v = qkv(attention, 2, 12, 12)
    options = dict(causal=True, activation=activation)
    whole = attention.dense(q, k, v, normalization=1 / 12, **options)
    cache = [torch.zeros(2, CAPACITY, *x.shape[2:]).to(x) for x in (k, v)]
    steps = {
        given: torch.cat([
            attention.kvcache(
                *(x[:, i : i + 1] for x in (q,)), *cache, k[:, i : i + 1], v[:, i : i + 1],
                cache_seqlens=integers(attention, i, i), normalization=given, **options,
            )
            for i in range(12)
        ], dim=1)
        for given in (1 / 12, "1/n")
    }  # fmt: skip
    tolerance = dict(rtol=0.0, atol=1e-12 if whole.dtype == torch.float64 else 1e-2)
    torch.testing.assert_close(steps[1 / 12], whole, **tolerance)
    assert (steps["1/n"] - attention.dense(q, k, v, normalization="1/n", **options)).abs().max() > 0.05


def test_parts_add_up(attention):
    """Parts over disjoint keys add up if the factor is the whole sequence's, as a number."""
    q, k, v = qkv(attention, 2, 12, 24)
    whole = attention.dense(q, k, v, normalization=1 / 24)
    halves = [attention.dense(q, k[:, half], v[:, half], normalization=1 / 24) for half in
              (slice(12), slice(12, 24))]  # fmt: skip
    tolerance = 1e-12 if whole.dtype == torch.float64 else 1e-2
    torch.testing.assert_close(sum(halves), whole, rtol=0.0, atol=tolerance)


ALGORITHMS = pytest.mark.parametrize("algorithm", ["quadratic", "linear"])


@ALGORITHMS
@pytest.mark.parametrize("given", [
    0.3, torch.tensor([2.0]), torch.tensor([[0.5, 1.0, 2.0]]),
], ids=["number", "of a sequence", "of rows"])  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_derivatives(device, given, causal, algorithm):
    """The factors enter each term once, in derivatives in both modes and of both orders."""
    if device != "cpu":
        pytest.skip("finite differences need float64, which the CUDA kernels do not take")
    tensors = [x.requires_grad_() for x in qkv(None, 1, 3, 4, nheads=2, nheads_k=1, head_dim=2)]

    def attend(q, k, v):
        return flash_attn.flash_attn_func(
            q, k, v, use_softmax=False, causal=causal, normalization=given, algorithm=algorithm
        )

    torch.autograd.gradcheck(attend, tensors, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(attend, tensors, fast_mode=True)


@ALGORITHMS
def test_vmap_of_factors(device, algorithm):
    """Each entry of a vmap has its own factors, with their gradients, in linear time too."""
    if device != "cpu":
        pytest.skip("the CPU shows it: what is folded is the same")
    tensors = [torch.stack([x, x + 1]) for x in qkv(None, 3, 4, 5)]

    def loss(q, k, v, given):
        out = flash_attn.flash_attn_func(
            q, k, v, use_softmax=False, causal=True, normalization=given, algorithm=algorithm
        )
        return out.square().sum()

    for given in (torch.rand(2, 3), torch.rand(2, 3, 4)):
        both = torch.func.vmap(torch.func.grad(loss))(*tensors, given)
        alone = torch.stack([torch.func.grad(loss)(*x) for x in zip(*tensors, given)])
        torch.testing.assert_close(both, alone, rtol=0, atol=1e-10)


def test_vmap(device):
    """Each entry has its own factors, or all share them."""
    q, k, v = (torch.stack([x, x + 1]) for x in qkv(None, 3, 4, 5))
    if device != "cpu":
        pytest.skip("the CPU backend shows it: what is folded is the same")

    def attend(q, k, v, given, bias):
        return flash_attn.flash_attn_func(
            q, k, v, use_softmax=False, activation="sigmoid", normalization=given, sigmoid_bias=bias
        )

    for given in (torch.rand(2, 3), torch.rand(2, 3, 4)):
        for bias in (torch.rand(2, 2), torch.rand(2, 3, 2)):
            both = torch.func.vmap(attend)(q, k, v, given, bias)
            torch.testing.assert_close(
                both, torch.stack([attend(*x) for x in zip(q, k, v, given, bias)]), rtol=0, atol=1e-12
            )
            shared = torch.func.vmap(attend, (0, 0, 0, None, None))(q, k, v, given[0], bias[0])
            torch.testing.assert_close(
                shared, torch.stack([attend(*x, given[0], bias[0]) for x in zip(q, k, v)]), rtol=0, atol=1e-12
            )


def test_compiled(device):
    """torch.compile takes forward and backward with fullgraph and a symbolic batch."""
    if device != "cpu":
        pytest.skip("the operators are the same on both")

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def attend(q, k, v, given, bias):
        return flash_attn.flash_attn_func(
            q, k, v, use_softmax=False, activation="sigmoid", normalization=given, sigmoid_bias=bias
        )

    for batch in (2, 3):
        tensors = qkv(None, batch, 4, 5)
        given, bias = torch.rand(batch, 4), torch.rand(2)
        got = gradients(lambda *x: attend(*x, given, bias), *tensors)
        expected = gradients(
            lambda *x: flash_attn.flash_attn_func(
                *x, use_softmax=False, activation="sigmoid", normalization=given, sigmoid_bias=bias
            ),
            *tensors,
        )
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


WRONG = {
    "of no row and no sequence": (dict(normalization=torch.ones(7)), ValueError, r"normalization .*\(7,\)"),
    "of another dtype": (dict(normalization=torch.ones(2).double()), TypeError, "normalization has dtype"),
    "that asks for a gradient": (
        dict(normalization=torch.ones(2, requires_grad=True)), ValueError, r"normalization\.detach",
    ),
    "below 0": (dict(normalization=torch.tensor([1.0, -1.0])), ValueError, r"normalization\[1\]=-1\.0"),
    "not a number": (dict(normalization=torch.tensor([1.0, torch.nan])), ValueError,
    r"normalization\[1\]=nan"),
    "elsewhere": (dict(normalization=torch.ones(2, device="meta")), ValueError, "normalization on meta"),
    "0": (dict(normalization=0), ValueError, "normalization=0"),
    "a number below 0": (dict(normalization=-0.5), ValueError, "normalization=-0.5"),
    "an infinite number": (dict(normalization=float("inf")), ValueError, "normalization=inf"),
    "True": (dict(normalization=True), ValueError, "normalization=True"),
    "a bias without the sigmoid": (dict(sigmoid_bias=torch.ones(2)), ValueError, 'activation="sigmoid"'),
    "a bias of no head": (
        dict(activation="sigmoid", sigmoid_bias=torch.ones(3)), ValueError, r"sigmoid_bias .*\(3,\)",
    ),
    "an infinite bias": (
        dict(activation="sigmoid", sigmoid_bias=torch.tensor([0.0, torch.inf])), ValueError, "sigmoid_bias=",
    ),
    "with softmax": (dict(normalization=torch.ones(2), use_softmax=True), ValueError, "use_softmax=False"),
}  # fmt: skip


@pytest.mark.parametrize("options, error, words", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("ask", ["call", "explain", "packed"])
def test_refused(options, error, words, ask):
    q, k, v = qkv(None)
    options = {"use_softmax": False, **options}
    with pytest.raises(error, match=words):
        if ask == "call":
            flash_attn.flash_attn_func(q, k, v, **options)
        elif ask == "explain":
            flash_attn.explain(flash_attn.flash_attn_func, q, k, v, **options)
        else:
            starts_q, starts_k = cumulative([7, 7], "cpu"), cumulative([9, 9], "cpu")
            if "7" in words:
                options["normalization"] = torch.ones(7)
            flash_attn.flash_attn_varlen_func(
                *(x.flatten(0, 1) for x in (q, k, v)), starts_q, starts_k, 7, 9, **options
            )


@pytest.mark.parametrize(
    "given", [1 / 4096, torch.ones(2), torch.ones(2, 4096)], ids=["number", "(b,)", "(b, s)"]
)
def test_explained(given):
    """A factor does not keep a call from linear time."""
    q, k, v = qkv(None, seqlen_q=4096, seqlen_k=4096)
    choice = flash_attn.explain(
        flash_attn.flash_attn_func, q, k, v, normalization=given, causal=True, use_softmax=False
    )
    assert choice.backend == "linear"
