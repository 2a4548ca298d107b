"""Test that the smoke test uses the kernels of the installed extension. On a GPU, it is the last step of
`make wheel`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fapatch
from fapatch.base import process
from fapatch.wheel import smoke


@pytest.fixture
def package():
    return pytest.importorskip("flash_attn", reason="needs the wheel: make wheel")


@pytest.fixture
def gpu(monkeypatch):
    """Fake a GPU and an extension with given attributes; returns the calls that were made."""
    calls = []

    def make(**built) -> list:
        extension = ModuleType("flash_attn_2_cuda")
        vars(extension).update(built)
        monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", extension)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setattr(
            smoke, "probe", lambda target, dtype: calls.append((target.device, dtype, target.head_dim))
        )
        return calls

    return make


def test_everything_built(gpu):
    calls = gpu(
        built_head_dims=(32, 64, 128), built_dtypes=("fp16", "bf16"), built_passes=("fwd", "bwd", "splitkv")
    )
    assert smoke.best_target() == smoke.Target("cuda", "a GPU", ("float16", "bfloat16"), 64, True)
    assert calls == [("cuda", torch.float16, 64)]


def test_a_subset_is_tested_with_what_it_has(gpu):
    calls = gpu(built_head_dims=(128, 256), built_dtypes=("bf16",), built_passes=("fwd",))
    target = smoke.best_target()
    assert target == smoke.Target("cuda", "a GPU", ("bfloat16",), 128, False, cache=False)
    assert target.passes == "forward"
    assert calls == [("cuda", torch.bfloat16, 128)]


def test_without_forward_kernels_it_says_so(gpu, capsys):
    gpu(built_head_dims=(64,), built_dtypes=("fp16",), built_passes=("splitkv",))
    assert smoke.best_target().device == "cpu"
    assert "not on the GPU: this build has no forward kernels (PASSES=splitkv)" in capsys.readouterr().out


def test_a_gpu_of_another_architecture_is_passed_over(gpu, monkeypatch, capsys):
    gpu(built_head_dims=(64,), built_dtypes=("fp16",), built_passes=("fwd", "bwd"))

    def refuse(*arguments):
        raise RuntimeError(
            "This flash attention build is for compute capabilities 80 and this GPU has 9.0: rebuild with "
            "ARCHS=90"
        )

    monkeypatch.setattr(smoke, "probe", refuse)
    assert smoke.best_target().device == "cpu"
    assert (
        "not on the GPU: This flash attention build is for compute capabilities 80" in capsys.readouterr().out
    )


def test_forward_alone(package):
    errors, not_finite, _ = smoke.measure(smoke.Target("cpu", "here", backward=False), torch.float32)
    assert list(errors) == ["out"] and errors["out"] < 1e-5 and not_finite == 0


def test_every_public_function_is_called_with_softmax_and_without(package):
    target = smoke.Target("cpu", "here")
    public = [name for name in dir(package) if name.startswith("flash_attn_") and "func" in name]
    assert set(smoke.calls(target, *[torch.zeros(1, 2, 1, 64)] * 3)) == {*public, "flash_attn_with_kvcache"}
    assert smoke.wrong_functions(target) == (14, [])


def test_a_function_that_cannot_be_called_is_named(package, monkeypatch, capsys):
    """The function fails as if upstream gave the extension one more argument than its stand-in knows."""
    from flash_attn import flash_attn_interface

    def more(*args):
        raise TypeError("varlen_fwd() takes 21 arguments and got 22")

    monkeypatch.setattr(flash_attn_interface.extension, "varlen_fwd", more)
    assert not smoke.report(smoke.Target("cpu", "here", ("float32",)), "flash_attn")
    said = capsys.readouterr().out
    assert "14 calls: 3 WRONG" in said
    assert "flash_attn_varlen_func, use_softmax=True: TypeError: varlen_fwd() takes 21" in said


def test_a_wrong_result_is_noticed(package, monkeypatch, capsys):
    right = package.flash_attn_func
    monkeypatch.setattr(package, "flash_attn_func", lambda *a, **k: right(*a, **k) * 1.05)
    assert not smoke.report(smoke.best_target(), "flash_attn")
    assert "WRONG" in capsys.readouterr().out


def test_a_flash_attn_of_the_base_does_not_hide_the_folder_of_the_second_wheel(tmp_path):
    """The situation of a .venv that shares the packages of an interpreter with upstream's flash_attn."""
    site, base = tmp_path / "site", tmp_path / "base"
    info = site / "flash_attn_4-1.dist-info"
    for path, text in {
        base / "flash_attn/__init__.py": "raise ImportError('its extension is for another machine')\n",
        site / "flash_attn/cute/__init__.py": "",
        info / "METADATA": "Name: flash_attn_4\nVersion: 1\nRequires-Dist: no-such-thing\n",
        info / "RECORD": "flash_attn/cute/__init__.py,,\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = (
        "from fapatch.base.project import Project; from fapatch.wheel import smoke; "
        "smoke.report_compiled(Project.open(family='flash-attn-4').family)"
    )
    paths = os.pathsep.join(map(str, (site, base, Path(fapatch.__file__).parents[1])))
    said = process.run(sys.executable, "-c", code, env={"PYTHONPATH": paths}).stdout.decode()
    assert f"{base}/flash_attn/__init__.py hides {site}/flash_attn; `make wheel` puts this" in said
    assert "flash_attn_4 1: 1 Python files are installed and parse" in said
