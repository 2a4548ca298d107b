"""Test the Python interface: signatures, callers written before this patch set, operators under
torch.compile, errors.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace

import flash_attn
import flash_attn.flash_attn_interface as interface
import pytest
import torch
from flash_attn import extension as stands_for_extension
from flash_attn import nosoftmax
from flash_attn.nosoftmax.backends import fa2
from flash_attn.nosoftmax.call import TENSORS, Cache, Call, Options
from torch._subclasses.fake_tensor import FakeTensorMode

from calls import DIFFERENTIABLE, LENGTHS, close, inputs, run, sample
from package import cumulative, not_in_this_build

# Upstream's positional arguments, and the number of arguments of each layer below its functions.
DENSE = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
UPSTREAM = {
    "flash_attn_func": f"q k v {DENSE}",
    "flash_attn_kvpacked_func": f"q kv {DENSE}",
    "flash_attn_qkvpacked_func": f"qkv {DENSE}",
    "flash_attn_varlen_func": f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {DENSE} "
    "block_table",
    "flash_attn_varlen_kvpacked_func": f"q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {DENSE}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {DENSE}",
    "flash_attn_with_kvcache": "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx "
    "cache_leftpad block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes "
    "num_splits return_softmax_lse",
}
CLASSES = {
    "flash_attn_func": (interface.FlashAttnFunc, 12),
    "flash_attn_kvpacked_func": (interface.FlashAttnKVPackedFunc, 11),
    "flash_attn_qkvpacked_func": (interface.FlashAttnQKVPackedFunc, 10),
    "flash_attn_varlen_func": (interface.FlashAttnVarlenFunc, 17),
    "flash_attn_varlen_kvpacked_func": (interface.FlashAttnVarlenKVPackedFunc, 15),
    "flash_attn_varlen_qkvpacked_func": (interface.FlashAttnVarlenQKVPackedFunc, 12),
}
EXTENSION_ARGUMENTS = {"fwd": 13, "varlen_fwd": 21, "bwd": 19, "varlen_bwd": 24, "fwd_kvcache": 20}


@pytest.mark.slow
def test_import_brings_no_compiler():
    """torch._dynamo takes more than a second to import, and FA4's requirements take several."""
    heavy = ("torch._dynamo", "triton", "cutlass")
    program = (
        f"import sys, torch, flash_attn, flash_attn.linear; print([name for name in {heavy} if name "
        "in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


MODES = pytest.mark.parametrize("use_softmax", [True, False], ids=["softmax", "no_softmax"])
FUNCTIONS = pytest.mark.parametrize("name", DIFFERENTIABLE)


@pytest.mark.parametrize("name", UPSTREAM)
def test_signature(name):
    parameters = list(inspect.signature(getattr(flash_attn, name)).parameters.values())
    at = [p.name for p in parameters].index("use_softmax")
    before, (use_softmax, *keyword_only) = parameters[:at], parameters[at:]
    assert [p.name for p in before] == UPSTREAM[name].split()
    assert (use_softmax.name, use_softmax.default) == ("use_softmax", True)
    assert use_softmax.kind == use_softmax.POSITIONAL_OR_KEYWORD
    assert [(p.name, p.default) for p in keyword_only] == [
        ("activation", "identity"), ("sigmoid_bias", 0.0), ("normalization", None),
        ("decay_slopes", None), ("mask", None), ("algorithm", "auto"), ("backend", "auto"),
        ("context_parallel", None),
    ]  # fmt: skip
    assert all(p.kind == p.KEYWORD_ONLY for p in keyword_only)


def positional(name: str) -> list:
    """Upstream's arguments after tensors and lengths, down to return_attn_probs or block_table."""
    return [0.0, 0.3, True, (2, 0), 0.0, None, True, True] + [None] * (name == "flash_attn_varlen_func")


@FUNCTIONS
def test_old_positional_callers(name, device):
    """A call written for upstream gives softmax attention, through the function and its autograd class."""
    tensors, lengths = inputs(name, device)
    expected, lse, _ = getattr(flash_attn, name)(
        *tensors, *lengths, softmax_scale=0.3, causal=True, window_size=(2, 0), deterministic=True,
        return_attn_probs=True, use_softmax=True,
    )  # fmt: skip
    cls, arity = CLASSES[name]
    by_class = [*tensors, *lengths, *positional(name), True]
    assert len(by_class) == arity
    for outputs in (getattr(flash_attn, name)(*tensors, *lengths, *positional(name)), cls.apply(*by_class)):
        assert len(outputs) == 3
        assert torch.equal(outputs[0], expected) and torch.equal(outputs[1], lse)
        assert lse.numel() > 0
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(outputs[0].sum(), tensors))


def test_old_positional_callers_of_operators_and_extension(device):
    """The operators and the extension's stand-in take upstream's arguments alone, and compute softmax
    attention.
    """
    ops, options = torch.ops.flash_attn, (0.0, 0.3, True, -1, -1, 0.0)
    q, k, v = (t.detach().contiguous() for t in inputs("flash_attn_func", device)[0])
    out, lse, _, rng_state = ops._flash_attn_forward(q, k, v, *options, None, False)
    fwd = (q, k, v, None, None, *options, False, None)
    assert len(fwd) == EXTENSION_ARGUMENTS["fwd"] and torch.equal(stands_for_extension.fwd(*fwd)[0], out)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    ops._flash_attn_backward(q, q, k, v, out, lse, *gradients, *options, None, True, rng_state)
    bwd = (q, q, k, v, out, lse, None, None, None, None, *options, True, None, rng_state)
    assert len(bwd) == EXTENSION_ARGUMENTS["bwd"]
    for actual, expected in zip(stands_for_extension.bwd(*bwd)[:3], gradients, strict=True):
        assert torch.equal(actual, expected)

    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    cu = cumulative([8, 8], device)
    packed = (cu, cu, 8, 8)
    varlen_out, lse, _, rng_state = ops._flash_attn_varlen_forward(q, k, v, *packed, 0.0, 0.3, True)
    assert torch.equal(varlen_out, out.flatten(0, 1))
    varlen_fwd = (
        q,
        k,
        v,
        None,
        cu,
        cu,
        None,
        None,
        None,
        None,
        8,
        8,
        0.0,
        0.3,
        False,
        True,
        -1,
        -1,
        0.0,
        False,
        None,
    )
    assert len(varlen_fwd) == EXTENSION_ARGUMENTS["varlen_fwd"]
    assert torch.equal(stands_for_extension.varlen_fwd(*varlen_fwd)[0], varlen_out)
    flat = [torch.empty_like(x) for x in (q, k, v)]
    ops._flash_attn_varlen_backward(
        q, q, k, v, varlen_out, lse, *flat, *packed, *options, None, True, rng_state
    )
    varlen_bwd = (q, q, k, v, varlen_out, lse, None, None, None, cu, cu, None, 8, 8, 0.0, 0.3, False, True,
    -1, -1, 0.0,
                  True, None, rng_state)  # fmt: skip
    assert len(varlen_bwd) == EXTENSION_ARGUMENTS["varlen_bwd"]
    by_extension = stands_for_extension.varlen_bwd(*varlen_bwd)[:3]
    for actual, by_operator, expected in zip(by_extension, flat, gradients, strict=True):
        assert torch.equal(actual, by_operator)
        close(actual, expected.flatten(0, 1))


def test_old_positional_callers_of_the_cache(device):
    q, k_cache, v_cache = (t.detach() for t in inputs("flash_attn_func", device)[0])
    lengths = torch.tensor([4, 6], dtype=torch.int32, device=device)
    expected = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, causal=True, softmax_scale=0.3
    )
    old = (q, k_cache, v_cache, None, None, None, None, lengths, None, None, None, 0.3, True, (-1, -1), 0.0,
    True, None,
           0, True)  # fmt: skip
    assert len(old) == len(UPSTREAM["flash_attn_with_kvcache"].split())
    out, lse = flash_attn.flash_attn_with_kvcache(*old)
    assert torch.equal(out, expected) and lse.shape == (2, 2, q.shape[1])
    by_extension = (q, k_cache, v_cache, None, None, lengths, None, None, None, None, None, None, None, 0.3,
    True, -1,
                    -1, 0.0, True, 0)  # fmt: skip
    assert len(by_extension) == EXTENSION_ARGUMENTS["fwd_kvcache"]
    assert torch.equal(stands_for_extension.fwd_kvcache(*by_extension)[0], expected)


@FUNCTIONS
def test_use_softmax_by_position(name, device):
    tensors, lengths = inputs(name, device)
    function = getattr(flash_attn, name)
    out, lse, _ = function(*tensors, *lengths, *positional(name), False)
    options = dict(softmax_scale=0.3, causal=True, window_size=(2, 0))
    assert torch.equal(out, function(*tensors, *lengths, **options, use_softmax=False))
    assert not torch.allclose(out, function(*tensors, *lengths, **options))
    assert lse.shape == (0,) and lse.dtype == torch.float32 and lse.device == out.device


@MODES
@FUNCTIONS
def test_forms_agree(name, use_softmax, device):
    """Packed qkv, packed kv, dense and varlen functions give the same output and gradients."""
    actual = run(name, device, causal=True, use_softmax=use_softmax)
    plain = "flash_attn_varlen_func" if "varlen" in name else "flash_attn_func"
    for a, expected in zip(actual, run(plain, device, causal=True, use_softmax=use_softmax), strict=True):
        close(a, expected)


@MODES
def test_varlen_is_one_sequence_after_the_other(use_softmax, device):
    (q, k, v), lengths = inputs("flash_attn_varlen_func", device)
    out = flash_attn.flash_attn_varlen_func(q, k, v, *lengths, causal=True, use_softmax=use_softmax)
    pieces = ([t[None] for t in three] for three in zip(*(t.split(LENGTHS) for t in (q, k, v)), strict=True))
    close(
        out,
        torch.cat([flash_attn.flash_attn_func(*p, causal=True, use_softmax=use_softmax)[0] for p in pieces]),
    )


@MODES
@FUNCTIONS
def test_strided_dout(name, use_softmax, device):
    """The incoming gradient may be a view of any strides."""
    shape = inputs(name, device)[0][0].shape
    shape = shape[:-3] + shape[-2:] if "qkvpacked" in name else shape
    wide = sample(device, *shape[:-1], 2 * shape[-1])
    strided = [wide[..., ::2], wide.transpose(0, 1).contiguous().transpose(0, 1)[..., : shape[-1]]]
    for dout in strided:
        assert not dout.is_contiguous()
        actual = run(name, device, dout=dout, use_softmax=use_softmax)
        for a, expected in zip(
            actual, run(name, device, dout=dout.contiguous(), use_softmax=use_softmax), strict=True
        ):
            close(a, expected)


@MODES
@pytest.mark.parametrize("head_dim", [40, 59, 111])
def test_scale_comes_from_the_unpadded_head_dim(head_dim, use_softmax, device):
    """Head dimensions are padded to a multiple of 8 internally, without effect on scale and gradients."""
    q, k, v = (t.detach() for t in inputs("flash_attn_func", device, head_dim=head_dim)[0])
    options = dict(causal=True, use_softmax=use_softmax)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    padded = [torch.nn.functional.pad(t, (0, -head_dim % 8 + 8)).requires_grad_() for t in (q, k, v)]
    out = flash_attn.flash_attn_func(*leaves, **options)
    expected = flash_attn.flash_attn_func(*padded, softmax_scale=head_dim**-0.5, **options)
    dout = sample(device, *out.shape)
    gradients = torch.autograd.grad(out, leaves, dout)
    padded_gradients = torch.autograd.grad(expected[..., :head_dim], padded, dout)
    close(out, expected[..., :head_dim])
    for a, b in zip(gradients, padded_gradients, strict=True):
        assert a.shape[-1] == head_dim
        close(a, b[..., :head_dim])


def saved_bytes(name: str, device: str, use_softmax: bool) -> tuple[int, set[int], torch.Tensor]:
    """Return (bytes kept for the backward pass, addresses of their memory, the output)."""
    kept: list[torch.Tensor] = []
    tensors, lengths = inputs(name, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = getattr(flash_attn, name)(*tensors, *lengths, use_softmax=use_softmax)
    return sum(t.nbytes for t in kept), {t.data_ptr() for t in kept if t.numel()}, out


@FUNCTIONS
def test_neither_output_nor_lse_is_saved(name, device):
    """Parts of a packed tensor are saved as parts. A cu_seqlens for both q and k is saved twice."""
    tensors, lengths = inputs(name, device)
    needed = sum(t.nbytes for t in tensors) + 2 * cumulative(LENGTHS, device).nbytes * ("varlen" in name)
    saved, addresses, out = saved_bytes(name, device, use_softmax=False)
    assert saved == needed and out.data_ptr() not in addresses
    lengths_of_softmax = sum(t.nbytes for t in lengths if isinstance(t, torch.Tensor))
    saved, addresses, out = saved_bytes(name, device, use_softmax=True)
    lse, rng_state = out[..., 0].numel() * 4, 2 * 8
    assert saved == sum(t.nbytes for t in tensors) + lengths_of_softmax + rng_state + out.nbytes + lse
    assert out.data_ptr() in addresses


def softmax_operator_calls(device: str, seqlen_q: int, dropout_p: float):
    """Yield (operator, arguments) of upstream's four operators; q, k, v are views of packed tensors."""
    ops = torch.ops.flash_attn
    options, encoded = (dropout_p, 0.3, True, 3, 0, 0.0), dropout_p > 0
    q, k, v = sample(device, 2, seqlen_q, 2, 4, 8)[:, :, 0], *sample(device, 2, 6, 2, 2, 8).unbind(2)
    dense = (q, k, v, *options, None, encoded)
    yield ops._flash_attn_forward, dense
    out, lse, _, rng_state = ops._flash_attn_forward(*dense)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    yield ops._flash_attn_backward, (out, q, k, v, out, lse, *gradients, *options, None, True, rng_state)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    packed = (cumulative([seqlen_q, seqlen_q], device), cumulative([0, 12], device), seqlen_q, 12)
    varlen = (q, k, v, *packed, *options, None, encoded, None, None, None, False)
    yield ops._flash_attn_varlen_forward, varlen
    out, lse, _, rng_state = ops._flash_attn_varlen_forward(*varlen)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    yield (
        ops._flash_attn_varlen_backward,
        (out, q, k, v, out, lse, *gradients, *packed, *options, None, True, rng_state, False),
    )


def operator_calls(device: str, seqlen_q: int, dropout_p: float):
    """Yield the same for the operators without softmax, on dense, packed and paged tensors and on caches."""
    ops, name = torch.ops.flash_attn_nosoftmax, "fa2" if device == "cuda" else "cpu"

    def options(*longest: int) -> tuple:
        return tuple(
            Options(*longest, dropout_p, 0.3, 3, 0, 0.0, True, dropout_p > 0, "identity", 0.0, None, 1.0)
        )

    q, k, v = sample(device, 2, seqlen_q, 2, 4, 8)[:, :, 0], *sample(device, 2, 6, 2, 2, 8).unbind(2)

    def absent(given: tuple) -> tuple:
        """Return `given` with None for each tensor of a call that it does not reach."""
        return given + (None,) * (TENSORS - len(given))

    dense = absent((q, k, v))
    packed = absent(
        (
            *(x.flatten(0, 1) for x in (q, k, v)),
            cumulative([seqlen_q, seqlen_q], device),
            cumulative([0, 12], device),
        )
    )
    for tensors, longest in ((dense, (seqlen_q, 6)), (packed, (seqlen_q, 12))):
        yield ops.forward, (*tensors, *options(*longest), name)
        out, rng_state, _ = ops.forward(*tensors, *options(*longest), name)
        yield ops.backward, (out, *tensors, rng_state if dropout_p > 0 else None, *options(*longest), name)
    pages = sample(device, 4, 256, 2, 8)
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device=device)
    lengths = cumulative([300, 200], device)
    if dropout_p == 0.0:
        paged = absent((*packed[:1], pages, pages, packed[3], lengths, None, None, table))
        yield ops.forward, (*paged, *options(seqlen_q, 300), name)
        filled = lengths.diff().int()
        new = sample(device, 2, 1, 2, 8)
        for caches, tables in (
            (sample(device, 2, 512, 2, 2, 8).unbind(2), None),
            ((pages, pages.flip(0)), table),
        ):
            behind = TENSORS - 1 - Call._fields.index("block_table")
            given = (new, new, filled, *(None,) * 4, tables, *(None,) * behind, False, 0, True)
            yield ops.kvcache, (q[:, :1], *(x.clone() for x in caches), *given, *options(1, 512), name)


@pytest.mark.slow
@MODES
@pytest.mark.parametrize(
    "seqlen_q,dropout_p", [(5, 0.0), (1, 0.0), (5, 0.2)], ids=["plain", "decode", "dropout"]
)
def test_operators_pass_opcheck(seqlen_q, dropout_p, use_softmax, device):
    """Schema, aliasing and mutation are as declared, and the fake kernels return what the real ones return.

    The last check runs each operator twice and compares. Upstream's CUDA kernels leave memory unwritten that
    no caller may read: the generator's state without dropout, and the padding of the encoded weights with
    softmax.
    """
    unwritten = device == "cuda" and (use_softmax or dropout_p == 0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operators = set()
    for operator, arguments in (softmax_operator_calls if use_softmax else operator_calls)(
        device, seqlen_q, dropout_p
    ):
        operator(*arguments)  # raises here if this build lacks the kernels: opcheck would wrap the error
        torch.library.opcheck(operator.default, arguments, test_utils=checks[:-1] if unwritten else checks)
        operators.add(str(operator))
    family = (
        "_flash_attn_forward _flash_attn_backward _flash_attn_varlen_forward _flash_attn_varlen_backward"
        if use_softmax
        else ("forward backward kvcache" if dropout_p == 0.0 else "forward backward")
    )
    assert operators == {
        f"{'flash_attn' if use_softmax else 'flash_attn_nosoftmax'}.{name}" for name in family.split()
    }


@MODES
@pytest.mark.parametrize("form", ["flash_attn_func", "flash_attn_varlen_func"])
def test_compiles_to_one_graph(form, use_softmax, device):
    """torch.compile without a graph break gives the eager result, forward and backward."""
    torch._dynamo.reset()
    tensors, lengths = inputs(form, device)
    options = {}
    if device == "cpu" and not use_softmax:
        options = dict(activation="sigmoid", sigmoid_bias="-log n", normalization="1/visible")

    def attend(*qkv):
        return getattr(flash_attn, form)(*qkv, *lengths, causal=True, use_softmax=use_softmax, **options)

    def results(function):
        out = function(*tensors)
        return out, *torch.autograd.grad(out, tensors, sample(device, *out.shape))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(results(compiled), results(attend), strict=True):
        close(actual, expected)


@pytest.mark.slow
def test_the_cache_compiles_to_one_graph(device):
    """The operator declares the tensors that it changes, so that it appends in place from a compiled function
    too, at any length.
    """
    torch._dynamo.reset()
    q, k_cache, v_cache = (t.detach() for t in inputs("flash_attn_func", device)[0])
    caches = [(k_cache.clone(), v_cache.clone()) for _ in range(2)]

    def step(k, v, lengths):
        return flash_attn.flash_attn_with_kvcache(
            q[:, :1], k, v, q[:, 1:2], q[:, 2:3], cache_seqlens=lengths, causal=True, use_softmax=False
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for values in ([3, 5], [4, 6]):
        lengths = torch.tensor(values, dtype=torch.int32, device=device)
        with torch._dynamo.config.patch(error_on_recompile=values[0] > 3):
            actual = compiled(*caches[0], lengths)
        close(actual, step(*caches[1], lengths))
    for actual, expected in zip(*caches, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
def test_no_log_sum_exp_to_return(activation, device):
    q = sample(device, 1, 2, 2, 8)
    with pytest.raises(ValueError, match="return_softmax_lse=True.*use_softmax=False"):
        flash_attn.flash_attn_with_kvcache(
            q, q, q, return_softmax_lse=True, use_softmax=False, activation=activation
        )


@pytest.mark.parametrize("name", UPSTREAM)
@pytest.mark.parametrize(
    "options,words",
    [
        (dict(use_softmax=False, activation="softmax"), "activation='softmax'.*identity.*silu"),
        (dict(use_softmax=False, normalization="1/seqlen"), "normalization='1/seqlen'.*1/n"),
        (
            dict(use_softmax=False, activation="sigmoid", sigmoid_bias=float("nan")),
            "sigmoid_bias=nan.*finite",
        ),
        (dict(use_softmax=False, activation="sigmoid", sigmoid_bias="log n"), "sigmoid_bias='log n'.*-log n"),
        (dict(use_softmax=False, activation="relu", sigmoid_bias=1.0), "sigmoid_bias=1.0.*activation='relu'"),
        (dict(activation="relu"), "activation='relu'.*use_softmax=False"),
        (dict(normalization="1/n"), "normalization='1/n'.*use_softmax=False"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split(".")[0].split("=")[-1].strip("'"),
)
def test_options_are_checked(name, options, words, device):
    if name == "flash_attn_with_kvcache":
        tensors, lengths = inputs("flash_attn_func", device)
    else:
        tensors, lengths = inputs(name, device)
    with pytest.raises(ValueError, match=words):
        getattr(flash_attn, name)(*tensors, *lengths, **options)


def test_tensors_on_several_devices(device):
    q = sample(device, 1, 2, 2, 8)
    with pytest.raises(ValueError, match=f"one device.*q on {device}.*k_cache on meta"):
        flash_attn.flash_attn_with_kvcache(q, q.to("meta"), q.to("meta"), use_softmax=False)


# --- Forward and backward without autograd


PAIR = {
    "dense": ("flash_attn_func", {}),
    "dropped": ("flash_attn_func", dict(dropout_p=0.3)),
    "packed": ("flash_attn_varlen_func", {}),
    "packed and dropped": ("flash_attn_varlen_func", dict(dropout_p=0.3)),
}


@pytest.mark.parametrize("name, options", PAIR.values(), ids=PAIR)
def test_the_pair_gives_what_the_function_and_its_gradient_give(name, options, device):
    (q, k, v), lengths = inputs(name, device)
    options = dict(options, causal=True, softmax_scale=0.3, window_size=(2, 0))
    packed = dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), lengths))
    torch.manual_seed(5)
    expected = getattr(flash_attn, name)(q, k, v, *lengths, **options, use_softmax=False)
    dout = sample(device, *expected.shape)
    gradients = torch.autograd.grad(expected, (q, k, v), dout)
    torch.manual_seed(5)
    out, rng_state = nosoftmax.forward(q, k, v, **packed, **options)
    assert torch.equal(out, expected) and not out.requires_grad
    assert (rng_state is None) == ("dropout_p" not in options)
    torch.manual_seed(6)  # rng_state, not the seed, decides what was dropped
    for actual, gradient in zip(
        nosoftmax.backward(dout, q, k, v, rng_state, **packed, **options), gradients, strict=True
    ):
        assert torch.equal(actual, gradient) and not actual.requires_grad


X = torch.ones(1, 4, 2, 8)
WRONG_PAIRS = {
    "nonsense is no argument here": (dict(nonsense=1), TypeError),
    "block_table_k is no argument here": (dict(block_table_k=X), TypeError),
    "return_attn_probs is no argument here": (dict(return_attn_probs=True), TypeError),
    "max_seqlen_k is missing": (dict(cu_seqlens_q=X, cu_seqlens_k=X, max_seqlen_q=4), TypeError),
    "activation='tanh'": (dict(activation="tanh"), ValueError),
    "softmax_scale=inf": (dict(softmax_scale=float("inf")), ValueError),
}


@pytest.mark.parametrize("message", WRONG_PAIRS)
def test_wrong_arguments_of_the_pair(message):
    options, kind = WRONG_PAIRS[message]
    with pytest.raises(kind, match=message):
        nosoftmax.forward(X, X, X, **options)
    with pytest.raises(kind, match=message):
        nosoftmax.backward(X, X, X, X, **options)


@pytest.mark.parametrize("dout, options, message", [
    (X[:, :3], {}, "dout has shape"),
    (X.double(), {}, "dout has dtype"),
    (None, {}, "dout is a builtins.NoneType"),
    (X, dict(dropout_p=0.1), "dropout_p=0.1 without rng_state"),
    (X, dict(dropout_p=0.1, rng_state=torch.zeros(2)), "rng_state has dtype torch.float32"),
], ids=str)  # fmt: skip
def test_wrong_gradients_of_the_pair(dout, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        nosoftmax.backward(dout, X, X, X, **options)


# --- The arguments that the extension gets

# Tensors and extension are fake, so that these tests need no GPU.


@pytest.fixture
def cuda_call():
    with FakeTensorMode():
        q = torch.empty(1, 2, 2, 8, dtype=torch.float16, device="cuda")
    return q, q, q, None, None, 0.0, 0.3, False, -1, -1, 0.0, False, None


@pytest.fixture(autouse=True)
def looked_for_again():
    """Clear the caches that assume that the installed packages do not change, as these tests change them."""

    def forget():
        for found in (stands_for_extension._found, stands_for_extension.obstacle, fa2._built):
            found.cache_clear()

    forget()
    yield
    forget()


def test_cuda_tensor_without_the_extension(cuda_call, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", None)
    with pytest.raises(ImportError, match='make wheel BACKEND=cuda.*attn_implementation="sdpa"'):
        stands_for_extension.fwd(*cuda_call)
    reason = fa2.obstacle(nosoftmax_call(cuda_call[0]))
    assert "make wheel BACKEND=cuda" in reason and "sdpa" not in reason


@pytest.fixture
def extension(monkeypatch):
    """A compiled extension that records its arguments and returns as many tensors as the real extension."""
    module = SimpleNamespace(__name__="flash_attn_2_cuda", has_use_softmax=True, given=[])

    def function(name: str, like: tuple[int, ...]):
        def run(*args):
            module.given.append((name, args))
            return tuple(args[i] for i in like)

        return run

    for name, like in dict(
        fwd=(0,) * 4, varlen_fwd=(0,) * 4, bwd=(1, 2, 3), varlen_bwd=(1, 2, 3), fwd_kvcache=(0, 0)
    ).items():
        setattr(module, name, function(name, like))
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", module)
    return module


def fake(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


def nosoftmax_call(
    q, k=None, v=None, *lengths, cache=None, block_table=None, leftpad_k=None, longest=(2, 2), **options
) -> Call:
    k = q if k is None else k
    lengths = lengths or (None, None)
    options = Options(*longest, **{**dict(
        dropout_p=0.0, softmax_scale=0.3, window_left=-1, window_right=-1, softcap=0.0, deterministic=False,
        return_attn_probs=False, activation="identity", sigmoid_bias=0.0, normalization=None, factor=1.0,
    ), **options})  # fmt: skip
    return Call.of(
        options, cache, q=q, k=k, v=k if v is None else v, cu_seqlens_q=lengths[0], cu_seqlens_k=lengths[1],
        leftpad_k=leftpad_k, block_table=block_table,
    )  # fmt: skip


def test_softmax_gives_the_extension_upstreams_arguments(cuda_call, extension):
    stands_for_extension.fwd(*cuda_call)
    assert extension.given == [("fwd", cuda_call)]


def test_no_argument_says_that_there_is_no_softmax(cuda_call):
    """The extension's stand-in has upstream's signature, and calls without softmax don't reach it."""
    with pytest.raises(TypeError, match=r"fwd\(\) takes 13 arguments .* and got 14"):
        stands_for_extension.fwd(*cuda_call, False)


PLAIN = ("identity", 0.0, None, None, 1.0, None, None, None, None, False)


@pytest.mark.parametrize("options, tensors, score", [
    (dict(), dict(), None),
    (dict(activation="silu"), dict(), ("silu", *PLAIN[1:])),
    (dict(activation="sigmoid", sigmoid_bias=None), dict(), ("sigmoid", None, *PLAIN[2:])),
    (dict(activation="sigmoid"), dict(sigmoid_biases=(4,)), ("sigmoid", 0.0, (4,), *PLAIN[3:])),
    (dict(normalization="1/visible"), dict(), (*PLAIN[:3], "1/visible", *PLAIN[4:])),
    (dict(factor=1 / 64), dict(), (*PLAIN[:4], 1 / 64, *PLAIN[5:])),
    (dict(), dict(row_factors=(2,)), (*PLAIN[:5], (2,), *PLAIN[6:])),
    (dict(), dict(row_factors=(2, 3)), (*PLAIN[:6], (2, 3), *PLAIN[7:])),
    (dict(), dict(decay_slopes=(2, 4)), (*PLAIN[:7], (2, 4), *PLAIN[8:])),
    (dict(), dict(decay_slopes=(2, 4), diagonal=(2,)), (*PLAIN[:7], (2, 4), (2,), False)),
    (dict(window_left=3), dict(diagonal=(2,)), (*PLAIN[:8], (2,), False)),
    (dict(), dict(diagonal=(2,)), None),  # no position counts
    (dict(wide=True), dict(), (*PLAIN[:9], True)),
], ids=str)  # fmt: skip
def test_extension_is_told_of_the_score_function(extension, options, tensors, score):
    """Forward and backward, as its last argument."""
    q, k = fake(2, 3, 4, 8), fake(2, 5, 4, 8)
    tensors = {name: fake(*shape, dtype=torch.float32) for name, shape in tensors.items()}
    call = nosoftmax_call(q, k, longest=(3, 5), **options)._replace(**tensors)
    assert fa2.obstacle(call) is None
    fa2.forward(call)
    fa2.backward(call, q, None)
    for _, arguments in extension.given:
        last = arguments[-1]
        assert (last if last is None else tuple(without_fakes(last))) == score


@pytest.mark.parametrize("count, by_row", [(2, False), (9, True)])
def test_packed_factors_are_of_sequences_or_rows(extension, count, by_row):
    q, starts = fake(9, 2, 8), fake(3, dtype=torch.int32)
    call = nosoftmax_call(q, q, None, starts, starts, longest=(5, 5))
    fa2.forward(call._replace(row_factors=fake(count, dtype=torch.float32)))
    ((_, arguments),) = extension.given
    assert without_fakes(arguments[-1])[5:7] == ([None, (count,)] if by_row else [(count,), None])


def test_as_many_sequences_as_rows_means_rows(extension):
    q, starts = fake(2, 2, 8), fake(3, dtype=torch.int32)
    call = nosoftmax_call(q, q, None, starts, starts, longest=(2, 2))
    fa2.forward(call._replace(row_factors=fake(2, dtype=torch.float32)))
    assert without_fakes(extension.given[0][1][-1])[5:7] == [None, (2,)]


def test_stock_extension_is_refused_without_softmax(cuda_call, extension):
    extension.has_use_softmax = False
    stands_for_extension.fwd(*cuda_call)
    reason = fa2.obstacle(nosoftmax_call(cuda_call[0]))
    assert "unpatched" in reason and "make wheel BACKEND=cuda" in reason


def without_fakes(args: tuple) -> list:
    """Replace fake tensors by their shapes, because comparing tensors would compute."""
    return [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in args]


WINDOWS = pytest.mark.parametrize("window, handed", [
    (dict(), (False, -1, -1)),
    (dict(window_right=0), (True, -1, -1)),
    (dict(window_left=3, window_right=0), (True, 3, -1)),
    (dict(window_left=3, window_right=1), (False, 3, 1)),
], ids=str)  # fmt: skip


@WINDOWS
def test_patched_extension_is_told_of_dense_calls(extension, window, handed):
    """The last arguments are use_softmax=False and no score function. The extension sets the right side of a
    causal call itself. Its backward gets q as `out`, of which it only checks the shape.
    """
    q, k = fake(1, 2, 2, 8), fake(1, 5, 1, 8)
    call = nosoftmax_call(q, k, longest=(2, 5), deterministic=True, **window)
    result = fa2.forward(call)
    assert result.out is q and result.rng_state is None and result.s_dmask is None
    dq, dk, dv = fa2.backward(call, q, None)
    assert dq is q and dk is k and dv is k
    (_, forward), (_, backward) = extension.given
    assert [name for name, _ in extension.given] == ["fwd", "bwd"]
    q_, k_ = (1, 2, 2, 8), (1, 5, 1, 8)
    assert without_fakes(forward) == [
        q_,
        k_,
        k_,
        None,
        None,
        0.0,
        0.3,
        *handed,
        0.0,
        False,
        None,
        False,
        None,
    ]
    assert without_fakes(backward) == [
        q_, q_, k_, k_, q_, (0,), None, None, None, None, 0.0, 0.3, *handed, 0.0, True, None, None, False,
        None
    ]  # fmt: skip
    assert backward[4] is q and backward[5].dtype == torch.float32
    assert (len(forward), len(backward)) == (EXTENSION_ARGUMENTS["fwd"] + 2, EXTENSION_ARGUMENTS["bwd"] + 2)


def test_patched_extension_is_told_of_packed_calls(extension):
    q, k, starts, table, state = (
        fake(9, 2, 8),
        fake(3, 256, 1, 8),
        *(fake(*n, dtype=torch.int32) for n in ((3,), (2, 2), (2,))),
    )
    call = nosoftmax_call(
        q, k, None, starts, starts, block_table=table, longest=(5, 300), window_right=0, dropout_p=0.1
    )
    assert fa2.forward(call).rng_state is not None
    dense = nosoftmax_call(q, q, None, starts, starts, longest=(5, 5), window_right=0, dropout_p=0.1)
    fa2.backward(dense, q, state)
    (_, forward), (_, backward) = extension.given
    assert [name for name, _ in extension.given] == ["varlen_fwd", "varlen_bwd"]
    q_, k_, handed = (9, 2, 8), (3, 256, 1, 8), (True, -1, -1)
    assert without_fakes(forward) == [
        q_, k_, k_, None, (3,), (3,), None, None, (2, 2), None, 5, 300, 0.1, 0.3, False, *handed, 0.0, False,
        None, False, None
    ]  # fmt: skip
    assert without_fakes(backward) == [
        q_, q_, q_, q_, q_, (0,), None, None, None, (3,), (3,), None, 5, 5, 0.1, 0.3, False, *handed, 0.0,
        False, None, (2,), False, None
    ]  # fmt: skip
    assert (len(forward), len(backward)) == (
        EXTENSION_ARGUMENTS["varlen_fwd"] + 2,
        EXTENSION_ARGUMENTS["varlen_bwd"] + 2,
    )


@pytest.mark.parametrize("left_padded", [False, True])
def test_patched_extension_is_told_of_caches(extension, left_padded, monkeypatch):
    """The extension reads left padding only if it also gets lengths."""
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *args, **options: full(*args, **{**options, "device": "cpu"}))
    q, cache, pad = fake(1, 2, 2, 8), fake(3, 512, 1, 8), fake(1, dtype=torch.int32) if left_padded else None
    given = Cache(None, None, None, None, None, None, True, 4, True)
    fa2.forward(
        nosoftmax_call(q, cache, cache=given, leftpad_k=pad, longest=(2, 512), window_left=7, window_right=0)
    )
    ((name, args),) = extension.given
    assert name == "fwd_kvcache" and len(args) == EXTENSION_ARGUMENTS["fwd_kvcache"] + 2
    lengths, padding = ((1,), (1,)) if left_padded else (None, None)
    assert without_fakes(args) == [
        (1, 2, 2, 8), (3, 512, 1, 8), (3, 512, 1, 8), None, None, lengths, None, None, None, padding, None,
        None, None, 0.3, True, 7, -1, 0.0, True, 4, False, None,
    ]  # fmt: skip
    assert not left_padded or args[5].tolist() == [512]


@pytest.mark.parametrize("head_dim, padded", [(8, 8), (59, 64), (40, 40)])
def test_extension_gets_padded_head_dims(extension, head_dim, padded):
    """The extension gets padded head dimensions, and its results are cut."""
    x = torch.randn(1, 2, 2, head_dim)
    call = nosoftmax_call(x)
    out = fa2.forward(call).out
    grads = fa2.backward(call, x, None)
    for _, args in extension.given:
        assert {a.shape[-1] for a in args if isinstance(a, torch.Tensor) and a.dim() == 4} == {padded}
    assert torch.equal(out, x) and all(torch.equal(grad, x) for grad in grads)


@pytest.mark.parametrize("activation", ["relu", "gelu", "sigmoid"])
@pytest.mark.parametrize("normalization", [None, "1/n", "1/visible"])
def test_extension_takes_every_score_function(extension, activation, normalization):
    call = nosoftmax_call(fake(1, 2, 2, 8), activation=activation, normalization=normalization)
    assert fa2.obstacle(call) is None


@pytest.mark.parametrize("tensors, words", [
    (dict(q=fake(1, 2, 2, 8, dtype=torch.float32)), "q has dtype torch.float32"),
    (dict(q=fake(1, 2, 2, 8), v=fake(1, 2, 2, 16)), "head_dim=8 and head_dim_v=16"),
    (dict(q=fake(1, 2, 2, 264)), "head_dim=264"),
    (dict(q=fake(2, 2, 8), k=fake(3, 16, 2, 8), block_table=fake(1, 2, dtype=torch.int32)), "pages of 16 "
        "keys"),
    (dict(q=fake(1, 2, 2, 256)), None),
])  # fmt: skip
def test_extension_has_limits(extension, tensors, words):
    reason = fa2.obstacle(nosoftmax_call(**tensors))
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize("kind", ["hip", "triton"])
def test_rocm_has_softmax_alone(cuda_call, extension, kind, monkeypatch):
    if kind == "hip":
        monkeypatch.setattr(torch.version, "hip", "6.2")
    else:
        package = "flash_attn.flash_attn_triton_amd"
        monkeypatch.setattr(stands_for_extension, "USE_TRITON_ROCM", True)
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(interface_fa=extension))
    stands_for_extension.fwd(*cuda_call)
    assert extension.given == [("fwd", cuda_call)]
    assert "ROCm" in fa2.obstacle(nosoftmax_call(cuda_call[0]))


def test_an_argument_that_some_releases_lack(cuda_call, extension, monkeypatch):
    """An argument [in brackets] reaches the extension, the CPU ignores it, and any other number of arguments
    is refused.
    """
    table = stands_for_extension.SIGNATURES["fwd"]
    monkeypatch.setitem(stands_for_extension.SIGNATURES, "fwd", f"{table} [num_splits]")
    fwd = stands_for_extension._entry("fwd")
    for call in (cuda_call, (*cuda_call, 0)):
        fwd(*call)
        assert extension.given.pop() == ("fwd", call)
    with pytest.raises(TypeError, match=r"takes 13 or 14 arguments .* and got 15"):
        fwd(*cuda_call, 0, 0)
    q = torch.randn(1, 2, 1, 8)
    rest = (None, None, 0.0, 1.0, False, -1, -1, 0.0, False, None)
    assert torch.equal(fwd(q, q, q, *rest, 0)[0], fwd(q, q, q, *rest)[0])


def test_too_few_arguments(cuda_call):
    with pytest.raises(TypeError, match=r"fwd\(\) takes 13 arguments .*return_softmax, gen.*\) and got 11"):
        stands_for_extension.fwd(*cuda_call[:-2])


@pytest.mark.parametrize(
    "error, expected",
    [
        (
            RuntimeError(
                "This flash attention build has no kernels for fp16: rebuild with DTYPES=fp16 added"
            ),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (
            NotImplementedError(
                "flash_attn_2_cuda has no kernels for use_softmax=False, it was built from unpatched sources"
            ),
            False,
        ),
        (AssertionError("This flash attention build has no kernels"), False),
    ],
)
def test_only_kernels_that_are_not_built_are_skipped(error, expected):
    assert not_in_this_build(error) is expected
