"""Print the parameters of a test file as JSON, without making its test cases (upstream's file has a million
of them).

    python axes.py TEST_FILE
    {"gpus": 0, "with_softmax": true, "package": ".../flash_attn",
     "functions": {"test_x": [{"names": ["seqlen_q", "seqlen_k"], "labels": ["1-128", ...]}, ...]}}

The axes of a function are in pytest's order, so that joining one label of each with "-" gives pytest's id.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import cpu_as_cuda
import torch


def _label(name: str, value: Any, index: int) -> str:
    """The label of one parameter value in a test's id, by pytest's documented rule for ids that are not
    given.
    """
    if value is None or isinstance(value, (str, bool, int, float, complex)):
        return str(value)
    return getattr(value, "__name__", None) or f"{name}{index}"


def axes_of(function: Any) -> list[tuple[tuple[str, ...], list[tuple[Any, ...]], list[str]]]:
    """List (names, values, labels) of each ``pytest.mark.parametrize`` of ``function``, the innermost
    first.
    """
    axes = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name != "parametrize":
            continue
        names = (
            tuple(n.strip() for n in mark.args[0].split(","))
            if isinstance(mark.args[0], str)
            else tuple(mark.args[0])
        )
        values = [tuple(v) if len(names) > 1 else (v,) for v in mark.args[1]]
        labels = ["-".join(_label(n, v, i) for n, v in zip(names, value)) for i, value in enumerate(values)]
        if len(set(labels)) != len(labels):
            raise ValueError(
                f"{function.__name__}: two values of {','.join(names)} have the same label: {labels}"
            )
        axes.append((names, values, labels))
    return axes


def has_softmax_kernels() -> bool:
    """False for a CUDA build with NO_SOFTMAX_ONLY."""
    if not cpu_as_cuda.on_gpu():
        return True
    return getattr(importlib.import_module("flash_attn_2_cuda"), "built_with_softmax", True)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: list[str]) -> int:
    cpu_as_cuda.activate()
    import flash_attn

    module = load(Path(argv[0]))
    functions = {
        name: [{"names": names, "labels": labels} for names, _, labels in axes_of(value)]
        for name, value in vars(module).items()
        if name.startswith("test_") and callable(value)
    }
    described = {
        "gpus": torch.cuda.device_count() if cpu_as_cuda.on_gpu() else 0,
        "with_softmax": has_softmax_kernels(),
        "package": str(Path(flash_attn.__file__).parent),
        "version": metadata.version("flash_attn"),
        "device": torch.cuda.get_device_name() if cpu_as_cuda.on_gpu() else "cpu",
        "functions": functions,
    }
    json.dump(described, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
