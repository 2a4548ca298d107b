"""Test that backported fixes work, on their source text, without a compiler."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from unidiff import Hunk, PatchSet

PATCH = Path(__file__).parents[2] / "patches" / "flash-attn" / "bwd-int64-dq-accum-offsets.patch"
STATEMENT = re.compile(r"const index_t (dq_accum_\w+|row_offset_dq_accum) =([^;]+);")
# One row block in the ninth batch entry of dq_accum, 2**31 elements behind its start.
BATCH, SEQLEN_Q, NHEADS, HEAD_DIM, BLOCK, HEAD = 8, 16384, 64, 256, 3, 5
EXPECTED = ((BATCH * SEQLEN_Q + BLOCK * 128) * NHEADS + HEAD) * HEAD_DIM


def hunks() -> list[Hunk]:
    return [hunk for file in PatchSet(PATCH.read_text(encoding="utf-8")) for hunk in file]


def offset(lines: list[str]) -> int:
    """Compute row_offset_dq_accum from these lines of C++, with C++'s types: an int has 32 bits and wraps, as
    in NumPy.
    """
    params = SimpleNamespace(
        seqlen_q_rounded=np.int32(SEQLEN_Q), h=np.int32(NHEADS), d_rounded=np.int32(HEAD_DIM)
    )
    names = dict(
        params=params, int64=np.int64, bidb=np.int32(BATCH), bidh=np.int32(HEAD), m_block=np.int32(BLOCK),
        m_block_max=np.int32(BLOCK + 1), kBlockM=np.int32(128),
        binfo=SimpleNamespace(q_offset=lambda batch_stride, row_stride, bidb: bidb * batch_stride),
    )  # fmt: skip
    for name, expression in STATEMENT.findall(re.sub(r"//.*", "", "".join(lines))):
        expression = expression.replace("static_cast<index_t>", "int64")
        expression = re.sub(
            r"\([^()?]+ \? 0 :[^()]+\)", "int64(0)", expression
        )  # neither varlen nor deterministic
        with np.errstate(over="ignore"):
            names[name] = eval(f"({expression})", names)
    return int(names["row_offset_dq_accum"])


@pytest.mark.parametrize("hunk", hunks(), ids=lambda hunk: f"line {hunk.source_start}")
def test_dq_accum_offsets_are_64_bit(hunk):
    assert EXPECTED > 2**31
    assert offset([line.value for line in hunk.target_lines()]) == EXPECTED
    assert offset([line.value for line in hunk.source_lines()]) != EXPECTED, "there is nothing to mend"


def test_every_kernel_that_finds_dq_accum_is_mended():
    assert len(hunks()) == 3
