"""Test that all backends agree, and that nosoftmax.forward and backward agree with the differentiable
functions.
"""

from __future__ import annotations

import flash_attn
import pytest
import torch
from flash_attn import explain, flash_attn_func

from measure import NAMES, assert_close, compare, gradients, packed, qkv, randn, reference, slopes
from oracle import FUNCTIONS as FORMULAS
from package import VARIANTS, Package, cumulative, missing
from score_functions import FUNCTIONS

OPTIONS = [
    dict(),
    dict(window_size=(9, 4)),
    dict(window_size=(9, -1), softcap=2.0),
    dict(causal=True, alibi=True),
    dict(causal=True, normalization="1/visible"),
    dict(normalization="1/n", softmax_scale=0.3),
    dict(causal=True, decay=True),
]
LENGTHS = dict(lengths_q=[70, 0, 33, 5], lengths_k=[40, 9, 0, 60])


def given(attention, options: dict, nheads: int) -> dict:
    options = dict(options)
    for name in ("alibi", "decay"):
        if options.pop(name, False):
            options[f"{name}_slopes"] = slopes(attention, nheads, size=0.1)
    return options


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_score_function_with_every_option(attention, function, options):
    """Each backend equals the oracle, so all agree: packed and dense, grouped heads, more and fewer queries
    than keys.
    """
    options = {**given(attention, options, 2), **function}
    compare(attention, *qkv(attention, 1, 45, 30, nheads=2, nheads_k=1, head_dim=16), **options)
    tensors = packed(attention, **LENGTHS, nheads=2, nheads_k=1, head_dim=16)
    compare(attention, *tensors, method="varlen", **LENGTHS, **options)


@pytest.mark.parametrize(
    "options", [dict(), dict(causal=True), dict(causal=True, normalization="1/visible")], ids=str
)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(300, 300), (70, 260), (260, 70)])
def test_the_variants_of_a_device_agree(device, dtype, options, seqlen_q, seqlen_k):
    """All backends of a device give the same result, within the tolerance of each against the oracle."""
    if dtype == torch.float64:
        pytest.skip("with float32, which shows the same")
    variants = [v for d, v in VARIANTS if d == device and missing(device, v) is None]
    q, k, v = qkv(Package(device), 1, seqlen_q, seqlen_k, nheads=2, head_dim=32, dtype=dtype)
    dout = randn(*q.shape, seed=99).to(q)
    exact, baseline = (reference(q, k, v, dout, precision, **options) for precision in (torch.float64, dtype))
    for variant in variants:
        run = Package(device, variant).dense
        for name, *three in zip(
            NAMES, gradients(lambda *x: run(*x, **options), q, k, v, dout=dout), exact, baseline
        ):
            assert_close(f"{variant}: {name}", *three)


@pytest.mark.parametrize("options", [dict(), dict(causal=True)], ids=str)
def test_the_choice_does_not_show(device, monkeypatch, options):
    """On both sides of the crossover, "auto" gives the result of the other algorithm."""
    monkeypatch.delenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", raising=False)
    dtype, algorithms = (torch.float64 if device == "cpu" else torch.float16), set()
    for seqlen in (64, 2500):
        q, k, v = qkv(Package(device), 1, seqlen, seqlen, nheads=1, head_dim=8, dtype=dtype)
        algorithms.add(explain(flash_attn_func, q, k, v, use_softmax=False, **options).algorithm)
        dout = randn(*q.shape, seed=99).to(q)
        auto, *others = (
            gradients(
                lambda *x: flash_attn_func(*x, use_softmax=False, algorithm=a, **options), q, k, v, dout=dout
            )
            for a in ("auto", "linear", "quadratic")
        )
        for other in others:
            for name, a, e in zip(NAMES, auto, other):
                assert_close(name, a, e.double(), baseline=e.double() * (1 + 4 * torch.finfo(dtype).eps))
    assert device != "cpu" or algorithms == {"linear", "quadratic"}


# Exact at large scores too, where autograd of the oracle's formulas is not.
DERIVATIVES = {
    "sigmoid": lambda s: torch.sigmoid(s) * torch.sigmoid(-s),
    "silu": lambda s: torch.sigmoid(s) * (1 + s * torch.sigmoid(-s)),
    "gelu": lambda s: torch.special.erfc(-s / 2**0.5) / 2 + s * torch.exp(-s * s / 2) / (2 * torch.pi) ** 0.5,
    "softplus": torch.sigmoid,
}


@pytest.mark.parametrize("s", [12.0, 17.0, 25.0, 40.0, -12.0, -40.0])
@pytest.mark.parametrize("activation", DERIVATIVES)
def test_derivatives_far_out(attention, activation, s):
    """With one query and one key, dk is f'(s). From s = 17 on 1 - sigmoid(s) is 0 in float32, but sigmoid(-s)
    is not.
    """
    dtype = torch.float32 if attention.device == "cpu" else torch.bfloat16
    one = torch.ones(1, 1, 1, 8, dtype=dtype, device=attention.device) / 8**0.5
    unit = torch.nn.functional.one_hot(torch.zeros(1, 1, 1, dtype=torch.long), 8).to(one)
    k = unit * s
    actual = gradients(
        lambda *x: attention.dense(*x, softmax_scale=1.0, activation=activation), unit, k, one, dout=one
    )
    s = torch.tensor(s, dtype=torch.float64)
    expected = (FORMULAS[activation](s, 0.0) * one.double().cpu().flatten()[0], DERIVATIVES[activation](s))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # relative to each number, not to the largest
    floor = 0.0 if attention.device == "cpu" else 1e-3  # the error of kernels that use tanh.approx
    for name, a, e in (("out", actual[0], expected[0]), ("dk", actual[2], expected[1])):
        a = a.double().cpu().flatten()[0]
        limit = tolerance * e.abs() + floor * s.abs().clamp(min=1) + 1e-30
        assert (a - e).abs() <= limit, f"{name} at s={s:g} is {a:.6g}, expected {e:.6g}"


@pytest.mark.parametrize(
    "options", [dict(), dict(causal=True), dict(activation="silu", normalization="1/n")], ids=str
)
@pytest.mark.parametrize("head_dim, head_dim_v", [(16, 32), (32, 16), (8, 5)])
def test_values_of_another_head_size(attention, options, head_dim, head_dim_v):
    """head_dim_v is that of v, the output and their gradients; the scale comes from head_dim."""
    if attention.device == "cuda" and attention.variant == "quadratic":
        pytest.skip("the extension has kernels for one head size of q, k and v")
    q, k, _ = qkv(attention, 2, 20, 24, nheads=4, nheads_k=2, head_dim=head_dim)
    v = randn(*k.shape[:-1], head_dim_v, seed=7, like=attention)
    dout = randn(*q.shape[:-1], head_dim_v, seed=99, like=attention)
    compare(attention, q, k, v, dout, **options)
    lengths = dict(lengths_q=[10, 30], lengths_k=[28, 20])
    compare(attention, *(x.flatten(0, 1) for x in (q, k, v, dout)), method="varlen", **lengths, **options)


# --- The forward/backward pair

PAIR = [
    dict(),
    dict(causal=True, softmax_scale=0.4),
    dict(window_size=(9, 4), activation="silu", normalization="1/visible"),
    dict(activation="sigmoid", sigmoid_bias="-log n", normalization="1/n"),
    dict(causal=True, alibi=True),
    dict(softcap=2.0),
    dict(dropout_p=0.3),
    dict(dropout_p=0.3, activation="relu", causal=True),
]


@pytest.mark.parametrize("options", PAIR, ids=str)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_the_pair_is_the_function_and_its_gradient(attention, options, layout):
    """flash_attn.nosoftmax.forward and backward give the function and its gradient, bit for bit. backward
    does not need the output of forward.
    """
    from flash_attn.nosoftmax import backward, forward

    options = {**given(attention, options, 4), "deterministic": True}
    if layout == "dense":
        q, k, v = qkv(attention, 2, 33, 41, nheads=4, nheads_k=2, head_dim=16)
        function, lengths = flash_attn_func, {}
    else:
        q, k, v = packed(attention, **LENGTHS, nheads=4, nheads_k=2, head_dim=16)
        function, lengths = flash_attn.flash_attn_varlen_func, {}
        for x in "qk":
            lengths[f"cu_seqlens_{x}"] = cumulative(LENGTHS[f"lengths_{x}"], attention.device)
            lengths[f"max_seqlen_{x}"] = max(LENGTHS[f"lengths_{x}"])
    dout = randn(*q.shape, seed=99, like=attention)

    def seeded(function, *x, **more):
        torch.manual_seed(7)
        return attention._call(function, *x, **lengths, **options, **more)

    expected = gradients(lambda *x: seeded(function, *x), q, k, v, dout=dout)
    torch.manual_seed(7)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]  # the pair ignores requires_grad
    out, rng_state = forward(*inputs, **lengths, **options, **attention.forced)
    torch.manual_seed(8)
    found = backward(dout, *inputs, rng_state=rng_state, **lengths, **options, **attention.forced)
    assert not out.requires_grad and (rng_state is not None or "dropout_p" not in options)
    for name, a, e in zip(NAMES, (out, *found), expected, strict=True):
        assert torch.equal(a, e), name


def test_the_pair_in_pieces(attention):
    """As in ring attention, partial outputs and gradients over disjoint keys add up without normalization."""
    from flash_attn.nosoftmax import backward, forward

    q, k, v = qkv(attention, 1, 24, 40, nheads=4, nheads_k=2, head_dim=16)
    dout = randn(*q.shape, seed=99, like=attention)
    whole = gradients(attention.dense, q, k, v, dout=dout)
    pieces = [[x[:, part] for x in (k, v)] for part in (slice(0, 15), slice(15, 40))]
    out = sum(forward(q, *piece, **attention.forced)[0].double() for piece in pieces)
    found = [backward(dout, q, *piece, **attention.forced) for piece in pieces]
    dq = sum(piece[0].double() for piece in found)
    dk, dv = (torch.cat([piece[i] for piece in found], 1).double() for i in (1, 2))
    for name, a, e in zip(NAMES, (out, dq, dk, dv), whole, strict=True):
        assert_close(
            name, a.to(e.dtype), e.double(), baseline=e.double() * (1 + 4 * torch.finfo(e.dtype).eps)
        )


def test_the_pair_refuses_what_has_no_place_in_it(attention):
    from flash_attn.nosoftmax import backward, forward

    q, k, v = qkv(attention)
    for name, value in (("return_attn_probs", True), ("use_softmax", True), ("cu_seqlens_k", None)):
        for ask in (forward, lambda *x, **o: backward(q, *x, **o)):
            with pytest.raises(TypeError, match=name):
                ask(q, k, v, **{name: value})
    with pytest.raises(ValueError, match="rng_state"):
        backward(q, q, k, v, dropout_p=0.5)


@pytest.mark.parametrize("name", ["seqused_k", "leftpad_k", "block_table"])
def test_the_pair_has_no_backward_of_parts_of_the_keys(attention, name):
    """The extension's backward would ignore these arguments and silently return the gradient of other
    keys.
    """
    from flash_attn.nosoftmax import backward

    q, k, v = packed(attention, **LENGTHS)
    lengths = cumulative(LENGTHS["lengths_k"], attention.device)
    options = dict(
        cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=9, max_seqlen_k=9, **{name: lengths[1:]}
    )
    with pytest.raises(ValueError, match=f"{name} has no backward"):
        backward(q, q, k, v, **options)


def test_the_package_says_that_it_is_patched():
    from flash_attn import nosoftmax

    assert nosoftmax.REVISION
