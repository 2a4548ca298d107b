"""Share the cores among pytest's processes, and start the tests that take minutes first."""

from __future__ import annotations

import os

import pytest

# Read when torch is imported. Threads of several processes on one core wait for each other: on two cores a
# test of many small operations takes thirty times as long.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))

# In this order, so that none of them is the last to end.
LONGEST = (
    "fa4/test_compile_check.py",
    "patches/test_sass_identity.py",
    "patches/test_kernel_hooks.py",
    "attention/test_linear_kernels.py",
    "upstream/test_sample.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = "/".join(item.path.parts[-2:])
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)
