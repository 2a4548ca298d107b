"""The naive kernels' patches fit the patched tree, and differ in nothing but what the mask writes."""

from __future__ import annotations

import re

import pytest

from fapatch import git, naive
from fapatch.naive_table import VARIANTS
from fapatch.project import Project

pytestmark = pytest.mark.source

REAL = Project.open(family="flash-attn", version="")


@pytest.fixture(scope="module")
def trees(make):
    """(the project whose store holds them, kernel -> tree id), with "right" for the patched tree itself."""
    made = make(REAL.family.default)
    (made.project.root / "tests").mkdir()
    (made.project.root / "tests" / "naive").symlink_to(REAL.root / "tests" / "naive")
    return made.project, {
        "right": made.built.tree,
        **{v: naive.patched(made.project, made.built.tree, v) for v in VARIANTS},
    }


def changes(trees, old: str, new: str) -> tuple[set[str], list[str], list[str]]:
    """(paths, lines that go, lines that come), comments left out."""
    project, ids = trees
    said = git.output("diff", "--unified=0", ids[old], ids[new], repo=project.store).splitlines()
    paths = {line.removeprefix("+++ b/") for line in said if line.startswith("+++ ")}
    lines = [line for line in said if re.match(r"[-+] ", line) and not line[1:].strip().startswith("//")]
    return (
        paths,
        [line[1:].strip() for line in lines if line[0] == "-"],
        [line[1:].strip() for line in lines if line[0] == "+"],
    )


def test_only_the_extension_changes(trees):
    paths, _, _ = changes(trees, "right", "masked-with-zero")
    assert paths and all(path.startswith("csrc/flash_attn/src/") for path in paths)


def test_the_two_differ_in_the_masks_value_alone(trees):
    _, gone, came = changes(trees, "minus-infinity", "masked-with-zero")
    assert gone and [line.replace("-INFINITY", "0.f") for line in gone] == came


def test_a_naive_mask_writes_minus_infinity_where_the_right_one_writes_zero(trees):
    _, gone, came = changes(trees, "right", "minus-infinity")
    zeros = [line for line in gone if "{ score = 0.f; }" in line]
    assert len(zeros) == 2
    assert [line.replace("0.f", "-INFINITY") for line in zeros] == [
        line for line in came if "{ score = -INFINITY; }" in line
    ]


def test_no_patch_is_left_out():
    """Each file in tests/naive belongs to a variant."""
    assert {path.stem for path in (REAL.root / "tests" / "naive").glob("*.patch")} == {
        name for v in naive.PATCHES.values() for name in v
    }
