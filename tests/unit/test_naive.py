"""The table of the naive kernels says what pytest said, and complains where a test says nothing."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from fapatch import naive, naive_table
from fapatch.errors import FapError
from fapatch.naive_table import RIGHT
from fapatch.process import run
from fapatch.project import Project

pytestmark = pytest.mark.slow

INF, ZERO = naive_table.VARIANTS
ROOT = Path(__file__).resolve().parents[2]

# What pytest writes, shortened: an assertion that failed, one with words, a CUDA error, a skip, a fixture
# that failed.
JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="3" skipped="1" tests="6">
<testcase classname="tests.attention.test_masks" name="test_causal[cuda-128-128]" time="0.1" />
<testcase classname="tests.attention.test_masks" name="test_causal[cuda-1-239]" time="0.1">
  <failure message="assert not tensor(True)">E       assert not tensor(True)</failure></testcase>
<testcase classname="tests.attention.test_masks" name="test_causal[cuda-239-1]" time="0.1">
  <failure message="AssertionError: out has 3 values that are NaN or Inf">E       AssertionError</failure></testcase>
<testcase classname="tests.attention.test_masks" name="test_windows[cuda]" time="0.1">
  <failure message="RuntimeError: CUDA error: an illegal memory access">&gt;   assert x.all()</failure></testcase>
<testcase classname="tests.attention.test_scores" name="test_scale" time="0.1"><skipped message="no kernels" /></testcase>
<testcase classname="tests.attention.test_scores" name="test_scale[cuda]" time="0.1"><error message="fixture">x</error></testcase>
</testsuite></testsuites>
"""  # noqa: E501


def column(**tests: tuple[int, int]) -> dict[str, Counter[str]]:
    """test_module__function=(passed, failed)."""
    return {
        name.replace("__", "."): Counter(passed=passed, failed=failed)
        for name, (passed, failed) in tests.items()
    }


def test_junit_is_counted_by_function(tmp_path: Path):
    (tmp_path / "junit.xml").write_text(JUNIT, encoding="utf-8")
    assert naive_table.read_junit(tmp_path / "junit.xml") == {
        "test_masks.test_causal": Counter(passed=1, failed=2),
        "test_masks.test_windows": Counter(broken=1),
        "test_scores.test_scale": Counter(skipped=1, broken=1),
    }


@pytest.mark.parametrize("body, outcome", [
    ("assert True", "passed"), ("assert 1 > 2", "failed"), ("assert 1 > 2, 'words'", "failed"),
    ("raise RuntimeError('CUDA error')", "broken"), ("import pytest; pytest.skip('no kernels')", "skipped"),
])  # fmt: skip
def test_it_is_what_pytest_writes(tmp_path: Path, body: str, outcome: str):
    """The pytest of this environment, with workers as the run has them."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(f"def test_one():\n    {body}\n")
    options = ("-q", "-n", "1", "--no-summary", "-p", "no:cacheprovider", "--junitxml=junit.xml")
    run(sys.executable, "-m", "pytest", *options, cwd=tmp_path, check=False)
    assert naive_table.read_junit(tmp_path / "junit.xml") == {"test_it.test_one": Counter({outcome: 1})}


@pytest.mark.parametrize("counts, text", [
    (Counter(passed=8), "passes 8"), (Counter(failed=5, passed=1), "fails 5 of 6"), (Counter(skipped=3),
        "not run"),
    (Counter(passed=2, broken=1), "passes 2, 1 broke"), (Counter(failed=1, broken=1), "fails 1 of 2, 1 "
        "broke"),
])  # fmt: skip
def test_cell(counts: Counter[str], text: str):
    assert naive_table.cell(counts) == text


def test_nothing_to_complain_of():
    columns = {
        RIGHT: column(t__a=(3, 0), t__b=(2, 0)),
        INF: column(t__a=(0, 3), t__b=(1, 1)),
        ZERO: column(t__a=(1, 2), t__b=(2, 0)),
    }
    assert list(naive_table.complaints(columns, {(ZERO, "t.b"): "it is right"})) == []


@pytest.mark.parametrize("columns, reasons, words", [
    ({RIGHT: column(t__a=(2, 1))}, {}, "t.a with right kernel: fails 1 of 3, and should pass"),
    ({INF: column(t__a=(3, 0))}, {}, "t.a with masked with -inf: passes 3, and no reason is given for it"),
    ({ZERO: column(t__a=(0, 3))}, {(ZERO, "t.a"): "because"}, "t.a with masked with 0: fails 3 of 3, and "
        "should pass"),
    ({ZERO: {"t.a": Counter(broken=2, failed=1)}}, {}, "t.a with masked with 0: 2 cases ended without an "
        "assertion that failed"),
])  # fmt: skip
def test_complaints(columns, reasons, words: str):
    assert list(naive_table.complaints(columns, reasons)) == [words]


def test_page():
    columns = {
        RIGHT: column(t__a=(3, 0), t__b=(2, 0)) | {"t.c": Counter(skipped=1)},
        INF: column(t__a=(0, 3), t__b=(0, 2)) | {"t.c": Counter(skipped=1)},
        ZERO: column(t__a=(1, 2), t__b=(2, 0)) | {"t.c": Counter(skipped=1)},
    }
    reasons = {(ZERO, "t.b"): "it asks for no more", (ZERO, "t.gone"): "it is elsewhere"}
    page = naive_table.markdown(columns, reasons, {"device": "some GPU", "date": "2026-11-24"})
    assert "- device: some GPU\n- date: 2026-11-24\n" in page
    assert "| test | right kernel | masked with -inf | masked with 0 |\n| --- | --- | --- | --- |\n" in page
    assert (
        "| t.a | passes 3 | fails 3 of 3 | fails 2 of 3 |\n| t.b | passes 2 | fails 2 of 2 | passes 2 |\n"
        in page
    )
    assert "- masked with 0: t.b: it asks for no more." in page and "elsewhere" not in page
    assert "| t.c |" not in page and "t.c: no build here has kernels" in page


def test_reasons_are_for_tests_that_run():
    """The committed list names variants and tests that there are."""
    reasons = naive_table.read_reasons(ROOT / "tests" / "naive" / "right_anyway.toml")
    chosen = naive.chosen_tests(Project.open(version=""))
    for _, test in reasons:
        module, function = test.split(".")
        assert f"tests/attention/{module}.py::{function}" in chosen or module == "test_finite", test
        assert f"def {function}(" in (ROOT / "tests" / "attention" / f"{module}.py").read_text(
            encoding="utf-8"
        )
    assert (
        chosen[0] == "tests/attention/test_finite.py"
        and "tests/attention/test_masks.py::test_causal" in chosen
    )


@pytest.mark.parametrize("text, words", [
    ('[[right]]\nvariants = ["masked-with-zero"]\ntests = ["t.a"]\n', "reason"),
    ('[[right]]\nvariants = ["masked-with-one"]\ntests = ["t.a"]\nreason = "x"\n', "masked-with-one"),
    ("[[right\n", "cannot be read"),
])  # fmt: skip
def test_bad_list_of_reasons(tmp_path: Path, text: str, words: str):
    (tmp_path / "list.toml").write_text(text)
    with pytest.raises(FapError, match=words):
        naive_table.read_reasons(tmp_path / "list.toml")


def test_extension_must_be_there_once(tmp_path: Path):
    with pytest.raises(FapError, match="holds 0 files"):
        naive.extension_in(tmp_path)
    (tmp_path / "flash_attn_2_cuda.cpython-312-x86_64-linux-gnu.so").touch()
    assert naive.extension_in(tmp_path).name.startswith("flash_attn_2_cuda")
    (tmp_path / "flash_attn_2_cuda.so").touch()
    with pytest.raises(FapError, match="holds 2 files"):
        naive.extension_in(tmp_path)


def test_patch_that_no_longer_fits_is_named(toy):
    """The hint says which patches to bring up to date."""
    (toy.root / "tests" / "naive").mkdir(parents=True)
    for name in ("minus-infinity", "masked-with-zero"):
        shutil.copy(ROOT / "tests" / "naive" / f"{name}.patch", toy.root / "tests" / "naive")
    project = Project.open(toy.root)
    tree = project.release.patched_tree
    with pytest.raises(FapError, match="bring the patches of minus-infinity in tests/naive up to date"):
        naive.patched(project, tree, INF)


def test_build_copies_are_apart(toy):
    project = Project.open(toy.root)
    copies = [naive.Variant(**vars(project), name=name).wheel_dir for name in naive_table.VARIANTS]
    assert len({project.wheel_dir, *copies}) == 3 and all(
        copy.is_relative_to(project.build / "naive") for copy in copies
    )
