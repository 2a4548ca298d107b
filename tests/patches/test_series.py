"""Test the series on every supported release: exact, reversible, equal by another engine, and equal to its
export.
"""

from __future__ import annotations

import ast
import io
import shutil
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from unidiff import PatchSet

from fapatch.base import git
from fapatch.base.errors import FapError
from fapatch.series import apply, arguments, bundle, refresh, series
from fapatch.source import download, origins

pytestmark = pytest.mark.source


def test_upstream_is_what_the_lock_names(patched):
    assert patched.base.tree == patched.project.release.tree


def test_every_change_of_the_series_is_applied_or_a_backport(patched):
    assert not series.outside(patched.files.patches, patched.project.release.version)
    assert [p.name for p in patched.files.patches] == sorted(
        patched.built.applied + patched.built.skipped, key=[p.name for p in patched.files.patches].index
    )


def test_each_prefix_of_the_series_leaves_python_that_parses(patched):
    folder = patched.built.folder
    commits = git.output("rev-list", "--reverse", f"{patched.base.commit}..HEAD", cwd=folder).splitlines()
    assert len(commits) == len(patched.built.applied) + 1  # one commit more for the overlay
    for commit in commits:
        changed = git.output(
            "diff-tree", "-r", "--name-only", "--no-commit-id", commit, cwd=folder
        ).splitlines()
        for path, content in git.read_tree(
            commit, lambda p, c=tuple(changed): p in c and p.endswith(".py"), cwd=folder
        ):
            ast.parse(content, f"{commit[:12]}:{path}")


def test_reversed_it_gives_upstream(patched, tmp_path):
    index = {"GIT_INDEX_FILE": str(tmp_path / "index")}
    store = patched.project.store
    git.git("read-tree", patched.built.commit, repo=store, env=index)
    for patch in reversed(patched.applied):
        git.git("apply", "--cached", "--reverse", "-", repo=store, env=index, stdin=patch.data)
    removed = "".join(f"0 {'0' * 40}\t{path}\n" for path in patched.files.overlay)
    git.git("update-index", "--index-info", repo=store, env=index, stdin=removed.encode())
    assert git.output("write-tree", repo=store, env=index) == patched.project.release.tree


@pytest.mark.skipif(shutil.which("patch") is None, reason="GNU patch is not installed")
def test_second_engine_gives_the_same_tree(patched, plain):
    for path, content in patched.files.overlay.items():
        (plain / path).parent.mkdir(parents=True, exist_ok=True)
        (plain / path).write_bytes(content)
    for patch in patched.applied:
        done = subprocess.run(
            ["patch", "-p1", "--fuzz=0", "--force", "--no-backup-if-mismatch"],
            cwd=plain,
            input=patch.data,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, f"{patch.name}: {done.stdout.decode()}"
    assert git.tree_of(plain) == patched.built.tree


def test_bundle_applies_to_the_whole_source_distribution(patched, tmp_path):
    """Plain `git apply` takes the bundle in a checkout of all upstream files, not only those that we take."""
    plain = tmp_path / "plain"
    with tarfile.open(download.sdist(patched.project)) as tar:
        for member in tar:
            path = Path(*Path(member.name).parts[1:])
            if member.isfile() and not path.as_posix().startswith(
                ("csrc/cutlass", "csrc/composable_kernel", "hopper")
            ):
                path = patched.project.family.folder / path
                (plain / path).parent.mkdir(parents=True, exist_ok=True)
                (plain / path).write_bytes(tar.extractfile(member).read())
    git.git("init", "--quiet", plain)
    text = bundle.make(patched.project, patched.base.commit, patched.built.folder, patched.built.tree)
    git.git("apply", "-", cwd=plain, stdin=text)
    ours = origins.ours(patched.project)
    found = {
        p.relative_to(plain).as_posix(): p for p in plain.rglob("*") if p.is_file() and ".git" not in p.parts
    }
    wanted = {path for path in found if ours(path) or path in patched.files.overlay}
    assert {path: git.blob_id(found[path].read_bytes()) for path in wanted} == git.list_tree(
        "HEAD", cwd=patched.built.folder
    )


def test_patches_only_change_lines_of_shared_files(patched):
    for patch in patched.applied:
        for changed in PatchSet(io.StringIO(patch.data.decode())):
            assert changed.is_modified_file and not changed.is_rename, (
                f"{patch.name}: {changed.path} is not a plain change"
            )
            assert changed.path in patched.upstream, (
                f"{patch.name}: {changed.path} is not a file that both sources have"
            )
        assert b"\nold mode " not in patch.data and b"\nGIT binary patch" not in patch.data


GEN = "gen/unused_generator_compat"


@pytest.mark.parametrize(
    "old, new, told",
    [
        (GEN, f"{GEN} [num_splits]", ""),
        (GEN, "other/gen/third", ""),
        (GEN, "other", "fwd takes gen and lacks other"),
        (f" {GEN}", "", "fwd takes gen"),
        (GEN, f"{GEN} num_splits", "fwd lacks num_splits"),
        ("softcap return_softmax", "return_softmax softcap", "fwd has another order"),
    ],
)
def test_an_argument_of_the_extension_that_the_table_lacks_is_named(with_extension, old, new, told):
    text = with_extension.files.overlay[arguments.STAND_IN].decode()
    assert old in text
    files = {arguments.STAND_IN: text.replace(old, new).encode()}
    with pytest.raises(FapError, match=f"{told}.*correct SIGNATURES") if told else nullcontext():
        arguments.check(with_extension.project, with_extension.base, files)


def test_generated_kernels_are_up_to_date(with_extension, tmp_path):
    folder = with_extension.built.folder / "csrc" / "flash_attn" / "src"
    subprocess.run(
        [sys.executable, folder / "generate_kernels.py", "-o", tmp_path], check=True, capture_output=True
    )
    made = {p.name: p.read_bytes() for p in tmp_path.glob("*.cu")}
    ours = {Path(name).name for name in with_extension.files.overlay}
    assert made and made == {p.name: p.read_bytes() for p in folder.glob("*.cu") if p.name not in ours}


def test_export_gives_back_the_committed_files(default):
    exported = refresh.export_tree(
        default.project, default.built.folder, default.base.commit, default.files.patches
    )
    for committed, found in zip(default.files.patches, exported.patches, strict=True):
        assert found == committed, f"{committed.name} is not as the export writes it: make refresh"
    assert exported.overlay == default.files.overlay


def test_second_apply_does_nothing_and_says_so(default, capsys):
    apply.ensure(default.project, "")
    capsys.readouterr()
    apply.ensure(default.project, "")
    assert capsys.readouterr().out.rstrip().endswith("Nothing to do.")


def test_a_changed_line_upstream_would_be_noticed(default, tmp_path):
    """The checks can fail: a series whose first hunk expects another line does not apply."""
    first = next(p for p in default.files.patches if p.name in default.built.applied)
    broken = first.data.replace(b"\n-", b"\n-not what upstream has ", 2)
    patches = (type(first)(first.name, broken),)
    with pytest.raises(Exception, match=first.name):
        apply.build(default.project, default.base, tmp_path / "tree", patches, {})
