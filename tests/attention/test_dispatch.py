"""Which backend runs a call: the rule, its reasons, how it is forced, and what FA4 is handed.

FA4 is a stand-in here: a package flash_attn.cute that records its calls and computes on the CPU, a GPU that says it is a
Hopper, and, where something is computed, CPU tensors that pass for CUDA ones.
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
from flash_attn import backends, explain, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.dispatch import choice, fa4
from flash_attn.linear import backend as linear_backend
from torch._subclasses.fake_tensor import FakeTensorMode

from calls import DIFFERENTIABLE, close, inputs, run
from package import cumulative

FA4 = """
import flash_attn
import torch

CALLS = []

def flash_attn_func(q, k, v, *, window_size, **options):
    CALLS.append({"window_size": window_size, **options})
    window_size = tuple(-1 if size is None else size for size in window_size)
    return flash_attn.flash_attn_func(q, k, v, window_size=window_size, backend="cpu", **options), None

def flash_attn_varlen_func(q, k, v, *, window_size, page_table=None, cu_seqlens_k=None, seqused_k=None, **options):
    CALLS.append({"window_size": window_size, "page_table": page_table, "cu_seqlens_k": cu_seqlens_k, **options})
    window_size = tuple(-1 if size is None else size for size in window_size)
    if page_table is not None:
        assert cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
        cu_seqlens_k = torch.nn.functional.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
    elif cu_seqlens_k is options["cu_seqlens_q"]:
        cu_seqlens_k = cu_seqlens_k.clone()  # torch.compile does not trace an autograd.Function that gets a tensor twice
    return flash_attn.flash_attn_varlen_func(
        q, k, v, cu_seqlens_k=cu_seqlens_k, block_table=page_table, window_size=window_size, backend="cpu", **options
    ), None
"""
CHECKS = """
def unsupported(
    q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, seqused_k=None, page_table=None, softmax_scale=None, softcap=0.0,
    activation="identity", normalization=None, window_size=(None, None), dropout_p=0.0, alibi_slopes=None,
):
    options = dict(softcap=softcap or None, dropout_p=dropout_p or None, alibi_slopes=alibi_slopes)
    return next((f"the stand-in has no {name}" for name, value in options.items() if value is not None), None)
"""
OURS = {"__init__.py": FA4, "nosoftmax/__init__.py": "", "nosoftmax/checks.py": CHECKS}
UPSTREAM = {"__init__.py": "raise AssertionError('imported to find out whose it is')"}
BROKEN = {**OURS, "__init__.py": "import no_such_requirement"}
BUILT = dict(
    built_head_dims=(32, 64, 96, 128, 192, 256), built_dtypes=("fp16", "bf16"), built_passes=("fwd", "bwd", "splitkv"), built_archs=(80, 90)
)  # fmt: skip
SILU = dict(use_softmax=False, activation="silu")
IDENTITY = dict(use_softmax=False)

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """install(cute, extension, capability): flash_attn.cute made of these files, the extension there or not, a GPU."""

    def install(
        cute: dict[str, str] | None = OURS, extension: bool = True, capability: tuple[int, int] = (9, 0), **built: tuple
    ) -> None:
        for path, text in (cute or {}).items():
            (tmp_path / "cute" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cute" / path).write_text(text)
        module = ModuleType("flash_attn_2_cuda")
        module.has_use_softmax = True
        vars(module).update({**BUILT, **built})
        monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", module if extension else None)
        monkeypatch.setattr(linear_backend, "_TRITON", True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    monkeypatch.delenv(choice.ENVIRONMENT, raising=False)
    # The real one, where there is one, stays out of sight, and comes back.
    monkeypatch.setattr(flash_attn, "__path__", [p for p in flash_attn.__path__ if not (Path(p) / "cute").exists()] + [str(tmp_path)])
    monkeypatch.setattr(flash_attn, "cute", None, raising=False)
    fa4._unavailable_in_this_process.cache_clear()
    importlib.invalidate_caches()
    hidden = forget_fa4()
    yield install
    forget_fa4()
    sys.modules.update(hidden)
    fa4._unavailable_in_this_process.cache_clear()


def forget_fa4() -> dict[str, ModuleType]:
    """Take flash_attn.cute out of the imported modules; what was taken out."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("flash_attn.cute")}


@pytest.fixture
def fake_fa4(install: Install, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """CPU tensors are FA4's. Grows by the keyword arguments of each call of it."""
    install()
    monkeypatch.setattr(fa4, "_DEVICE_TYPE", "cpu")
    return importlib.import_module("flash_attn.cute").CALLS


def tensors(device: str, seqlen: int = 16, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    """q, k and v without memory where the device is not the CPU."""
    if device == "cpu":
        return tuple(torch.zeros(1, seqlen, 2, 8) for _ in range(3))
    with FakeTensorMode():
        return tuple(torch.empty(1, seqlen, 2, 8, dtype=dtype, device=device) for _ in range(3))


# --- the rule ---------------------------------------------------------------------------------------------------------

NO_FA4 = dict(cute=None)
PURE_PYTHON = dict(extension=False)
AMPERE = dict(capability=(8, 0))


@pytest.mark.parametrize("device, machine, options, expected, reasons", [
    ("cuda", {}, IDENTITY, "fa2", {"linear": "not predicted faster", "fa4": "less than the 60 at which it overtakes the extension"}),
    ("cuda", {}, dict(IDENTITY, backend="fa4"), "fa4", {}),
    ("cuda", {}, SILU, "fa4", {"linear": "activation='silu'"}),
    ("cuda", {}, dict(SILU, algorithm="quadratic"), "fa4", {}),
    ("cuda", {}, dict(IDENTITY, algorithm="linear"), "linear", {}),
    ("cuda", {}, dict(IDENTITY, algorithm="linear", causal=True, normalization="1/visible"), "linear", {}),
    ("cuda", {}, dict(IDENTITY, backend="fa2"), "fa2", {}),
    ("cuda", {}, dict(IDENTITY, softcap=1.5), "fa2", {"linear": "softcap=1.5", "fa4": "the stand-in has no softcap"}),
    ("cuda", {}, dict(IDENTITY, dropout_p=0.1), "fa2", {"linear": "dropout_p=0.1", "fa4": "no dropout_p"}),
    ("cuda", {}, dict(IDENTITY, alibi_slopes=torch.ones(2)), "fa2", {"linear": "alibi_slopes", "fa4": "no alibi_slopes"}),
    ("cuda", {}, dict(SILU, dropout_p=0.1), None, {"linear": "", "fa4": "no dropout_p", "fa2": "'silu'", "cpu": "q is on cuda"}),
    ("cuda", AMPERE, IDENTITY, "fa2", {"linear": "", "fa4": "compute capability 8.0"}),
    ("cuda", NO_FA4, IDENTITY, "fa2", {"linear": "", "fa4": "flash-attn-4 is not installed"}),
    ("cuda", NO_FA4, SILU, None, {"linear": "", "fa4": "not installed", "fa2": "activation='silu'", "cpu": ""}),
    ("cuda", PURE_PYTHON, SILU, "fa4", {"linear": ""}),
    ("cuda", PURE_PYTHON, dict(IDENTITY, dropout_p=0.1), None, {"linear": "", "fa4": "", "fa2": "make wheel BACKEND=cuda", "cpu": ""}),
    ("cuda", {}, dict(), "fa2", {"linear": "use_softmax=True", "fa4": "use_softmax=True"}),
    ("cuda", PURE_PYTHON, dict(), None, {"linear": "", "fa4": "use_softmax=True", "fa2": "make wheel BACKEND=cuda", "cpu": ""}),
    ("cpu", {}, IDENTITY, "cpu", {"linear": "not predicted faster", "fa4": "q is on cpu", "fa2": "q is on cpu"}),
    ("cpu", {}, SILU, "cpu", {"linear": "activation='silu'", "fa4": "", "fa2": ""}),
], ids=str)  # fmt: skip
def test_choice(install, device, machine, options, expected, reasons):
    """The first of linear, fa4, fa2 and cpu that takes the call; each one before it gives its reason."""
    install(**machine)
    chosen = explain(flash_attn_func, *tensors(device), **options)
    assert chosen.backend == expected
    assert chosen.algorithm == {None: None, "linear": "linear"}.get(expected, "quadratic")
    assert list(chosen.passed_over) == list(reasons)
    for name, reason in reasons.items():
        assert reason in chosen.passed_over[name] and f"not {name}: " in str(chosen)


def test_linear_comes_first_where_it_pays(install):
    install()
    assert explain(flash_attn_func, *tensors("cpu", seqlen=8192), **IDENTITY).backend == "linear"


@pytest.mark.parametrize("dtype, reason", [(torch.float32, "no kernels for torch.float32"), (torch.float16, "not predicted faster")])
def test_linear_says_why_it_is_passed_over(install, dtype, reason):
    install()
    assert reason in explain(flash_attn_func, *tensors("cuda", dtype=dtype), **IDENTITY).passed_over["linear"]


def shaped(q: tuple[int, ...], k: tuple[int, ...], head_dim_v: int = 0, dtype: torch.dtype = torch.bfloat16, grad: bool = False):
    """Tensors of a GPU without memory."""
    with FakeTensorMode():
        return tuple(
            torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)
            for shape in (q, k, (*k[:-1], head_dim_v or k[-1]))
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
    """4 * batch * nheads * seqlen_q * seqlen_k * head_dim floating-point operations, of visible scores alone: from 60e9 on."""
    install()
    assert explain(flash_attn_func, *shaped(*shapes), **IDENTITY, **options, algorithm="quadratic").backend == expected


@pytest.mark.parametrize("sequences, total, expected", [(2, 4096, "fa2"), (2, 24576, "fa4"), (16, 16384, "fa2"), (16, 65536, "fa4")])
def test_work_of_packed_sequences_is_that_of_mean_lengths(install, sequences, total, expected):
    """Their lengths lie on the GPU, and max_seqlen is of one of them."""
    install()
    lengths = torch.zeros(sequences + 1, dtype=torch.int32)
    tokens = (total, 16, 64)
    options = dict(IDENTITY, causal=True, algorithm="quadratic")
    chosen = explain(flash_attn_varlen_func, *shaped(tokens, tokens), lengths, lengths, total, total, **options)
    assert chosen.backend == expected


@pytest.mark.parametrize("page_size, longest, expected", [(256, 4096, "fa2"), (256, 65536, "fa4"), (16, 4096, "fa4")])
def test_work_of_pages_is_that_of_the_longest_sequence(install, page_size, longest, expected):
    """The pool of pages says nothing. And the extension takes multiples of 256 as pages, so there are other calls for FA4."""
    install()
    q, k, v = shaped((1024, 16, 64), (100_000, page_size, 16, 64))
    table = torch.zeros(2, longest // page_size, dtype=torch.int32)
    lengths = torch.zeros(3, dtype=torch.int32)
    chosen = explain(flash_attn_varlen_func, q, k, v, lengths, lengths, 512, longest, block_table=table, **IDENTITY)
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
    assert explain(flash_attn_func, *shaped(SHORT, SHORT, **tensors), causal=True, algorithm="quadratic", **IDENTITY).backend == "fa4"


def test_a_build_without_gradients_serves_without_them(install):
    install(built_passes=("fwd", "splitkv"))
    with torch.no_grad():
        call = explain(flash_attn_func, *shaped(SHORT, SHORT, grad=True), causal=True, algorithm="quadratic", **IDENTITY)
        assert call.backend == "fa2"


def test_rocm_has_no_fa4(install, monkeypatch):
    """MI300's compute capability is 9.4."""
    install(capability=(9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in explain(flash_attn_func, *tensors("cuda"), **IDENTITY).passed_over["fa4"]


def test_tensors_of_a_gpu_that_is_not_there(install, monkeypatch):
    """Those of FakeTensorMode, on a machine without one."""

    def fail(device):
        raise AssertionError("Torch not compiled with CUDA enabled")

    install()
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert "not compiled with CUDA" in explain(flash_attn_func, *tensors("cuda"), **IDENTITY).passed_over["fa4"]


def test_a_cache_stays_with_the_extension(install):
    install()
    q, k, v = tensors("cuda")
    chosen = explain(flash_attn_with_kvcache, q, k, v, k=k, v=v, **IDENTITY)
    assert chosen.backend == "fa2"
    assert "linear_attention_step" in chosen.passed_over["linear"] and "cache" in chosen.passed_over["fa4"]


def test_nothing_can_run_the_call(install):
    """The error is what explain says."""
    install(**NO_FA4)
    arguments = tensors("cuda")
    with pytest.raises(NotImplementedError, match="(?s)not fa4: .*not installed.*not fa2: .*'silu'.*move the tensors to the CPU") as error:
        flash_attn_func(*arguments, **SILU)
    assert str(error.value) == str(explain(flash_attn_func, *arguments, **SILU))


def test_meta_tensors_are_for_the_operators():
    q, k, v = (x.to("meta") for x in tensors("cpu"))
    assert flash_attn_func(q, k, v, **SILU).shape == q.shape


# --- whose flash_attn.cute it is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cute, reason", [
    (UPSTREAM, "flash-attn-4 4.0.0b36 is installed without this patch set"),
    (BROKEN, "does not import (ModuleNotFoundError: No module named 'no_such_requirement')"),
    ({**BROKEN, "__init__.py": "raise OSError('libcuda.so.1')"}, "does not import (OSError: libcuda.so.1)"),
], ids=["upstream's", "a requirement is missing", "a library is missing"])  # fmt: skip
def test_another_backend_serves(install, monkeypatch, cute, reason):
    install(cute)
    monkeypatch.setattr(fa4, "metadata", SimpleNamespace(version=lambda name: "4.0.0b36"))
    chosen = explain(flash_attn_func, *tensors("cuda"), **IDENTITY)
    assert chosen.backend == "fa2" and reason in chosen.passed_over["fa4"]


def test_fa4_is_imported_when_it_is_needed_alone(install):
    install()
    flash_attn_func(*tensors("cpu"), **SILU)
    explain(flash_attn_func, *tensors("cuda"))
    explain(flash_attn_func, *tensors("cuda"), **IDENTITY, backend="fa2")
    assert "flash_attn.cute" not in sys.modules
    explain(flash_attn_func, *tensors("cuda"), **IDENTITY)
    assert "flash_attn.cute" in sys.modules


# --- forcing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, expected", [
    (IDENTITY, "fa2"),
    (dict(IDENTITY, backend="fa4"), "fa4"),
    (dict(IDENTITY, algorithm="linear"), "linear"),
    (dict(IDENTITY, algorithm="quadratic"), "fa2"),
    (dict(), "fa2"),
], ids=str)  # fmt: skip
def test_environment(install, monkeypatch, options, expected):
    """It forces a backend where no argument does."""
    install()
    monkeypatch.setenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", "fa2")
    assert explain(flash_attn_func, *tensors("cuda"), **options).backend == expected


def test_environment_gives_way_to_the_algorithm_and_to_softmax(install, monkeypatch):
    install()
    monkeypatch.setenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", "linear")
    assert explain(flash_attn_func, *tensors("cuda"), **IDENTITY).backend == "linear"
    assert explain(flash_attn_func, *tensors("cuda"), **SILU, algorithm="quadratic").backend == "fa4"
    assert explain(flash_attn_func, *tensors("cuda")).backend == "fa2"
    assert torch.isfinite(flash_attn_func(*tensors("cpu"))).all()


IMPOSSIBLE = {
    'backend="fa4" is not possible: the stand-in has no dropout_p': dict(IDENTITY, backend="fa4", dropout_p=0.1),
    'backend="fa4" is not possible: use_softmax=True': dict(backend="fa4"),
    'backend="fa2" is not possible: flash_attn_2_cuda has no kernels for activation=\'silu\'': dict(SILU, backend="fa2"),
    'backend="cpu" is not possible: q is on cuda': dict(IDENTITY, backend="cpu"),
    'backend="linear" is not possible: use_softmax=True': dict(backend="linear"),
    "backend='fa5' is not one of ('auto', 'linear', 'fa4', 'fa2', 'cpu')": dict(IDENTITY, backend="fa5"),
    "algorithm='fast' is not one of": dict(IDENTITY, algorithm="fast"),
    'backend="fa4" is quadratic, but algorithm="linear"': dict(IDENTITY, backend="fa4", algorithm="linear"),
    "activation='gelu' is not one of": dict(IDENTITY, activation="gelu"),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible(install, message):
    install()
    with pytest.raises(ValueError) as error:
        flash_attn_func(*tensors("cuda"), **IMPOSSIBLE[message])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("value, message", [
    ("fa4", "FLASH_ATTENTION_NOSOFTMAX_BACKEND=fa4 is not possible: q is on cpu"),
    ("fa5", "FLASH_ATTENTION_NOSOFTMAX_BACKEND=fa5 is not one of"),
])  # fmt: skip
def test_impossible_environment(monkeypatch, value, message):
    monkeypatch.setenv("FLASH_ATTENTION_NOSOFTMAX_BACKEND", value)
    with pytest.raises(ValueError, match=message):
        flash_attn_func(*tensors("cpu"), **IDENTITY)
    assert torch.isfinite(flash_attn_func(*tensors("cpu"))).all()


@pytest.mark.parametrize("count, kwargs, message", [
    (2, IDENTITY, "missing 1 required positional argument: 'v'"),
    (3, dict(IDENTITY, nonsense=1), "unexpected keyword argument 'nonsense'"),
    (3, dict(IDENTITY, q=None), "multiple values for argument 'q'"),
    (13, {}, "takes from 3 to 12 positional arguments but 13"),
], ids=str)  # fmt: skip
def test_wrong_calls_raise_what_python_raises(count, kwargs, message):
    """Also where another backend than the function itself would run."""
    for ask in (flash_attn_func, lambda *args, **kwargs: explain(flash_attn_func, *args, **kwargs)):
        with pytest.raises(TypeError, match=rf"flash_attn_func\(\) .*{message}"):
            ask(*[*tensors("cpu"), *[None] * 10][:count], **kwargs, algorithm="linear")


def test_explain_takes_the_attention_functions():
    with pytest.raises(TypeError, match="none of the attention functions"):
        explain(torch.nn.functional.scaled_dot_product_attention, *tensors("cpu"))


# --- what FA4 is handed, and what comes back --------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_go_through_the_packing(fake_fa4, name):
    """Each of the six gives, by FA4, the output and the gradients that the CPU backend gives."""
    options = dict(SILU, causal=True, window_size=(2, 0), softmax_scale=0.3)
    actual, count = run(name, "cpu", **options), len(fake_fa4)
    expected = run(name, "cpu", **options, backend="cpu")
    assert count == len(fake_fa4) == 1
    for a, e in zip(actual, expected, strict=True):
        close(a, e)


def test_options_as_fa4_spells_them(fake_fa4):
    flash_attn_func(
        *tensors("cpu"), softmax_scale=0.3, causal=True, window_size=(5, -1), deterministic=True, use_softmax=False,
        activation="sigmoid", sigmoid_bias="-log n", normalization="1/n",
    )  # fmt: skip
    assert fake_fa4 == [dict(
        softmax_scale=0.3, causal=True, window_size=(5, None), softcap=0.0, deterministic=True, use_softmax=False,
        activation="sigmoid", sigmoid_bias="-log n", normalization="1/n",
    )]  # fmt: skip


def test_pages(fake_fa4):
    """A paged cache is read through page_table and lengths."""
    pages, q = torch.randn(4, 256, 2, 8), torch.randn(5, 2, 8)
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    arguments = (q, pages, pages.flip(0), cumulative([2, 3], "cpu"), cumulative([300, 200], "cpu"), 3, 300)
    actual, expected = (
        flash_attn_varlen_func(*arguments, causal=True, block_table=table, **SILU, backend=backend) for backend in ("auto", "cpu")
    )
    assert len(fake_fa4) == 1 and fake_fa4[0]["page_table"] is table
    close(actual, expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_attention_probabilities_are_empty(fake_fa4, name):
    arguments, lengths = inputs(name, "cpu")
    out, lse, encoded = getattr(flash_attn, name)(*arguments, *lengths, **SILU, return_attn_probs=True)
    assert len(fake_fa4) == 1 and out.numel() and lse.numel() == encoded.numel() == 0 and lse.dtype == torch.float32


def test_compiles_to_one_graph(fake_fa4):
    """The search for the package and its import are not traced, nor is the environment.

    One test for all functions: torch.compile keeps the first flash_attn.cute that it meets in a process.
    """
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func"):
        torch._dynamo.reset()
        fa4._unavailable_in_this_process.cache_clear()
        fake_fa4.clear()
        arguments, lengths = inputs(name, "cpu")

        def attend(*x):
            return getattr(flash_attn, name)(*x, *lengths, causal=True, **SILU)

        actual = torch.compile(attend, fullgraph=True, backend="aot_eager")(*arguments)
        assert len(fake_fa4) == 1
        expected = attend(*arguments)
        close(actual, expected)
        for a, e in zip(*(torch.autograd.grad(out.sum(), arguments) for out in (actual, expected))):
            close(a, e)


def test_the_search_for_the_extension_is_not_traced(install):
    install(**PURE_PYTHON)
    torch._dynamo.reset()
    lacks = torch.compile(lambda x: x + (backends.obstacle(False, "identity", 0.0, None) is not None), fullgraph=True, backend="eager")
    assert lacks(torch.zeros(1)) == 1
