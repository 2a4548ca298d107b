"""Test linear time: the primitive and its derivatives, when it is chosen, and the contract of
use_softmax=False.

The other attention tests also run with algorithm="linear", where it applies (conftest.py). This file tests
what only this path can get wrong: chunks, the state between them, lengths that are no multiple of a chunk,
sums over many tokens.
"""

from __future__ import annotations

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.nosoftmax.backends import linear as backend
from flash_attn.nosoftmax.backends.linear import primitive
from flash_attn.nosoftmax.call import TENSORS, Options
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import linear_checks as checks
from calls import DIFFERENTIABLE, close, inputs, run
from linear_mutations import MUTANTS, Mutant
from measure import NAMES, assert_same, compare, gradients, qkv, randn
from package import Package, cumulative, not_in_this_build

MASKS = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
SIXTEEN_BIT = pytest.mark.parametrize(
    "dtype, largest", [(torch.float16, 65504.0), (torch.bfloat16, 1e9)], ids=["float16", "bfloat16"]
)


@pytest.fixture
def linear(device: str) -> Package:
    return Package(device, "linear")


@pytest.fixture
def quadratic(device: str) -> Package:
    return Package(device, "quadratic")


# --- Values


@pytest.mark.slow
@MASKS
@pytest.mark.parametrize("lengths", checks.LENGTHS, ids=str)
def test_lengths(linear, causal, lengths, dtype):
    checks.check_lengths(linear, causal, lengths, dtype)


@pytest.mark.slow
@MASKS
@pytest.mark.parametrize("normalization", ["1/n", "1/visible", "1/sqrt(n)"])
@pytest.mark.parametrize("lengths", [(300, 300), (70, 300), (300, 70)], ids=str)
def test_normalizations(linear, causal, lengths, normalization):
    checks.check_lengths(linear, causal, lengths, normalization=normalization)


@MASKS
@pytest.mark.parametrize("by_row", [False, True], ids=["of sequences", "of rows"])
@pytest.mark.parametrize("lengths", [(300, 300), (70, 300), (300, 70)], ids=str)
def test_factors(linear, causal, lengths, by_row):
    """Factors that the caller gives, all different, across chunks, in wide and in 16-bit tensors."""
    for dtype in (linear.dtype, torch.float16):
        checks.check_lengths(
            linear,
            causal,
            lengths,
            dtype,
            normalization=checks.factors(linear, *(2, lengths[0])[: 1 + by_row]),
        )


@MASKS
@pytest.mark.parametrize("by_row", [False, True], ids=["of sequences", "of rows"])
def test_factors_of_packed_sequences(linear, causal, by_row):
    lengths = checks.PACKED["lengths_q"]
    given = checks.factors(linear, sum(lengths) if by_row else len(lengths))
    checks.check_packed(linear, causal, normalization=given)


@MASKS
@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=str)
@pytest.mark.parametrize(
    "lengths", [(129, 129), (300, 300), (70, 300), (300, 70), (1, 200), (200, 1)], ids=str
)
def test_decay(linear, causal, lengths, shape):
    """A decay across chunks, gentle for one head and steep for another, with grouped heads."""
    for dtype in (linear.dtype, torch.float16):
        checks.check_lengths(linear, causal, lengths, dtype, decay_slopes=checks.decays(linear, *shape))


@MASKS
@pytest.mark.parametrize("shape", [(4,), (5, 4)], ids=str)
@pytest.mark.parametrize("nheads_k", [1, 4])
def test_decay_of_packed_sequences(linear, causal, nheads_k, shape):
    checks.check_packed(linear, causal, nheads_k, decay_slopes=checks.decays(linear, *shape))


@MASKS
@pytest.mark.parametrize("options", [
    dict(normalization="1/visible"), dict(normalization="1/n"), dict(normalization=(2,)),
    dict(normalization=(2, 300)),
], ids=str)  # fmt: skip
def test_decay_beside_a_normalization(linear, causal, options):
    """ "1/visible" counts keys, whatever their decay."""
    if isinstance(options["normalization"], tuple):
        options = dict(normalization=checks.factors(linear, *options["normalization"]))
    checks.check_lengths(linear, causal, (300, 150), decay_slopes=checks.decays(linear, 4), **options)


@MASKS
@pytest.mark.parametrize("lengths", [(300, 300), (140, 300), (300, 140)], ids=str)
def test_decay_equals_the_recurrence(linear, causal, lengths):
    checks.check_recurrence(linear, causal, lengths)


@MASKS
@pytest.mark.parametrize("slope", [1e-7, 1e-5, 1e-2, 5.0])
@pytest.mark.slow
def test_decay_of_many_tokens(linear, causal, slope, dtype):
    """A decay of any size loses no precision and overflows nowhere, over as many chunks as there may be."""
    checks.check_decay_of_many_tokens(linear, causal, slope, dtype)


def test_gentle_decay(linear):
    checks.check_gentle_decay(linear)


@MASKS
def test_nothing_leaks_with_a_decay(linear, causal):
    checks.check_nothing_leaks(linear, causal, decay_slopes=checks.decays(linear, 4))


@MASKS
@pytest.mark.parametrize("head_dim", [40, 96, 128, 256])
def test_head_dims(linear, causal, head_dim):
    compare(linear, *qkv(linear, 1, 150, 170, nheads=2, nheads_k=1, head_dim=head_dim), causal=causal)


@MASKS
@pytest.mark.parametrize("normalization", [None, "1/n", "1/visible"])
@pytest.mark.parametrize("nheads_k", [1, 4])
def test_packed(linear, causal, normalization, nheads_k):
    checks.check_packed(linear, causal, nheads_k, normalization=normalization)


@MASKS
def test_nothing_leaks_between_packed_sequences(linear, causal):
    checks.check_nothing_leaks(linear, causal)


def test_rows_without_keys(linear):
    checks.check_rows_without_keys(linear)


@SIXTEEN_BIT
@MASKS
@pytest.mark.parametrize("agree", [False, True], ids=["both signs", "one sign"])
def test_largest_inputs(linear, dtype, largest, causal, agree):
    checks.check_largest(linear, dtype, largest, causal, agree)


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_many_tokens(linear, quadratic, dtype, mean):
    """Many tokens are as exact as in quadratic time. With a large mean the state grows fastest."""
    if dtype == torch.float16 and mean > 1:
        pytest.skip("sums of 64k such tokens are larger than float16's largest number")
    checks.check_many_tokens(linear, quadratic, dtype, mean)


@MASKS
def test_second_derivatives(linear, device, causal):
    """First and second derivatives, both made of the primitive, agree with finite differences."""
    if device != "cpu":
        pytest.skip("finite differences need float64, which the CUDA kernels do not take")
    tensors = [x.requires_grad_() for x in qkv(linear, 1, 4, 5, nheads=2, nheads_k=1, head_dim=2)]
    assert torch.autograd.gradcheck(lambda *x: linear.dense(*x, causal=causal), tensors)
    assert torch.autograd.gradgradcheck(lambda *x: linear.dense(*x, causal=causal), tensors)


@MASKS
def test_gradients_are_the_same_every_time(linear, causal):
    tensors = qkv(linear, 1, 500, 500)
    first, second = (gradients(lambda *x: linear.dense(*x, causal=causal), *tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(monkeypatch, mutant: Mutant):
    """Each check fails for the mistake that the table assigns to it, and passes without it."""
    package = Package("cpu", "linear")
    mutant.check(package)
    monkeypatch.setattr(mutant.owner, mutant.step, mutant.wrong)
    with pytest.raises(AssertionError):
        mutant.check(package)


# --- The public functions


@MASKS
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_public_functions(name, device, causal):
    """Each of the six functions gives its result of quadratic time, and no log-sum-exp."""
    options = dict(use_softmax=False, causal=causal, softmax_scale=0.4)
    actual, expected = (
        run(name, device, **options, algorithm=algorithm) for algorithm in ("linear", "quadratic")
    )
    for a, e in zip(actual, expected, strict=True):
        close(a, e)
    tensors, lengths = inputs(name, device)
    out, lse, encoded = getattr(flash_attn, name)(
        *tensors, *lengths, **options, algorithm="linear", return_attn_probs=True
    )
    assert torch.equal(out, actual[0]) and lse.numel() == encoded.numel() == 0 and lse.dtype == torch.float32


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_only_inputs_are_saved(name, device):
    kept: list[torch.Tensor] = []
    tensors, lengths = inputs(name, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        getattr(flash_attn, name)(*tensors, *lengths, use_softmax=False, algorithm="linear")
    given = {x.untyped_storage().data_ptr() for x in [*tensors, *lengths] if isinstance(x, torch.Tensor)}
    assert kept and {x.untyped_storage().data_ptr() for x in kept} <= given


@pytest.mark.parametrize(
    "name", ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func"]
)
def test_compiles_to_one_graph(name, device):
    torch._dynamo.reset()
    tensors, lengths = inputs(name, device)

    def attend(*x):
        return getattr(flash_attn, name)(*x, *lengths, causal=True, use_softmax=False, algorithm="linear")

    expected = attend(*tensors)
    actual = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors)
    dout = randn(*expected.shape, seed=0).to(expected)
    for a, e in zip(
        (actual, *torch.autograd.grad(actual, tensors, dout)),
        (expected, *torch.autograd.grad(expected, tensors, dout)),
    ):
        close(a, e)


@pytest.mark.slow
def test_compiles_with_dynamic_shapes():
    """One compiled function serves lengths on both sides of the crossover."""
    torch._dynamo.reset()

    def attend(*x):
        return flash_attn_func(*x, causal=True, use_softmax=False)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (50, 300, 301):
        tensors = qkv(Package("cpu"), 1, seqlen, seqlen)
        for a, e in zip(gradients(compiled, *tensors), gradients(attend, *tensors)):
            close(a, e)


def test_operators_pass_opcheck(device):
    """The operators of all backends pass opcheck with this backend behind them."""
    q, k, v = (x.detach() for x in inputs("flash_attn_func", device)[0])
    options = Options(q.shape[1], k.shape[1], 0.0, 0.3, -1, 0, 0.0, False, False, "identity", 0.0, "1/n", 0.5)
    tensors = (q, k, v, *(None,) * (TENSORS - 3))
    torch.library.opcheck(torch.ops.flash_attn_nosoftmax.forward.default, (*tensors, *options, "linear"))
    torch.library.opcheck(
        torch.ops.flash_attn_nosoftmax.backward.default, (q, *tensors, None, *options, "linear")
    )


class _Recorded(TorchDispatchMode):
    """Records which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


def test_who_follows_operators_sees_one(device):
    """A dispatch mode, such as selective checkpointing, sees one operator. Autograd alone needs none."""
    with _Recorded() as recorded:
        gradients(Package(device, "linear").dense, *qkv(Package(device, "linear")))
    ours = [name for name in recorded.names if name.startswith("flash_attn")]
    assert ours == ["flash_attn_nosoftmax::forward", "flash_attn_nosoftmax::backward"]
    with torch.profiler.profile() as profile:
        gradients(Package(device, "linear").dense, *qkv(Package(device, "linear")))
    assert not set(ours) & {event.key for event in profile.key_averages()}


def test_tensors_without_memory(monkeypatch):
    """A FakeTensor keeps its own dispatch even outside its mode."""
    monkeypatch.setattr(primitive, "_TRITON", True)
    with FakeTensorMode():
        q = torch.empty(1, 16, 4, 8, dtype=torch.float16, device="cuda")
    out = flash_attn_func(q, q, q, causal=True, use_softmax=False, algorithm="linear")
    assert type(out) is type(q) and out.shape == q.shape and out.device == q.device


def test_forward_derivatives(linear):
    """The output is linear in q, so its derivative is the output of the tangent."""
    q, k, v = qkv(linear)
    tangent = randn(*q.shape, seed=3).to(q)
    with forward_ad.dual_level():
        out, change = forward_ad.unpack_dual(linear.dense(forward_ad.make_dual(q, tangent), k, v))
    close(out, linear.dense(q, k, v))
    close(change, linear.dense(tangent, k, v))


def test_nothing_is_kept_where_no_gradient_is_asked_for(linear):
    for asks in range(3):
        tensors = [x.requires_grad_(i == asks) for i, x in enumerate(qkv(linear))]
        assert "Attention" in linear.dense(*tensors).grad_fn.name()
        with torch.no_grad():
            assert linear.dense(*tensors).grad_fn is None
    assert linear.dense(*qkv(linear)).grad_fn is None


def test_activation_checkpointing(linear):
    tensors = qkv(linear, 1, 200, 200)

    def attend(*x):
        return linear.dense(*x, causal=True)

    plain = gradients(attend, *tensors)
    again = gradients(lambda *x: checkpoint(attend, *x, use_reentrant=False), *tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_autocast_casts_the_tensors_alone(linear, device):
    """As with scaled_dot_product_attention, autocast casts the tensors alone: inner results keep their
    precision, and gradients have the leaves' dtype.
    """
    tensors = qkv(linear, 1, 200, 200, dtype=torch.float32 if device == "cpu" else torch.float16)
    dout = randn(*tensors[0].shape, seed=3).to(device, torch.bfloat16)
    expected = gradients(linear.dense, *(x.bfloat16() for x in tensors), dout=dout)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = gradients(linear.dense, *tensors, dout=dout)
    for a, e, dtype in zip(actual, expected, (torch.bfloat16, *[tensors[0].dtype] * 3), strict=True):
        assert a.dtype == dtype and torch.equal(a, e.to(dtype))


def test_strides_do_not_matter(linear):
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(linear, 2, 150, 150)]
    plain = gradients(lambda *x: linear.dense(*(t.contiguous() for t in x), causal=True), *tensors)
    for name, a, b in zip(NAMES, gradients(lambda *x: linear.dense(*x, causal=True), *tensors), plain):
        assert_same(name, a, b)


# --- The choice

INEXACT = {
    "softcap": dict(softcap=2.0),
    "dropout_p": dict(dropout_p=0.1),
    "alibi_slopes": dict(alibi_slopes=torch.ones(2)),
    "window_size": dict(window_size=(4, 4)),
    "activation": dict(activation="relu"),
    "use_softmax": dict(use_softmax=True),
}


@pytest.mark.parametrize("name", INEXACT)
def test_linear_is_refused_where_it_is_not_exact(name):
    """The error names the option that prevents linear time."""
    q, k, v = (torch.zeros(1, 8, 2, 8) for _ in range(3))
    reason = "with use_softmax=True" if name == "use_softmax" else f": {name}"
    with pytest.raises(ValueError, match=f'algorithm="linear" is not possible ?{reason}'):
        flash_attn_func(q, k, v, **{"use_softmax": False, **INEXACT[name]}, algorithm="linear")


def test_linear_is_refused_with_pages():
    q, pages = torch.zeros(4, 2, 8), torch.zeros(1, 256, 2, 8)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), cumulative([4], "cpu")
    with pytest.raises(ValueError, match="block_table"):
        flash_attn_varlen_func(
            q, pages, pages, lengths, lengths, 4, 4, block_table=table, use_softmax=False, algorithm="linear"
        )


def test_a_window_that_causal_implies_is_none(linear):
    """Upstream's callers pass window_size=(-1, 0) with causal."""
    q, k, v = qkv(linear, 1, 9, 9)
    assert torch.equal(
        linear.dense(q, k, v, causal=True, window_size=(-1, 0)), linear.dense(q, k, v, causal=True)
    )


def test_unknown_algorithm():
    x = torch.zeros(1, 8, 2, 8)
    for call in (flash_attn_func, flash_attn.flash_attn_with_kvcache):
        with pytest.raises(ValueError, match="algorithm='fast'"):
            call(x, x, x, use_softmax=False, algorithm="fast")
    with pytest.raises(ValueError, match="linear_attention_step"):
        flash_attn.flash_attn_with_kvcache(x, x, x, use_softmax=False, algorithm="linear")


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """A list that grows by one with each call that runs in linear time."""
    calls: list[str] = []
    right = backend.forward
    monkeypatch.setattr(backend, "forward", lambda call: calls.append("linear") or right(call))
    return calls


@pytest.mark.parametrize("options, seqlen_q, seqlen_k, expected", [
    (dict(), 8192, 8192, True),
    (dict(causal=True), 8192, 8192, True),
    (dict(), 64, 64, False),
    (dict(causal=True), 1, 8192, False),
    (dict(causal=True, softcap=1.0), 2048, 2048, False),
    (dict(use_softmax=True), 2048, 2048, False),
    (dict(algorithm="quadratic"), 8192, 8192, False),
    (dict(algorithm="linear"), 64, 64, True),
], ids=str)  # fmt: skip
def test_auto_takes_linear_where_it_pays(taken, options, seqlen_q, seqlen_k, expected):
    q, k, v = (torch.zeros(1, n, 1, 8) for n in (seqlen_q, seqlen_k, seqlen_k))
    flash_attn_func(q, k, v, **{"use_softmax": False, **options})
    assert bool(taken) == expected


def test_auto_goes_by_the_mean_length_of_packed_sequences(taken):
    q, k, v = (torch.zeros(8192, 1, 8) for _ in range(3))
    for count, expected in ((1, True), (256, False)):
        lengths = cumulative([8192 // count] * count, "cpu")
        flash_attn_varlen_func(q, k, v, lengths, lengths, 8192 // count, 8192 // count, use_softmax=False)
        assert bool(taken) == expected
        taken.clear()


@MASKS
def test_auto_gives_the_result_of_the_algorithm_it_takes(device, monkeypatch, causal):
    """Above and below the crossover, "auto" is right within the quadratic algorithm's error."""
    monkeypatch.delenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", raising=False)
    try:
        for seqlen in (64, 6000):
            q, k, v = qkv(
                Package(device), 1, seqlen, seqlen, nheads=8 if device == "cuda" else 1, dtype=torch.float16
            )
            auto, quadratic = (
                flash_attn_func(q, k, v, causal=causal, use_softmax=False, algorithm=a)
                for a in ("auto", "quadratic")
            )
            assert_same("out", auto, quadratic)
    except (NotImplementedError, RuntimeError) as error:
        assert not_in_this_build(error)


@pytest.mark.parametrize("device_type", backend.CROSSOVERS)
@MASKS
def test_the_cost_rule_is_monotone(device_type, causal):
    """Where linear is faster, it stays faster for longer sequences. Wider heads need longer sequences."""
    device = torch.device(device_type)
    for head_dim in (32, 64, 128, 256):
        chosen = [
            backend.predicted_faster(device, head_dim, causal, n, n, 16) for n in (2**i for i in range(4, 22))
        ]
        assert chosen == sorted(chosen) and chosen[-1] and not chosen[0]


@pytest.mark.parametrize("batch, seqlen, expected", [
    (1, 2048, False), (1, 4096, True), (16, 1024, True), (8, 1024, False), (512, 512, False),
])  # fmt: skip
def test_on_a_gpu_sequences_and_heads_count_too(batch, seqlen, expected):
    assert backend.predicted_faster(torch.device("cuda"), 64, True, seqlen, seqlen, 16 * batch) == expected


# --- Wrong arguments

X = torch.zeros(1, 8, 2, 8)
WRONG = {
    "k has shape": dict(k=torch.zeros(1, 8, 2, 16)),
    "v has shape": dict(v=torch.zeros(1, 9, 2, 8)),
    "q has shape": dict(q=torch.zeros(8, 2, 8)),
    "heads in q": dict(k=torch.zeros(1, 8, 3, 8), v=torch.zeros(1, 8, 3, 8)),
    "k has dtype": dict(k=X.double()),
    "q has dtype": dict(q=X.long(), k=X.long(), v=X.long()),
    "must be on one device, got q on cpu, k on meta, v on cpu": dict(k=X.to("meta")),
    "softmax_scale=inf": dict(softmax_scale=float("inf")),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_tensors(message):
    arguments = {"q": X, "k": X, "v": X, **WRONG[message]}
    with pytest.raises((ValueError, TypeError), match=message):
        flash_attn_func(**arguments, use_softmax=False, algorithm="linear")


@pytest.mark.parametrize("lengths, message", [
    ([0, 5, 3, 8], "cu_seqlens_q descends from 5 to 3"),
    ([0, 4, 9], "cu_seqlens_q ends at 9"),
    ([-1, 8], r"cu_seqlens_q\[0\]=-1"),
    ([0, 8, 8], "length 8, more than max_seqlen_q=7"),
], ids=str)  # fmt: skip
def test_wrong_cu_seqlens(lengths, message):
    x, lengths = torch.zeros(8, 2, 8), torch.tensor(lengths, dtype=torch.int32)
    longest = 7 if "7" in message else 8
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(
            x, x, x, lengths, lengths.clone(), longest, longest, use_softmax=False, algorithm="linear"
        )


def test_cu_seqlens_of_another_dtype():
    """cu_seqlens may be int64."""
    x, lengths = randn(8, 2, 8, seed=0), torch.tensor([0, 3, 8])
    outputs = [
        flash_attn_varlen_func(x, x, x, cu, cu, 5, 5, use_softmax=False, algorithm="linear")
        for cu in (lengths, lengths.int())
    ]
    assert torch.equal(*outputs)
    with pytest.raises(TypeError, match="cu_seqlens_q has dtype torch.float32"):
        flash_attn_varlen_func(x, x, x, lengths.float(), lengths, 5, 5, use_softmax=False, algorithm="linear")
