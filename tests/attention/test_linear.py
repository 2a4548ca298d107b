"""Linear time: the primitive and its derivatives, when it is chosen, and that it keeps the contract of use_softmax=False.

The other attention tests run with algorithm="linear" too, where it applies (conftest.py); here is what only this path can get
wrong: chunks, the state between them, lengths that no chunk divides, sums over many tokens.
"""

from __future__ import annotations

import flash_attn
import pytest
import torch
from flash_attn.linear import choice, chunked
from flash_attn.linear.form import Form
from torch.utils.checkpoint import checkpoint

from linear_cases import LARGE_MEAN_TOKENS, LENGTHS, check_large_mean, check_piece_boundaries, linear
from measure import NAMES, assert_close, assert_same, compare, gradients, poisoned, qkv, randn, reference
from package import cumulative, supports

MASKS = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
FUNCTIONS = pytest.mark.parametrize("name", [n for n in flash_attn.__all__] if hasattr(flash_attn, "__all__") else [
    "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func",
])  # fmt: skip
