"""Test which backend runs a call: the rule, its reasons, forcing a backend, and the arguments that FA4 gets.

FA4 is a stand-in here: a package flash_attn.cute that records its calls and computes on the CPU, and a GPU
that claims to be a Hopper. Where a test computes, CPU tensors pass for CUDA tensors.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import flash_attn
import pytest
import torch
from flash_attn import explain, extension, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.masks import HSTU
from flash_attn.nosoftmax import REVISION, choice, interface
from flash_attn.nosoftmax.backends import fa2, fa4
from flash_attn.nosoftmax.backends.linear import primitive
from flash_attn.nosoftmax.call import Options
from torch._subclasses.fake_tensor import FakeTensorMode

from calls import DIFFERENTIABLE, close, inputs, run
from package import cumulative

HOPPER = """
from flash_attn.nosoftmax.backends import cpu

CALLS = []

def obstacle(call):
    options = dict(softcap=call.options.softcap, dropout_p=call.options.dropout_p,
        alibi_slopes=call.alibi_slopes is not None)
    return next((f"the stand-in has no {name}" for name, given in options.items() if given), None)

def forward(call):
    CALLS.append(call)
    return cpu.forward(call).out

def backward(call, dout):
    return cpu.backward(call, dout, None)
"""
OURS = {
    "__init__.py": "", "nosoftmax/__init__.py": "", "nosoftmax/revision.py": f"REVISION = {REVISION}",
    "nosoftmax/hopper.py": HOPPER
}  # fmt: skip
UPSTREAM = {"__init__.py": "raise AssertionError('imported to find out whose it is')"}
BROKEN = {**OURS, "__init__.py": "import no_such_requirement"}
# Only the number of another revision may be read.
LATER = {
    **OURS,
    "nosoftmax/revision.py": "REVISION = 1000",
    "nosoftmax/hopper.py": "raise AssertionError('not ours to call')",
}
BEFORE_REVISIONS = {name: text for name, text in LATER.items() if name != "nosoftmax/revision.py"}
BUILT = dict(
    built_head_dims=(32, 64, 96, 128, 192, 256), built_dtypes=("fp16", "bf16"), built_passes=("fwd", "bwd",
    "splitkv"), built_archs=(80, 90)
)  # fmt: skip
SILU = dict(use_softmax=False, activation="silu")
IDENTITY = dict(use_softmax=False)

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """install(cute, extension, capability) makes flash_attn.cute from these files, with or without the
    extension, and a GPU.
    """

    def install(
        cute: dict[str, str] | None = OURS,
        extension: bool = True,
        capability: tuple[int, int] = (9, 0),
        **built: tuple,
    ) -> None:
        for path, text in (cute or {}).items():
            (tmp_path / "cute" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cute" / path).write_text(text)
        module = ModuleType("flash_attn_2_cuda")
        module.has_use_softmax = True
        vars(module).update({**BUILT, **built})
        monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", module if extension else None)
        monkeypatch.setattr(primitive, "_TRITON", True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        forget_what_is_installed()

    monkeypatch.delenv(choice.ENVIRONMENT, raising=False)
    # Hide an installed flash_attn.cute, and restore it afterwards.
    monkeypatch.setattr(
        flash_attn,
        "__path__",
        [p for p in flash_attn.__path__ if not (Path(p) / "cute").exists()] + [str(tmp_path)],
    )
    monkeypatch.setattr(flash_attn, "cute", None, raising=False)
    hidden = forget_fa4()
    yield install
    forget_fa4()
    sys.modules.update(hidden)
    forget_what_is_installed()


def forget_fa4() -> dict[str, ModuleType]:
    """Remove flash_attn.cute from the imported modules, and return what was removed."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("flash_attn.cute")}


def forget_what_is_installed() -> None:
    """Clear the caches that assume that the installed packages do not change, as these tests change them."""
    for found in (fa4._unavailable, fa4._hopper, fa2._built, extension._found, extension.obstacle):
        found.cache_clear()
    interface._known.clear()
    importlib.invalidate_caches()


def swap_devices(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let these backends take CPU tensors for CUDA tensors, and vice versa."""
    other = {"cpu": "cuda", "cuda": "cpu"}
    for name in names:
        backend = choice._BACKENDS[name]
        swapped = tuple(other[kind] for kind in backend.device_types)
        monkeypatch.setitem(choice._BACKENDS, name, backend._replace(device_types=swapped))
    interface._known.clear()


@pytest.fixture
def fake_fa4(install: Install, monkeypatch: pytest.MonkeyPatch) -> list:
    """Give CPU tensors to FA4; returns the list of the calls that it gets."""
    install()
    swap_devices(monkeypatch, "fa4")
    return importlib.import_module("flash_attn.cute.nosoftmax.hopper").CALLS


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32, **options) -> torch.Tensor:
    """Make a tensor on a GPU, without memory."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda", **options)


def tensors(device: str, seqlen: int = 16, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    """Make q, k and v, without memory unless the device is the CPU."""
    if device == "cpu":
        return tuple(torch.zeros(1, seqlen, 2, 8) for _ in range(3))
    return tuple(on_gpu(1, seqlen, 2, 8, dtype=dtype) for _ in range(3))


# --- The rule

NO_FA4 = dict(cute=None)
PURE_PYTHON = dict(extension=False)
AMPERE = dict(capability=(8, 0))


@pytest.mark.parametrize("device, machine, options, expected, reasons", [
    ("cuda", {}, IDENTITY, "fa2", {"linear": "not predicted faster", "fa4": "less than the 60 at which it "
        "overtakes the extension"}),
    ("cuda", {}, dict(IDENTITY, backend="fa4"), "fa4", {}),
    ("cuda", {}, SILU, "fa2", {"linear": "activation='silu'", "fa4": "less than the 60"}),
    ("cuda", {}, dict(SILU, algorithm="quadratic"), "fa2", {"fa4": "less than the 60"}),
    ("cuda", dict(built_dtypes=("bf16",)), SILU, "fa4", {"linear": "activation='silu'"}),
    ("cuda", AMPERE, SILU, "fa2", {"linear": "activation='silu'", "fa4": "compute capability 8.0"}),
    ("cuda", {}, dict(IDENTITY, algorithm="linear"), "linear", {}),
    ("cuda", {}, dict(IDENTITY, algorithm="linear", causal=True, normalization="1/visible"), "linear", {}),
    ("cuda", {}, dict(IDENTITY, backend="fa2"), "fa2", {}),
    ("cuda", {}, dict(IDENTITY, softcap=1.5), "fa2", {"linear": "softcap=1.5", "fa4": "the stand-in has no "
        "softcap"}),
    ("cuda", {}, dict(IDENTITY, dropout_p=0.1), "fa2", {"linear": "dropout_p=0.1", "fa4": "no dropout_p"}),
    ("cuda", {}, dict(IDENTITY, alibi_slopes=on_gpu(2)), "fa2", {"linear": "alibi_slopes",
        "fa4": "no alibi_slopes"}),
    ("cuda", {}, dict(IDENTITY, activation="gelu", backend="fa4"), "fa4", {}),
    ("cuda", {}, dict(SILU, mask=HSTU(3, 2)), "fa4", {"linear": "activation='silu'"}),
    ("cuda", AMPERE, IDENTITY, "fa2", {"linear": "", "fa4": "compute capability 8.0"}),
    ("cuda", NO_FA4, IDENTITY, "fa2", {"linear": "", "fa4": "flash-attn-4 is not installed"}),
    ("cuda", PURE_PYTHON, SILU, "fa4", {"linear": ""}),
    ("cuda", {}, dict(), "fa2", {}),
    ("cpu", {}, dict(), "cpu", {}),
    ("cpu", {}, IDENTITY, "cpu", {"linear": "not predicted faster", "fa4": "q is on cpu",
        "fa2": "q is on cpu"}),
    ("cpu", {}, SILU, "cpu", {"linear": "activation='silu'", "fa4": "", "fa2": ""}),
], ids=str)  # fmt: skip
def test_choice(install, device, machine, options, expected, reasons):
    """The first of linear, fa4, fa2 and cpu that takes the call runs it; each backend before it gives its
    reason.
    """
    install(**machine)
    chosen = explain(flash_attn_func, *tensors(device), **options)
    assert chosen.backend == expected
    assert chosen.algorithm == ("linear" if expected == "linear" else "quadratic")
    assert list(chosen.passed_over) == list(reasons)
    for name, reason in reasons.items():
        assert reason in chosen.passed_over[name] and f"not {name}: " in str(chosen)


@pytest.mark.parametrize("machine, options, reasons", [
    (PURE_PYTHON, dict(IDENTITY, dropout_p=0.1), {"linear": "dropout_p", "fa4": "",
        "fa2": "make wheel BACKEND=cuda", "cpu": ""}),
], ids=str)  # fmt: skip
def test_no_choice(install, machine, options, reasons):
    """The error lists the reason of each backend."""
    install(**machine)
    with pytest.raises(NotImplementedError) as error:
        explain(flash_attn_func, *tensors("cuda"), **options)
    first, *lines = str(error.value).splitlines()
    assert first == "no backend can run this call" and len(lines) == len(reasons)
    for line, (name, reason) in zip(lines, reasons.items()):
        assert line.startswith(f"  not {name}: ") and reason in line


def test_softmax_without_the_extension(install):
    """explain raises the error of the call."""
    install(**PURE_PYTHON)
    with pytest.raises(ImportError, match="make wheel BACKEND=cuda"):
        explain(flash_attn_func, *tensors("cuda"))


def test_linear_comes_first_where_it_pays(install):
    install()
    assert explain(flash_attn_func, *tensors("cpu", seqlen=8192), **IDENTITY).backend == "linear"


@pytest.mark.parametrize(
    "dtype, reason",
    [(torch.float32, "no kernels for torch.float32"), (torch.float16, "not predicted faster")],
)
def test_linear_says_why_it_is_passed_over(install, dtype, reason):
    install()
    assert reason in explain(flash_attn_func, *tensors("cuda", dtype=dtype), **IDENTITY).passed_over["linear"]


def shaped(
    q: tuple[int, ...],
    k: tuple[int, ...],
    head_dim_v: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    grad: bool = False,
):
    """Make q, k and v on a GPU."""
    return tuple(
        on_gpu(*shape, dtype=dtype, requires_grad=grad) for shape in (q, k, (*k[:-1], head_dim_v or k[-1]))
    )


LONG = (1, 16384, 16, 64)  # 550 GFLOP with causal=True
SHORT = (1, 4096, 16, 64)  # 34


@pytest.mark.parametrize("shapes, options, expected", [
    ((SHORT, SHORT), dict(causal=True), "fa2"),
    ((SHORT, SHORT), {}, "fa4"),
    ((LONG, LONG), dict(causal=True), "fa4"),
    ((LONG, LONG), dict(causal=True, window_size=(600, -1)), "fa2"),
    ((LONG, LONG), dict(window_size=(4095, 4096)), "fa4"),
    ((LONG, LONG), dict(window_size=(300, 300)), "fa2"),
    ((LONG, LONG), dict(window_size=(4095, -1)), "fa4"),
    (((1, 1, 16, 64), LONG), dict(causal=True), "fa2"),
    (((1, 4096, 16, 64), LONG), dict(causal=True), "fa4"),
    (((16, 512, 16, 128),) * 2, dict(causal=True), "fa2"),
    (((1, 8192, 16, 128),) * 2, dict(causal=True), "fa4"),
    (((1, 8192, 4, 64), (1, 8192, 1, 64)), dict(causal=True), "fa2"),
    (((4, 8192, 8, 64), (4, 8192, 1, 64)), dict(causal=True), "fa4"),
], ids=str)  # fmt: skip
def test_fa4_is_for_much_work(install, shapes, options, expected):
    """FA4 runs calls of 60e9 floating-point operations or more: 4 * batch * nheads * seqlen_q * seqlen_k *
    head_dim, for visible scores alone.
    """
    install()
    assert (
        explain(flash_attn_func, *shaped(*shapes), **IDENTITY, **options, algorithm="quadratic").backend
        == expected
    )


@pytest.mark.parametrize(
    "sequences, total, expected",
    [(2, 4096, "fa2"), (2, 24576, "fa4"), (16, 16384, "fa2"), (16, 65536, "fa4")],
)
def test_work_of_packed_sequences_is_that_of_mean_lengths(install, sequences, total, expected):
    """The host cannot read the lengths, which lie on the GPU, and max_seqlen is that of one sequence."""
    install()
    lengths = on_gpu(sequences + 1, dtype=torch.int32)
    tokens = (total, 16, 64)
    options = dict(IDENTITY, causal=True, algorithm="quadratic")
    chosen = explain(
        flash_attn_varlen_func, *shaped(tokens, tokens), lengths, lengths, total, total, **options
    )
    assert chosen.backend == expected


@pytest.mark.parametrize(
    "page_size, longest, expected", [(256, 4096, "fa2"), (256, 65536, "fa4"), (16, 4096, "fa4")]
)
def test_work_of_pages_is_that_of_the_longest_sequence(install, page_size, longest, expected):
    """The size of the pool does not count. The extension takes pages of multiples of 256 only, so other page
    sizes go to FA4.
    """
    install()
    q, k, v = shaped((1024, 16, 64), (100_000, page_size, 16, 64))
    table, lengths = on_gpu(2, longest // page_size, dtype=torch.int32), on_gpu(3, dtype=torch.int32)
    chosen = explain(
        flash_attn_varlen_func, q, k, v, lengths, lengths, 512, longest, block_table=table, **IDENTITY
    )
    assert chosen.backend == expected


@pytest.mark.parametrize("machine, tensors", [
    (PURE_PYTHON, {}),
    ({}, dict(head_dim_v=32)),
    (dict(built_head_dims=(32, 128)), {}),
    (dict(built_dtypes=("fp16",)), {}),
    (dict(built_passes=("fwd", "splitkv")), dict(grad=True)),
    (dict(built_archs=(80,)), {}),
], ids=str)  # fmt: skip
def test_little_work_stays_with_fa4_where_nothing_else_runs_it(install, machine, tensors):
    install(**machine)
    assert (
        explain(
            flash_attn_func, *shaped(SHORT, SHORT, **tensors), causal=True, algorithm="quadratic", **IDENTITY
        ).backend
        == "fa4"
    )


def test_a_build_without_gradients_serves_without_them(install):
    install(built_passes=("fwd", "splitkv"))
    with torch.no_grad():
        call = explain(
            flash_attn_func, *shaped(SHORT, SHORT, grad=True), causal=True, algorithm="quadratic", **IDENTITY
        )
        assert call.backend == "fa2"


def test_rocm_has_no_fa4(install, monkeypatch):
    """MI300 reports compute capability 9.4, like a Hopper GPU."""
    install(capability=(9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(NotImplementedError, match="not fa4: it has no ROCm kernels"):
        explain(flash_attn_func, *tensors("cuda"), **IDENTITY)


def test_tensors_of_a_gpu_that_is_not_there(install, monkeypatch):
    """FakeTensorMode gives such tensors on a machine without a GPU."""

    def fail(device):
        raise AssertionError("Torch not compiled with CUDA enabled")

    install()
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert (
        "not compiled with CUDA" in explain(flash_attn_func, *tensors("cuda"), **IDENTITY).passed_over["fa4"]
    )


def test_a_cache_stays_with_the_extension(install):
    install()
    q, k, v = tensors("cuda")
    chosen = explain(
        flash_attn_with_kvcache, q, k, v, k=k, v=v, cache_seqlens=on_gpu(1, dtype=torch.int32), **IDENTITY
    )
    assert chosen.backend == "fa2"
    assert "linear_attention_step" in chosen.passed_over["linear"] and "cache" in chosen.passed_over["fa4"]


def test_nothing_can_run_the_call(install, monkeypatch):
    """The call raises the error of explain."""
    install(**NO_FA4)
    swap_devices(monkeypatch, "fa4", "fa2", "cpu")
    arguments = tensors("cpu")
    with pytest.raises(
        NotImplementedError,
        match="(?s)not fa4: .*not installed.*not fa2: q has dtype torch.float32.*not cpu: q is on cpu",
    ) as error:
        flash_attn_func(*arguments, **SILU)
    with pytest.raises(NotImplementedError) as explained:
        explain(flash_attn_func, *arguments, **SILU)
    assert str(error.value) == str(explained.value)


def test_meta_tensors_are_for_the_operators():
    q, k, v = (x.to("meta") for x in tensors("cpu"))
    assert flash_attn_func(q, k, v, **SILU).shape == q.shape


# --- Whose flash_attn.cute it is


@pytest.mark.parametrize("cute, reason", [
    (UPSTREAM, "flash-attn-4 4.0.0b36 is installed without this patch set"),
    (BROKEN, "does not import (ModuleNotFoundError: No module named 'no_such_requirement')"),
    ({**BROKEN, "__init__.py": "raise OSError('libcuda.so.1')"}, "does not import (OSError: libcuda.so.1)"),
    (LATER, f"has revision 1000 of this patch set, flash_attn has revision {REVISION}: install two wheels "
        "of one revision"),
    (BEFORE_REVISIONS, f"has revision 1 of this patch set, flash_attn has revision {REVISION}"),
], ids=["upstream's", "a requirement is missing", "a library is missing", "a later revision",
    "a revision that does not say"])  # fmt: skip
def test_another_backend_serves(install, monkeypatch, cute, reason):
    install(cute)
    monkeypatch.setattr(fa4, "metadata", SimpleNamespace(version=lambda name: "4.0.0b36"))
    chosen = explain(flash_attn_func, *tensors("cuda"), **IDENTITY)
    assert chosen.backend == "fa2" and reason in chosen.passed_over["fa4"]
    with pytest.raises(ValueError) as error:
        explain(flash_attn_func, *tensors("cuda"), **IDENTITY, backend="fa4")
    assert str(error.value).startswith('backend="fa4" is not possible: ') and reason in str(error.value)


def test_fa4_is_imported_when_it_is_needed_alone(install):
    install()
    flash_attn_func(*tensors("cpu"), **SILU)
    explain(flash_attn_func, *tensors("cuda"))
    explain(flash_attn_func, *tensors("cuda"), **IDENTITY, backend="fa2")
    assert "flash_attn.cute" not in sys.modules
    explain(flash_attn_func, *tensors("cuda"), **IDENTITY)
    assert "flash_attn.cute" in sys.modules


# --- Forcing


@pytest.mark.parametrize("options, expected", [
    (IDENTITY, "fa2"),
    (dict(IDENTITY, backend="fa4"), "fa4"),
    (dict(IDENTITY, algorithm="linear"), "linear"),
    (dict(IDENTITY, algorithm="quadratic"), "fa2"),
    (dict(), "fa2"),
], ids=str)  # fmt: skip
def test_environment(install, monkeypatch, options, expected):
    """The variable forces a backend if no argument does."""
    install()
    monkeypatch.setenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", "fa2")
    assert explain(flash_attn_func, *tensors("cuda"), **options).backend == expected


def test_environment_gives_way_to_the_algorithm_and_to_softmax(install, monkeypatch):
    install()
    monkeypatch.setenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", "linear")
    assert explain(flash_attn_func, *tensors("cuda"), **IDENTITY).backend == "linear"
    assert explain(flash_attn_func, *tensors("cuda"), **SILU, algorithm="quadratic").backend == "fa2"
    assert explain(flash_attn_func, *tensors("cuda")).backend == "fa2"
    assert torch.isfinite(flash_attn_func(*tensors("cpu"))).all()


IMPOSSIBLE = {
    'backend="fa4" is not possible: the stand-in has no dropout_p': dict(
        IDENTITY, backend="fa4", dropout_p=0.1
    ),
    'backend="fa4" is not possible with use_softmax=True: tensors on cuda': dict(backend="fa4"),
    'backend="cpu" is not possible: q is on cuda': dict(IDENTITY, backend="cpu"),
    'backend="linear" is not possible with use_softmax=True: tensors on cuda': dict(backend="linear"),
    "backend=\"linear\" is not possible: activation='gelu'": dict(
        IDENTITY, activation="gelu", backend="linear"
    ),
    "backend='fa5' is not one of ('auto', 'linear', 'fa4', 'fa2', 'cpu')": dict(IDENTITY, backend="fa5"),
    "algorithm='fast' is not one of": dict(IDENTITY, algorithm="fast"),
    'backend="fa4" is quadratic, but algorithm="linear"': dict(IDENTITY, backend="fa4", algorithm="linear"),
    "activation='tanh' is not one of": dict(IDENTITY, activation="tanh"),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible(install, monkeypatch, message):
    """explain and the call raise the same message, whatever the tensors."""
    install()
    with pytest.raises(ValueError) as error:
        explain(flash_attn_func, *tensors("cuda"), **IMPOSSIBLE[message])
    assert str(error.value).startswith(message)
    if "with use_softmax=True" not in message:
        swap_devices(monkeypatch, "fa4", "fa2", "cpu")
    with pytest.raises(ValueError) as called:
        flash_attn_func(*tensors("cpu"), **IMPOSSIBLE[message])
    in_cpu_words = (
        str(error.value)
        .replace("cuda:0", "cpu")
        .replace("takes CPU", "takes CUDA")
        .replace('backend="fa2"', 'backend="cpu"')
    )
    assert str(called.value).replace('backend="fa2"', 'backend="cpu"') == in_cpu_words


@pytest.mark.parametrize("value, message", [
    ("fa4", "FLASH_ATTENTION_NOSOFTMAX_BACKEND=fa4 is not possible: q is on cpu"),
    ("fa5", "FLASH_ATTENTION_NOSOFTMAX_BACKEND=fa5 is not one of"),
])  # fmt: skip
def test_impossible_environment(monkeypatch, value, message):
    monkeypatch.setenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", value)
    with pytest.raises(ValueError, match=message):
        flash_attn_func(*tensors("cpu"), **IDENTITY)
    assert torch.isfinite(flash_attn_func(*tensors("cpu"))).all()
    assert explain(flash_attn_func, *tensors("cpu")).backend == "cpu"  # with softmax the variable is ignored


@pytest.mark.parametrize("count, kwargs, message", [
    (2, IDENTITY, "missing a required argument: 'v'"),
    (2, dict(IDENTITY, nonsense=1), "missing a required argument: 'v'"),
    (3, dict(IDENTITY, nonsense=1), "got an unexpected keyword argument 'nonsense'"),
    (3, dict(IDENTITY, q=None), "multiple values for argument 'q'"),
    (13, {}, "too many positional arguments"),
], ids=str)  # fmt: skip
def test_wrong_calls_raise_what_python_raises(count, kwargs, message):
    for ask in (flash_attn_func, lambda *args, **kwargs: explain(flash_attn_func, *args, **kwargs)):
        with pytest.raises(TypeError, match=rf"flash_attn_func\(\): {message}"):
            ask(*[*tensors("cpu"), *[None] * 10][:count], **kwargs, algorithm="linear")


def test_explain_takes_the_attention_functions():
    with pytest.raises(TypeError, match="none of the attention functions"):
        explain(torch.nn.functional.scaled_dot_product_attention, *tensors("cpu"))


# --- The arguments that FA4 gets, and its results


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_go_through_the_packing(fake_fa4, name):
    """Through FA4, each of the six functions gives the output and gradients of the CPU backend."""
    options = dict(SILU, causal=True, window_size=(2, 0), softmax_scale=0.3)
    actual, count = run(name, "cpu", **options), len(fake_fa4)
    expected = run(name, "cpu", **options, backend="cpu")
    assert count == len(fake_fa4) == 1
    for a, e in zip(actual, expected, strict=True):
        close(a, e)


def test_options_as_fa4_is_handed_them(fake_fa4):
    q, k, v = tensors("cpu")
    flash_attn_func(
        q, k, v, softmax_scale=0.3, causal=True, window_size=(5, -1), deterministic=True, use_softmax=False,
        activation="sigmoid", sigmoid_bias="-log n", normalization="1/n",
    )  # fmt: skip
    (call,) = fake_fa4
    assert call.options == Options(
        max_seqlen_q=16, max_seqlen_k=16, dropout_p=0.0, softmax_scale=0.3, window_left=5, window_right=0,
        softcap=0.0, deterministic=True, return_attn_probs=False, activation="sigmoid", sigmoid_bias=None,
        normalization="1/n", factor=1.0,
    )  # fmt: skip
    assert all(a is b for a, b in zip(call.tensors[:3], (q, k, v), strict=True)) and not any(
        x is not None for x in call.tensors[3:]
    )


def test_packed_calls_as_fa4_is_handed_them(fake_fa4):
    """Lengths may be int64. FA4 gets int32, and one tensor for both lengths if the caller passed one."""
    q, lengths = torch.randn(8, 2, 8), torch.tensor([0, 3, 8])
    flash_attn_varlen_func(q, q, q, lengths, lengths, 5, 5, **SILU)
    (call,) = fake_fa4
    assert call.cu_seqlens_q.dtype == torch.int32 and call.cu_seqlens_q.tolist() == [0, 3, 8]
    assert call.cu_seqlens_k is call.cu_seqlens_q and call.options[:2] == (5, 5)


def test_pages(fake_fa4):
    """FA4 gets a paged cache with its table and the lengths of its sequences."""
    pages, q = torch.randn(4, 256, 2, 8), torch.randn(5, 2, 8)
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    arguments = (q, pages, pages.flip(0), cumulative([2, 3], "cpu"), cumulative([300, 200], "cpu"), 3, 300)
    actual, expected = (
        flash_attn_varlen_func(*arguments, causal=True, block_table=table, **SILU, backend=backend)
        for backend in ("auto", "cpu")
    )
    (call,) = fake_fa4
    assert call.block_table is table and call.cu_seqlens_k is arguments[4]
    close(actual, expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_attention_probabilities_are_empty(fake_fa4, name):
    arguments, lengths = inputs(name, "cpu")
    out, lse, encoded = getattr(flash_attn, name)(*arguments, *lengths, **SILU, return_attn_probs=True)
    assert (
        len(fake_fa4) == 1
        and out.numel()
        and lse.numel() == encoded.numel() == 0
        and lse.dtype == torch.float32
    )


def test_compiles_to_one_graph(fake_fa4, monkeypatch):
    """The choice is not traced: the compiled function uses another backend for tensors that FA4 does not
    take.
    """
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func"):
        torch._dynamo.reset()
        fake_fa4.clear()
        arguments, lengths = inputs(name, "cpu")

        def attend(*x):
            return getattr(flash_attn, name)(*x, *lengths, causal=True, **SILU)

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        actual = compiled(*arguments)
        assert len(fake_fa4) == 1
        with monkeypatch.context() as without_fa4, torch._dynamo.config.patch(error_on_recompile=True):
            swap_devices(without_fa4, "fa4")
            expected = compiled(*arguments)
        assert len(fake_fa4) == 1
        for a, e, by_hand in zip(
            *(
                (out, *torch.autograd.grad(out.sum(), arguments))
                for out in (actual, expected, attend(*arguments))
            )
        ):
            close(a, e)
            close(a, by_hand)
