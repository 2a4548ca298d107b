"""Set up the tests with transformers. `make test-transformers` runs them in environments of their own;
elsewhere they are skipped.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the hub for anything fails at once


def pytest_report_header() -> str:
    if importlib.util.find_spec("transformers") is None:
        return "transformers: missing"
    import transformers

    return f"transformers {transformers.__version__}"


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)
