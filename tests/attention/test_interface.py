"""The Python surface: signatures, callers from before this patch set, operators under torch.compile, errors."""
from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace

import flash_attn
import flash_attn.flash_attn_interface as interface
import pytest
import torch
from flash_attn import backends
from flash_attn.tracing import constant_when_traced
from torch._subclasses.fake_tensor import FakeTensorMode

from calls import DIFFERENTIABLE, LENGTHS, close, inputs, run, sample
from package import cumulative, not_in_this_build

# What upstream's functions take by position, and how many arguments each layer beneath them took.
DENSE = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
UPSTREAM = {
    "flash_attn_func": f"q k v {DENSE}",
    "flash_attn_kvpacked_func": f"q kv {DENSE}",
    "flash_attn_qkvpacked_func": f"qkv {DENSE}",
    "flash_attn_varlen_func": f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {DENSE} block_table",
    "flash_attn_varlen_kvpacked_func": f"q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {DENSE}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {DENSE}",
    "flash_attn_with_kvcache": "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx "
    "cache_leftpad block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
    "return_softmax_lse",
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


def test_import_brings_no_compiler():
    """torch._dynamo takes more than a second to import, and FA4's requirements several."""
    heavy = ("torch._dynamo", "triton", "cutlass")
    program = f"import sys, torch, flash_attn, flash_attn.linear; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_constant_when_traced_is_torchs_own_mark():
    mine, torchs = (lambda: 1), (lambda: 1)
    assert vars(constant_when_traced(mine)) == vars(torch.compiler.assume_constant_result(torchs)) != {}


MODES = pytest.mark.parametrize("use_softmax", [True, False], ids=["softmax", "no_softmax"])
FUNCTIONS = pytest.mark.parametrize("name", DIFFERENTIABLE)


@pytest.mark.parametrize("name", UPSTREAM)
def test_signature(name):
    parameters = list(inspect.signature(getattr(flash_attn, name)).parameters.values())
    before, (use_softmax, *keyword_only) = parameters[:-6], parameters[-6:]
    assert [p.name for p in before] == UPSTREAM[name].split()
    assert (use_softmax.name, use_softmax.default) == ("use_softmax", True)
    assert use_softmax.kind == use_softmax.POSITIONAL_OR_KEYWORD
    assert [(p.name, p.default) for p in keyword_only] == [
        ("activation", "identity"), ("sigmoid_bias", 0.0), ("normalization", None), ("algorithm", "auto"),
        ("backend", "auto"),
    ]  # fmt: skip
    assert all(p.kind == p.KEYWORD_ONLY for p in keyword_only)


def positional(name: str) -> list:
    """Upstream's arguments after tensors and lengths, down to return_attn_probs or block_table."""
    return [0.0, 0.3, True, (2, 0), 0.0, None, True, True] + [None] * (name == "flash_attn_varlen_func")


@FUNCTIONS
def test_old_positional_callers(name, device):
    """A call as it was written for upstream gives softmax attention: by the function, and by its autograd class."""
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
    """The operators and what stands for the extension take upstream's arguments alone, and then mean softmax."""
    ops, options = torch.ops.flash_attn, (0.0, 0.3, True, -1, -1, 0.0)
    q, k, v = (t.detach().contiguous() for t in inputs("flash_attn_func", device)[0])
    out, lse, _, rng_state = ops._flash_attn_forward(q, k, v, *options, None, False)
    fwd = (q, k, v, None, None, *options, False, None)
    assert len(fwd) == EXTENSION_ARGUMENTS["fwd"] and torch.equal(interface.flash_attn_gpu.fwd(*fwd)[0], out)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    ops._flash_attn_backward(q, q, k, v, out, lse, *gradients, *options, None, True, rng_state)
    bwd = (q, q, k, v, out, lse, None, None, None, None, *options, True, None, rng_state)
    assert len(bwd) == EXTENSION_ARGUMENTS["bwd"]
    for actual, expected in zip(interface.flash_attn_gpu.bwd(*bwd)[:3], gradients, strict=True):
        assert torch.equal(actual, expected)

    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    cu = cumulative([8, 8], device)
    packed = (cu, cu, 8, 8)
    varlen_out, lse, _, rng_state = ops._flash_attn_varlen_forward(q, k, v, *packed, 0.0, 0.3, True)
    assert torch.equal(varlen_out, out.flatten(0, 1))
    varlen_fwd = (q, k, v, None, cu, cu, None, None, None, None, 8, 8, 0.0, 0.3, False, True, -1, -1, 0.0, False, None)
    assert len(varlen_fwd) == EXTENSION_ARGUMENTS["varlen_fwd"]
    assert torch.equal(interface.flash_attn_gpu.varlen_fwd(*varlen_fwd)[0], varlen_out)
    flat = [torch.empty_like(x) for x in (q, k, v)]
    ops._flash_attn_varlen_backward(q, q, k, v, varlen_out, lse, *flat, *packed, *options, None, True, rng_state)
    varlen_bwd = (q, q, k, v, varlen_out, lse, None, None, None, cu, cu, None, 8, 8, 0.0, 0.3, False, True, -1, -1, 0.0,
                  True, None, rng_state)  # fmt: skip
    assert len(varlen_bwd) == EXTENSION_ARGUMENTS["varlen_bwd"]
    by_extension = interface.flash_attn_gpu.varlen_bwd(*varlen_bwd)[:3]
    for actual, by_operator, expected in zip(by_extension, flat, gradients, strict=True):
        assert torch.equal(actual, by_operator)
        close(actual, expected.flatten(0, 1))


def test_old_positional_callers_of_the_cache(device):
    q, k_cache, v_cache = (t.detach() for t in inputs("flash_attn_func", device)[0])
    lengths = torch.tensor([4, 6], dtype=torch.int32, device=device)
    expected = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, causal=True, softmax_scale=0.3
    )
    old = (q, k_cache, v_cache, None, None, None, None, lengths, None, None, None, 0.3, True, (-1, -1), 0.0, True, None,
           0, True)  # fmt: skip
    assert len(old) == len(UPSTREAM["flash_attn_with_kvcache"].split())
    out, lse = flash_attn.flash_attn_with_kvcache(*old)
    assert torch.equal(out, expected) and lse.shape == (2, 2, q.shape[1])
    by_extension = (q, k_cache, v_cache, None, None, lengths, None, None, None, None, None, None, None, 0.3, True, -1,
                    -1, 0.0, True, 0)  # fmt: skip
    assert len(by_extension) == EXTENSION_ARGUMENTS["fwd_kvcache"]
    assert torch.equal(interface.flash_attn_gpu.fwd_kvcache(*by_extension)[0], expected)


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
    """qkv or kv in one tensor, a batch or sequences on end: one attention, one gradient."""
    actual = run(name, device, causal=True, use_softmax=use_softmax)
    plain = "flash_attn_varlen_func" if "varlen" in name else "flash_attn_func"
    for a, expected in zip(actual, run(plain, device, causal=True, use_softmax=use_softmax), strict=True):
        close(a, expected)


@MODES
def test_varlen_is_one_sequence_after_the_other(use_softmax, device):
    (q, k, v), lengths = inputs("flash_attn_varlen_func", device)
    out = flash_attn.flash_attn_varlen_func(q, k, v, *lengths, causal=True, use_softmax=use_softmax)
    pieces = ([t[None] for t in three] for three in zip(*(t.split(LENGTHS) for t in (q, k, v)), strict=True))
    close(out, torch.cat([flash_attn.flash_attn_func(*p, causal=True, use_softmax=use_softmax)[0] for p in pieces]))


@MODES
@FUNCTIONS
def test_strided_dout(name, use_softmax, device):
    """The gradient that comes in may be a view of any strides."""
    shape = inputs(name, device)[0][0].shape
    shape = shape[:-3] + shape[-2:] if "qkvpacked" in name else shape
    wide = sample(device, *shape[:-1], 2 * shape[-1])
    strided = [wide[..., ::2], wide.transpose(0, 1).contiguous().transpose(0, 1)[..., : shape[-1]]]
    for dout in strided:
        assert not dout.is_contiguous()
        actual = run(name, device, dout=dout, use_softmax=use_softmax)
        for a, expected in zip(actual, run(name, device, dout=dout.contiguous(), use_softmax=use_softmax), strict=True):
            close(a, expected)


@MODES
@pytest.mark.parametrize("head_dim", [40, 59, 111])
def test_scale_comes_from_the_unpadded_head_dim(head_dim, use_softmax, device):
    """Head dims are padded to a multiple of 8 beneath the function; neither scale nor gradients show it."""
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
    """(bytes kept for the backward pass, addresses of their memory, the output)."""
    kept: list[torch.Tensor] = []
    tensors, lengths = inputs(name, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = getattr(flash_attn, name)(*tensors, *lengths, use_softmax=use_softmax)
    return sum(t.nbytes for t in kept), {t.data_ptr() for t in kept if t.numel()}, out


@FUNCTIONS
def test_neither_output_nor_lse_is_saved(name, device):
    tensors, lengths = inputs(name, device)
    needed = sum(t.nbytes for t in tensors) + sum(t.nbytes for t in lengths if isinstance(t, torch.Tensor)) + 2 * 8
    saved, addresses, out = saved_bytes(name, device, use_softmax=False)
    assert saved == needed and out.data_ptr() not in addresses
    saved, addresses, out = saved_bytes(name, device, use_softmax=True)
    lse = out[..., 0].numel() * 4
    assert saved == needed + out.nbytes + lse and out.data_ptr() in addresses


def operator_calls(device: str, use_softmax: bool, seqlen_q: int, dropout_p: float):
    """(operator, arguments) of the four operators, q, k, v being views of packed tensors."""
    ops, tail = torch.ops.flash_attn, (use_softmax, "identity", 0.0, None)
    options, encoded = (dropout_p, 0.3, True, 3, 0, 0.0), dropout_p > 0
    q, k, v = sample(device, 2, seqlen_q, 2, 4, 8)[:, :, 0], *sample(device, 2, 6, 2, 2, 8).unbind(2)
    dense = (q, k, v, *options, None, encoded, *tail)
    yield ops._flash_attn_forward, dense
    out, lse, _, rng_state = ops._flash_attn_forward(*dense)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    yield ops._flash_attn_backward, (out, q, k, v, out, lse, *gradients, *options, None, True, rng_state, *tail)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    packed = (cumulative([seqlen_q, seqlen_q], device), cumulative([0, 12], device), seqlen_q, 12)
    varlen = (q, k, v, *packed, *options, None, encoded, None, None, None, False, *tail)
    yield ops._flash_attn_varlen_forward, varlen
    out, lse, _, rng_state = ops._flash_attn_varlen_forward(*varlen)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    backward = (out, q, k, v, out, lse, *gradients, *packed, *options, None, True, rng_state, False, *tail)
    yield ops._flash_attn_varlen_backward, backward


@MODES
@pytest.mark.parametrize("seqlen_q,dropout_p", [(5, 0.0), (1, 0.0), (5, 0.2)], ids=["plain", "decode", "dropout"])
def test_operators_pass_opcheck(seqlen_q, dropout_p, use_softmax, device):
    """Schema, aliasing and mutation are as declared, and the fake kernels return what the real ones return.

    The last check runs each operator twice and compares. Upstream's CUDA kernels leave memory unwritten where nobody is to
    look: the generator's state without dropout, and the padding of the encoded weights with softmax.
    """
    unwritten = device == "cuda" and (use_softmax or dropout_p == 0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operators = set()
    for operator, arguments in operator_calls(device, use_softmax, seqlen_q, dropout_p):
        operator(*arguments)  # what this build lacks is said here in words that opcheck would wrap
        torch.library.opcheck(operator.default, arguments, test_utils=checks[:-1] if unwritten else checks)
        operators.add(operator)
    assert len(operators) == 4


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


def test_the_cache_compiles(device):
    """The KV-cache function is no operator; it still runs inside a compiled function, and still appends in place."""
    torch._dynamo.reset()
    q, k_cache, v_cache = (t.detach() for t in inputs("flash_attn_func", device)[0])
    lengths = torch.tensor([3, 5], dtype=torch.int32, device=device)
    caches = [(k_cache.clone(), v_cache.clone()) for _ in range(2)]

    def step(k, v):
        return flash_attn.flash_attn_with_kvcache(
            q[:, :1], k, v, q[:, 1:2], q[:, 2:3], cache_seqlens=lengths, causal=True, use_softmax=False
        )

    close(torch.compile(step, backend="aot_eager")(*caches[0]), step(*caches[1]))
    for actual, expected in zip(*caches, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
def test_no_log_sum_exp_to_return(activation, device):
    """Where the backend cannot run the call anyway, that is what is said: leaving the log-sum-exp out would not help."""
    q = sample(device, 1, 2, 2, 8)
    words = "return_softmax_lse=True.*use_softmax=False"
    if device == "cuda" and activation == "sigmoid":
        words = "FLASH_ATTENTION_NOSOFTMAX_BACKEND=fa2 is not possible: flash_attn_2_cuda has no kernels for activation='sigmoid'"
    with pytest.raises(ValueError, match=words):
        flash_attn.flash_attn_with_kvcache(q, q, q, return_softmax_lse=True, use_softmax=False, activation=activation)


@pytest.mark.parametrize("name", UPSTREAM)
@pytest.mark.parametrize(
    "options,words",
    [
        (dict(use_softmax=False, activation="softmax"), "activation='softmax'.*identity.*silu"),
        (dict(use_softmax=False, normalization="1/seqlen"), "normalization='1/seqlen'.*1/n"),
        (dict(use_softmax=False, activation="sigmoid", sigmoid_bias=float("nan")), "sigmoid_bias=nan.*finite"),
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
    with pytest.raises(ValueError, match=f"one device.*q on {device}.*kcache on meta"):
        flash_attn.flash_attn_with_kvcache(q, q.to("meta"), q.to("meta"), use_softmax=False)


# Which backend a CUDA tensor reaches can be seen without a GPU: the tensors are fake, and so is the extension.
SCORE_DEFAULTS = ("identity", 0.0, None)


@pytest.fixture
def cuda_call():
    with FakeTensorMode():
        q = torch.empty(1, 2, 2, 8, dtype=torch.float16, device="cuda")
    return q, q, q, None, None, 0.0, 0.3, False, -1, -1, 0.0, False, None


def test_cuda_tensor_without_the_extension(cuda_call, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", None)
    with pytest.raises(ImportError, match="make wheel BACKEND=cuda"):
        backends.fwd(*cuda_call)


@pytest.fixture
def extension(monkeypatch):
    """A compiled extension that returns its arguments."""
    module = SimpleNamespace(__name__="flash_attn_2_cuda", fwd=lambda *args: args)
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", module)
    return module


def test_softmax_gives_the_extension_upstreams_arguments(cuda_call, extension):
    assert backends.fwd(*cuda_call) == backends.fwd(*cuda_call, True, *SCORE_DEFAULTS) == cuda_call


def test_stock_extension_is_refused_without_softmax(cuda_call, extension):
    with pytest.raises(NotImplementedError, match="unpatched.*make wheel BACKEND=cuda"):
        backends.fwd(*cuda_call, False, *SCORE_DEFAULTS)


def test_patched_extension_is_told(cuda_call, extension):
    extension.has_use_softmax = True
    assert backends.fwd(*cuda_call, False, *SCORE_DEFAULTS) == (*cuda_call, False)


@pytest.mark.parametrize("options", [("relu", 0.0, None), ("sigmoid", None, None), ("identity", 0.0, "1/n")])
def test_extension_lacks_an_activation(cuda_call, extension, options):
    extension.has_use_softmax = True
    with pytest.raises(NotImplementedError, match=f"{options[0]}.*flash-attn-4.*flash_attn.cpu"):
        backends.fwd(*cuda_call, False, *options)


@pytest.mark.parametrize("kind", ["hip", "triton"])
def test_rocm_has_softmax_alone(cuda_call, extension, kind, monkeypatch):
    if kind == "hip":
        monkeypatch.setattr(torch.version, "hip", "6.2")
    else:
        package = "flash_attn.flash_attn_triton_amd"
        monkeypatch.setattr(backends, "USE_TRITON_ROCM", True)
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(interface_fa=extension))
    assert backends.fwd(*cuda_call) == cuda_call
    with pytest.raises(NotImplementedError, match="ROCm"):
        backends.fwd(*cuda_call, False, *SCORE_DEFAULTS)


def test_too_few_arguments(cuda_call):
    with pytest.raises(TypeError, match=r"fwd\(\) lacks its last arguments: return_softmax, gen"):
        backends.fwd(*cuda_call[:-2])


def test_patched_extension_gets_a_whole_tensor_for_out(cuda_call, extension):
    """It checks the shape of `out` in backward, where nothing is kept in it without softmax."""
    extension.has_use_softmax, extension.bwd = True, lambda *args: args
    q, k = cuda_call[:2]
    with FakeTensorMode():
        dout, lse = torch.empty(q.shape, device="cuda"), torch.empty(0, device="cuda")
    rest = (None,) * (EXTENSION_ARGUMENTS["bwd"] - 6)
    assert backends.bwd(dout, q, k, k, lse, lse, *rest, False, *SCORE_DEFAULTS)[4] is q
    assert backends.bwd(dout, q, k, k, lse, lse, *rest)[4] is lse


@pytest.mark.parametrize("error, expected", [
    (NotImplementedError("flash_attn_2_cuda has no kernels for activation='relu', sigmoid_bias=0.0, normalization=None; ..."), True),
    (ValueError('backend="fa2" is not possible: flash_attn_2_cuda has no kernels for activation=\'relu\', ...'), True),
    (RuntimeError("This flash attention build has no kernels for fp16: rebuild with DTYPES=fp16 added"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (NotImplementedError("flash_attn_2_cuda has no kernels for use_softmax=False, it was built from unpatched sources"), False),
    (AssertionError("This flash attention build has no kernels"), False),
])
def test_only_kernels_that_are_not_built_are_skipped(error, expected):
    assert not_in_this_build(error) is expected
