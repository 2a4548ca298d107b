"""Test finding a CUDA toolkit that a build can use, among folders that only look like one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fapatch.base.errors import FapError
from fapatch.wheel import cuda_toolkit
from fapatch.wheel.cuda_toolkit import Toolkit, Torch

TORCH = Torch(python="3.12.1", version="2.11.0+cu130", cuda="13.0", gpu=True, home=None, packages=())


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def header(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def toolkit(home: Path, version: int = 13000) -> Path:
    """Make a folder with all parts of a usable toolkit."""
    program(home / "bin" / "nvcc")
    header(home / "include" / "cuda_runtime.h")
    header(home / "include" / "cuda_runtime_api.h", f"#define CUDART_VERSION  {version}\n")
    return home


@pytest.fixture(autouse=True)
def usual(tmp_path, monkeypatch) -> Path:
    """Move the usual place to an empty folder in ``tmp_path``."""
    monkeypatch.setattr(cuda_toolkit, "USUAL_HOME", tmp_path / "usual")
    return tmp_path / "usual"


@pytest.fixture
def venv(tmp_path) -> Path:
    return tmp_path / ".venv"


def test_order_of_the_places(tmp_path, venv, usual):
    environ = {"CUDA_HOME": str(toolkit(tmp_path / "env")), "PATH": str(toolkit(tmp_path / "path") / "bin")}
    toolkit(venv / cuda_toolkit.TOOLCHAIN / "nvidia" / "cu13")
    torch = replace(TORCH, home=str(toolkit(tmp_path / "guess")))
    toolkit(usual)
    found = []
    for gone in ("env", f".venv/{cuda_toolkit.TOOLCHAIN}/nvidia/cu13", "guess", "path", "usual"):
        found.append(cuda_toolkit.find(venv, torch, environ).toolkit)
        (tmp_path / gone / "bin" / "nvcc").unlink()
    assert [(kit.home.name, kit.origin) for kit in found] == [
        ("env", "CUDA_HOME"),
        ("cu13", "make toolchain"),
        ("guess", "torch's guess"),
        ("path", "nvcc on the PATH"),
        ("usual", "the usual place"),
    ]
    assert cuda_toolkit.find(venv, torch, environ).toolkit is None


def test_a_wrapper_script_without_headers_is_passed_over(tmp_path, venv, usual):
    """torch takes the folder of /usr/local/bin/nvcc for the toolkit, and the build then lacks
    cuda_runtime.h.
    """
    wrapper = program(tmp_path / "local" / "bin" / "nvcc")
    torch, environ = replace(TORCH, home=str(tmp_path / "local")), {"PATH": str(wrapper.parent)}
    toolkit(usual)
    search = cuda_toolkit.find(venv, torch, environ)
    assert search.toolkit == Toolkit(usual, "the usual place")
    assert search.refused == (
        f"{wrapper} has no headers: {tmp_path}/local/include/cuda_runtime.h is missing (torch's guess)",
    )
    (usual / "bin" / "nvcc").unlink()
    with pytest.raises(FapError) as caught:
        cuda_toolkit.find(venv, torch, environ).require("the wheel", "make toolchain")
    assert f"the wheel needs the CUDA compiler: {wrapper} has no headers" in str(caught.value)
    assert f"{usual} has no bin/nvcc" in str(caught.value) and str(caught.value).endswith(
        "->  make toolchain"
    )


def test_a_link_to_nvcc_leads_to_its_toolkit(tmp_path, venv):
    home = toolkit(tmp_path / "cuda-13.0")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert cuda_toolkit.find(venv, TORCH, {"PATH": str(tmp_path / "bin")}).toolkit == Toolkit(
        home, "nvcc on the PATH"
    )


def test_a_toolkit_of_another_major_version_than_torch_is_passed_over(tmp_path, venv, usual):
    toolkit(usual, version=12080)
    search = cuda_toolkit.find(venv, TORCH, {})
    assert (
        search.toolkit is None
        and f"{usual} is CUDA 12.8, and torch was built with CUDA 13.0" in search.refused[0]
    )
    assert cuda_toolkit.find(venv, replace(TORCH, cuda="12.6"), {}).toolkit.home == usual
    assert cuda_toolkit.find(venv, replace(TORCH, cuda=None), {}).toolkit.home == usual


def test_nothing_at_all_is_said_in_words(venv):
    search = cuda_toolkit.find(venv, TORCH, {"PATH": ""})
    assert search.refused == ()
    with pytest.raises(FapError, match="neither CUDA_HOME nor PATH leads to an nvcc"):
        search.require("the wheel", "")


def test_library_headers_that_the_toolkit_lacks_come_from_the_packages_of_torch(tmp_path):
    kit = Toolkit(toolkit(tmp_path / "cuda"), "CUDA_HOME")
    header(kit.home / "include" / "cublas_v2.h")
    one = tmp_path / "site-packages" / "nvidia"
    header(one / "cublas" / "include" / "cublas_v2.h")  # the toolkit has its own
    header(one / "cusparse" / "include" / "cusparse.h")
    header(one / "cusolver" / "include" / "cusolverDn.h")
    made = cuda_toolkit.build_environment(kit, ["", str(tmp_path / "site-packages")], {"CPATH": "/mine"})
    assert made == {
        "CUDA_HOME": str(kit.home),
        "CPATH": os.pathsep.join(["/mine", f"{one}/cusolver/include", f"{one}/cusparse/include"]),
        "LIBRARY_PATH": os.pathsep.join([f"{one}/cusolver/lib", f"{one}/cusparse/lib"]),
    }


def test_packages_that_share_a_folder_add_it_once(tmp_path):
    kit = Toolkit(toolkit(tmp_path / "cuda"), "CUDA_HOME")
    for name in cuda_toolkit.LIBRARY_HEADERS:
        header(tmp_path / "site-packages" / "nvidia" / "cu13" / "include" / name)
    made = cuda_toolkit.build_environment(kit, [str(tmp_path / "site-packages")], {})
    assert made["CPATH"] == f"{tmp_path}/site-packages/nvidia/cu13/include"


def test_a_whole_toolkit_adds_nothing(tmp_path):
    kit = Toolkit(toolkit(tmp_path / "cuda"), "CUDA_HOME")
    for name in cuda_toolkit.LIBRARY_HEADERS:
        header(kit.home / "include" / name)
        header(tmp_path / "site-packages" / "nvidia" / "cu13" / "include" / name)
    assert cuda_toolkit.build_environment(kit, [str(tmp_path / "site-packages")], {}) == {
        "CUDA_HOME": str(kit.home)
    }


def test_programs_that_come_without_a_toolkit(tmp_path, venv):
    packages = tmp_path / "site-packages"
    torch = replace(TORCH, packages=(str(packages),))
    places = [
        program(tmp_path / "cuda" / "bin" / "cuobjdump"),
        program(venv / cuda_toolkit.TOOLCHAIN / "nvidia" / "cu13" / "bin" / "cuobjdump"),
        program(packages / "nvidia" / "cu13" / "bin" / "cuobjdump"),
        program(packages / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"),
        program(tmp_path / "bin" / "cuobjdump"),
    ]
    program(venv / cuda_toolkit.TOOLCHAIN / "nvidia" / "cu13" / "bin" / "nvcc")
    for place in places:
        kit, environ = Toolkit(tmp_path / "cuda", "CUDA_HOME"), {"PATH": str(tmp_path / "bin")}
        assert cuda_toolkit.find_program("cuobjdump", venv, torch, kit, environ) == place
        place.unlink()
    assert cuda_toolkit.find_program("cuobjdump", venv, torch, None, {"PATH": ""}) is None
