"""Test the compiler packages: which ones a torch gets, and how they become a toolkit. pip and nvcc are
stand-ins, without network.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fapatch.base.errors import FapError
from fapatch.kernels import toolchain
from fapatch.wheel import cuda_toolkit
from fapatch.wheel.cuda_toolkit import Torch

LOCK = Path(__file__).parents[2] / "requirements.lock"
TORCH = Torch(python="3.12.1", version="2.11.0+cu130", cuda="13.0", gpu=True, home=None, packages=())
# Replaces .venv's Python: `python -m pip install ... --target FOLDER ...` makes the files of the CUDA 13
# packages, and records the call.
PIP = """#!/bin/sh
case "$*" in *"pip config list") exit;; esac
echo "$@" >> "$(dirname "$0")/calls"
{before}
while [ "$1" != --target ]; do shift; done
home=$2/nvidia/cu13
mkdir -p $home/bin $home/include $home/lib
echo '#define CUDART_VERSION 13000' > $home/include/cuda_runtime_api.h
touch $home/include/cuda_runtime.h $home/lib/libcudart.so.13
printf '%s\\n' '#!/bin/sh' '{nvcc}' > $home/bin/nvcc
chmod +x $home/bin/nvcc
"""


def make_venv(folder: Path, nvcc: str = "exit 0", before: str = "") -> Path:
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(PIP.format(nvcc=nvcc, before=before))
    python.chmod(0o755)
    return folder / ".venv"


def test_packages_are_pinned_to_the_cuda_version_of_torch():
    assert toolchain.requirements("13.0") == [
        "cuda-toolkit[cccl,nvcc]==13.0.*",
        "nvidia-cuda-cuobjdump==13.*",
        "nvidia-cuda-nvdisasm==13.*",
    ]
    assert toolchain.requirements("13.2.1")[0] == "cuda-toolkit[cccl,nvcc]==13.2.*"


def test_a_torch_without_cuda_and_one_whose_compiler_is_not_on_the_index_are_refused():
    with pytest.raises(FapError, match="torch without CUDA.*->.*PYTHON="):
        toolchain.requirements(None)
    with pytest.raises(FapError, match="no nvcc for CUDA 12.8.*->.*CUDA 12.8 toolkit.*CUDA_HOME"):
        toolchain.requirements("12.8")


def test_the_packages_become_a_toolkit_that_is_found(tmp_path, capsys):
    venv = make_venv(tmp_path)
    assert (
        toolchain.ensure(venv, TORCH, LOCK)
        == f".venv/{cuda_toolkit.TOOLCHAIN}/nvidia/cu13 is ready: CUDA 13.0; `make wheel` builds with it"
    )
    home = venv / cuda_toolkit.TOOLCHAIN / "nvidia" / "cu13"
    assert cuda_toolkit.find(venv, TORCH, {}).toolkit == cuda_toolkit.Toolkit(home, "make toolchain")
    # `-L$CUDA_HOME/lib64 -lcudart` needs this.
    assert (home / "lib64" / "libcudart.so").resolve() == home / "lib" / "libcudart.so.13"
    assert "installing cuda-toolkit[cccl,nvcc]==13.0.*" in capsys.readouterr().out


def test_the_second_run_does_nothing_and_another_torch_gets_another_compiler(tmp_path, capsys):
    venv = make_venv(tmp_path)
    toolchain.ensure(venv, TORCH, LOCK)
    assert toolchain.ensure(venv, TORCH, LOCK).endswith("is up to date: CUDA 13.0. Nothing to do.")
    calls = venv / "bin" / "calls"
    assert len(calls.read_text().splitlines()) == 1
    newer = Torch(**{**TORCH.__dict__, "cuda": "13.1"})
    assert "is ready" in toolchain.ensure(venv, newer, LOCK)
    first, second = calls.read_text().splitlines()
    assert "--require-hashes" in first and "--no-deps" in first
    assert "cuda-toolkit[cccl,nvcc]==13.1.*" in second and "--require-hashes" not in second
    assert "whose hashes requirements.lock does not have" in capsys.readouterr().out


def test_the_lock_has_every_part_of_the_compiler():
    """With hashes; another CUDA version has none."""
    entries = toolchain.locked(LOCK, "13.0")
    assert [entry.partition("==")[0] for entry in entries] == list(toolchain.PARTS)
    assert all("--hash=sha256:" in entry for entry in entries)
    assert toolchain.locked(LOCK, "13.1") == [] and toolchain.locked(LOCK, "130.0") == []


def test_a_compiler_that_cannot_compile_is_not_kept(tmp_path):
    venv = make_venv(tmp_path, nvcc="echo cannot find g++ >&2; exit 1")
    with pytest.raises(FapError, match="cannot compile a kernel: cannot find g.*->.*install g"):
        toolchain.ensure(venv, TORCH, LOCK)
    assert [path.name for path in venv.iterdir()] == ["bin"]


def test_no_index_is_said_in_words_and_leaves_the_old_one(tmp_path):
    venv = make_venv(tmp_path)
    toolchain.ensure(venv, TORCH, LOCK)
    (venv / cuda_toolkit.TOOLCHAIN / toolchain.STAMP).unlink()
    make_venv(tmp_path, before='echo "ERROR: No matching distribution found for cuda-toolkit" >&2; exit 1')
    with pytest.raises(FapError, match="No matching distribution found for cuda-toolkit.*PIP_FIND_LINKS"):
        toolchain.ensure(venv, TORCH, LOCK)
    assert cuda_toolkit.find(venv, TORCH, {}).toolkit
