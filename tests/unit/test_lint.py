"""Test that every rule of the linter passes a good example, and finds in a bad one the fault and nothing
else.

Fixtures: fixtures/lint/base is a small project without a finding. `<rule>.{pass,fail}.patch` is checked as a
patch of that project; if the patch's name matters, it lies alone in a folder of that name.
`<rule>.{pass,fail}/` with other files is copied over a copy of the project.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fapatch.base import lock
from fapatch.base.process import run
from fapatch.series import lint, lint_patch, lint_project

FIXTURES = Path(__file__).parent / "fixtures" / "lint"
BASE = FIXTURES / "base"


def checkout(root: Path) -> lint_project.Checkout:
    links = dict(reversed(line.split()) for line in (root / "gitlinks").read_text().splitlines())
    return lint_project.Checkout(root, lock.load(root / "upstream.toml"), links)


def patch_findings(path: Path, tmp_path: Path) -> set[lint.Finding]:
    root = tmp_path / "project"
    shutil.copytree(BASE, root)
    name = "interface-flag.patch" if path.parent == FIXTURES else path.name
    copy = root / "patches" / "pkg" / name
    shutil.copyfile(path, copy)
    return set(lint.check_patch(copy, root, lock.load(root / "upstream.toml").family()))


def project_findings(folder: Path, tmp_path: Path) -> set[lint.Finding]:
    root = tmp_path / "project"
    shutil.copytree(BASE, root)
    shutil.copytree(folder, root, dirs_exist_ok=True)
    return set(lint.check_project(checkout(root)))


def findings(rule: str, verdict: str, tmp_path: Path) -> set[lint.Finding]:
    if rule in lint_project.RULES:
        return project_findings(FIXTURES / f"{rule}.{verdict}", tmp_path)
    single, folder = FIXTURES / f"{rule}.{verdict}.patch", FIXTURES / f"{rule}.{verdict}"
    return patch_findings(single if single.is_file() else next(folder.iterdir()), tmp_path)


RULES = [*lint_patch.RULES, *lint_project.RULES]


@pytest.mark.parametrize("rule", RULES)
def test_good_example_passes_every_rule(rule, tmp_path):
    assert findings(rule, "pass", tmp_path) == set()


@pytest.mark.parametrize("rule", RULES)
def test_bad_example_is_caught_by_its_rule_alone(rule, tmp_path):
    found = findings(rule, "fail", tmp_path)
    assert {f.rule for f in found} == {rule}
    assert all(f.message and f.file for f in found)


def test_every_rule_has_both_fixtures_and_every_fixture_a_rule():
    there = {p.name.removesuffix(".patch") for p in FIXTURES.iterdir()} - {"base"}
    assert there == {f"{rule}.{verdict}" for rule in RULES for verdict in ("pass", "fail")}


def test_the_base_project_is_clean():
    assert list(lint.check_project(checkout(BASE))) == []


def test_a_finding_names_its_line(tmp_path):
    (found,) = patch_findings(FIXTURES / "whitespace.fail.patch", tmp_path)
    assert (FIXTURES / "whitespace.fail.patch").read_text().splitlines()[found.line - 1].endswith("  ")
    assert str(found).startswith(f"patches/pkg/interface-flag.patch:{found.line}: whitespace: ")


@pytest.mark.parametrize(
    "status, good",
    [
        ("Pending", True),
        ("Submitted [https://example.org/1]", True),
        ("Denied [https://example.org/1]", True),
        ("Backport [060c9188]", True),
        ("Inappropriate [reason]", True),
        ("pending", False),
        ("Submitted", False),
        ("Submitted [soon]", False),
        ("Backport []", False),
        ("Pending [why]", False),
        ("Merged", False),
    ],
)
def test_upstream_status_is_strict(status, good, tmp_path):
    patch = tmp_path / "interface-flag.patch"
    text = (BASE / "patches/pkg/interface-flag.patch").read_text()
    patch.write_text(text.replace("Inappropriate [not of interest to upstream]", status))
    found = {f.rule for f in patch_findings(patch, tmp_path)}
    assert found == (set() if good else {"upstream-status"})


def test_gitlinks_are_read_from_the_index(tmp_path):
    run("git", "init", "--quiet", tmp_path)
    commit = "060c9188beec3a8b62b33a3bfa6d5d2d44975fab"
    run("git", "update-index", "--add", "--cacheinfo", f"160000,{commit},third_party/a folder", cwd=tmp_path)
    (tmp_path / "file").write_text("")
    run("git", "add", "file", cwd=tmp_path)
    assert lint.gitlinks(tmp_path) == {"third_party/a folder": commit}


def test_the_attributes_rule_agrees_with_git(tmp_path):
    """The rule reads .gitattributes itself, and must agree with git about its meaning."""
    run("git", "init", "--quiet", tmp_path)
    for verdict, expected in (("pass", "unset"), ("fail", "auto")):
        shutil.copyfile(FIXTURES / f"attributes.{verdict}" / ".gitattributes", tmp_path / ".gitattributes")
        said = run("git", "check-attr", "text", "--", "patches/pkg/x.patch", cwd=tmp_path).stdout.decode()
        assert said.strip().endswith(expected)
