"""Test how a build is chosen or skipped, and that a wheel that is not the patched package is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fapatch.base import files, git
from fapatch.base.errors import FapError, UsageError
from fapatch.base.project import Project
from fapatch.series import state
from fapatch.series.state import State
from fapatch.wheel import build_copy, build_progress, facts, normal, wheel, wheel_check
from fapatch.wheel.cuda_toolkit import Search, Toolkit, Torch

INPUTS = wheel.Inputs(tree="a" * 40, lock="b" * 64, backend="cpu", python="3.11", torch="2.13.0", options="")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return replace(Project.open(family="flash-attn", version="2.8.3.post1"), root=tmp_path)


FOUND = Search(Toolkit(Path("/cuda"), "CUDA_HOME"), ())
NONE = Search(None, ("/usr/local/bin/nvcc has no headers",))


def torch(gpu: bool, cuda: str | None) -> Torch:
    return Torch(python="3.11.7", version="2.13.0", cuda=cuda, gpu=gpu, home=None, packages=())


@pytest.mark.parametrize(
    "gpu, torch_cuda, nvcc, expected, why",
    [
        (True, "12.8", FOUND, "cuda", "GPU and nvcc found"),
        (False, "12.8", FOUND, "cpu", "no GPU here"),
        (True, "12.8", NONE, "cpu", "no nvcc here"),
        (False, None, NONE, "cpu", "no GPU and no torch with CUDA and no nvcc here"),
    ],
)
def test_auto_takes_cuda_only_where_it_can_be_built_and_run(gpu, torch_cuda, nvcc, expected, why):
    chosen = wheel.choose_backend("auto", torch(gpu, torch_cuda), nvcc)
    assert (chosen.name, chosen.reason) == (expected, why)


def test_a_gpu_that_waits_for_a_compiler_alone_gets_a_hint():
    hint = wheel.choose_backend("auto", torch(True, "13.0"), NONE).hint
    assert "/usr/local/bin/nvcc has no headers" in hint and "`make toolchain`" in hint
    # No hint elsewhere, where a compiler would change nothing.
    for gpu, cuda, nvcc in [(False, "13.0", NONE), (True, None, NONE), (True, "13.0", FOUND)]:
        assert not wheel.choose_backend("auto", torch(gpu, cuda), nvcc).hint
    assert not wheel.choose_backend("cpu", torch(True, "13.0"), NONE).hint


def test_a_backend_that_is_asked_for_is_taken_or_refused():
    assert wheel.choose_backend("cpu", torch(True, "12.8"), FOUND).name == "cpu"
    assert wheel.choose_backend("cuda", torch(False, "12.8"), FOUND).name == "cuda"
    with pytest.raises(
        FapError, match="/usr/local/bin/nvcc has no headers.*->.*make toolchain.*CUDA 12.8.*BACKEND=cpu"
    ):
        wheel.choose_backend("cuda", torch(True, "12.8"), NONE)
    with pytest.raises(FapError, match="torch with CUDA"):
        wheel.choose_backend("cuda", torch(True, None), FOUND)
    with pytest.raises(UsageError, match="BACKEND=rocm"):
        wheel.choose_backend("rocm", torch(True, "12.8"), FOUND)


@pytest.mark.parametrize("field", ["tree", "lock", "backend", "python", "torch", "options"])
def test_a_changed_input_is_named(project, field):
    state = {"inputs": wheel.asdict(replace(INPUTS, **{field: "other"})), "wheel": "x.whl", "sha256": ""}
    assert wheel.up_to_date(project, INPUTS, state) == (None, f"changed since the last wheel: {field}")


def test_a_wheel_that_is_there_is_not_built_again_and_a_damaged_one_is(project):
    assert wheel.up_to_date(project, INPUTS, {}) == (None, "no wheel was built yet")
    project.dist.mkdir()
    path = project.dist / "x.whl"
    path.write_bytes(b"wheel")
    state = {"inputs": wheel.asdict(INPUTS), "wheel": "x.whl", "sha256": files.sha256(path)}
    assert wheel.up_to_date(project, INPUTS, state) == (path, "")
    path.write_bytes(b"whee")
    assert wheel.up_to_date(project, INPUTS, state) == (None, "dist/x.whl is not the file that was built")
    path.unlink()
    assert wheel.up_to_date(project, INPUTS, state) == (None, "dist/x.whl is gone")


FILES = {
    "flash_attn/__init__.py": b"__version__ = '2.8.3.post1'\n",
    "flash_attn/flash_attn_interface.py": b"from .nosoftmax import hook\n",
    "flash_attn/nosoftmax/__init__.py": b"use_softmax = 'nosoftmax'\n",
    "LICENSE": b"BSD\n",
}
LABEL = Project.open().family.local_label
MADE = State("b", "t", True, (), ("a.patch",), {"flash_attn/nosoftmax/__init__.py": "blob"}, "c", "1" * 40)
CPU = f"{LABEL}.cpu"
GOOD = f"flash_attn-2.8.3.post1+{CPU}-py3-none-any.whl"
COMPILED = f"flash_attn-2.8.3.post1+{LABEL}-cp311-cp311-linux_x86_64.whl"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "tree"


def make(
    folder: Path, name: str = GOOD, changes: dict[str, bytes | None] | None = None, says: State = MADE
) -> Path:
    version = name.split("-")[1]
    info = f"flash_attn-{version}.dist-info"
    metadata = f"Name: flash_attn\nVersion: {version}\n".encode()
    members = {
        **FILES,
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": b"",
        f"{info}/RECORD": b"",
        f"{info}/licenses/LICENSE": FILES["LICENSE"],
    }
    del members["LICENSE"]
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, content in {**members, **(changes or {})}.items():
            if content is not None:
                archive.writestr(member, content)
    said = facts.of(Project.open(family="flash-attn", version="2.8.3.post1"), says)
    normal.rewrite(folder / name, {facts.NAME: facts.text(said)})
    return folder / name


def test_a_good_wheel_passes(project, tree, tmp_path):
    wheel_check.check(make(tmp_path), project, "cpu", tree, MADE)
    compiled = make(tmp_path, COMPILED, {"flash_attn_2_cuda.cpython-311.so": b""})
    wheel_check.check(compiled, project, "cuda", tree, MADE)


@pytest.mark.parametrize(
    "name, changes, backend, message",
    [
        (GOOD.replace(CPU, "nosoftmax.0.cpu"), {}, "cpu", "expected flash_attn 2.8.3.post1"),
        (GOOD.replace(f"+{CPU}", ""), {}, "cpu", "expected flash_attn 2.8.3.post1"),
        (GOOD.replace(CPU, LABEL), {}, "cpu", f"expected flash_attn 2.8.3.post1+{CPU}"),
        (GOOD, {}, "cuda", f"expected flash_attn 2.8.3.post1+{LABEL}"),
        (GOOD, {"flash_attn/flash_attn_interface.py": b"tampered"}, "cpu", "differs from the patched tree"),
        (GOOD, {"flash_attn/flash_attn_interface.py": None}, "cpu", "differs from the patched tree"),
        (GOOD, {"flash_attn/cute/interface.py": b""}, "cpu", "first: flash_attn/cute/interface.py"),
        (GOOD, {f"flash_attn-2.8.3.post1+{CPU}.dist-info/licenses/LICENSE": b"MIT"}, "cpu", "LICENSE"),
        (GOOD, {"flash_attn_2_cuda.cpython-311.so": b""}, "cpu", "not a pure Python wheel"),
        (GOOD.replace("py3-none-any", "cp311-cp311-linux_x86_64"), {}, "cpu", "not a pure Python wheel"),
        (COMPILED, {}, "cuda", "lacks the compiled extension"),
    ],
)
def test_a_wrong_wheel_is_refused(project, tree, tmp_path, name, changes, backend, message):
    with pytest.raises(FapError) as caught:
        wheel_check.check(make(tmp_path, name, changes), project, backend, tree, MADE)
    assert message in str(caught.value)


def test_an_unpatched_package_is_refused(project, tree, tmp_path):
    plain = {"flash_attn/flash_attn_interface.py": b"softmax only\n"}
    (tree / "flash_attn/flash_attn_interface.py").write_bytes(b"softmax only\n")
    with pytest.raises(FapError, match="no file of upstream's .* has a hook"):
        wheel_check.check(make(tmp_path, changes=plain), project, "cpu", tree, MADE)


def test_the_facts_in_a_wheel_are_compared_and_recorded(project, tree, tmp_path):
    other = make(tmp_path, says=replace(MADE, tree="2" * 40))
    with pytest.raises(FapError, match="says that it is of 2222"):
        wheel_check.check(other, project, "cpu", tree, MADE)
    with zipfile.ZipFile(make(tmp_path)) as archive:
        said, record = facts.read(archive), archive.read(f"{facts.info(archive)}/RECORD").decode()
        content = archive.read(f"{facts.info(archive)}/nosoftmax.json")
    assert said["patched tree"] == MADE.tree and said["patches"] == ["a.patch"]
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    assert f"/nosoftmax.json,sha256={digest},{len(content)}\n" in record


def written_by_setuptools(path: Path, new: bool, mode: int) -> Path:
    """Make a wheel as setuptools wrote it before version 77, or, if ``new``, as it does since."""
    info = "x-1.dist-info"

    def pick(old: str, young: str) -> str:
        return young if new else old

    metadata = [
        f"Metadata-Version: {pick('2.1', '2.4')}",
        "Name: x",
        "License-File: LICENSE",
        f"Requires-Dist: {pick('typing-extensions >=4', 'typing_extensions>=4')}",
        "Requires-Dist: " + pick("a ; extra == 'b'", 'a; extra == "b"'),
        *(["Dynamic: license-file"] if new else []),
        "",
        "Dynamic: this is the description",
    ]
    members = {
        "x.py": "x",
        "x.so": "so",
        f"{info}/{pick('', 'licenses/')}LICENSE": "BSD",
        f"{info}/METADATA": "\n".join(metadata),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: {pick('bdist_wheel', 'setuptools')}\nTag: a-b-c\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(members, reverse=new):
            member = zipfile.ZipInfo(name, (2020 + new, 1, 1, 0, 0, 0))
            member.external_attr = mode << 16
            archive.writestr(member, members[name])
    return path


def test_a_wheel_has_one_form_whatever_built_it(tmp_path):
    one = written_by_setuptools(tmp_path / "one.whl", False, 0o100644)
    two = written_by_setuptools(tmp_path / "two.whl", True, 0o100600)
    for path in (one, two):
        normal.rewrite(path)
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as archive:
        modes = {entry.filename: oct(entry.external_attr >> 16) for entry in archive.infolist()}
        metadata = archive.read("x-1.dist-info/METADATA").decode().splitlines()
        record = archive.read("x-1.dist-info/RECORD").decode().splitlines()
    assert modes["x.py"] == "0o100644" and modes["x.so"] == "0o100755"
    assert metadata == [
        "Metadata-Version: 2.4",
        "Name: x",
        "Requires-Dist: typing-extensions>=4",
        'Requires-Dist: a; extra == "b"',
        "License-File: LICENSE",
        "",
        "Dynamic: this is the description",
    ]
    assert [line.partition(",")[0] for line in record] == list(modes)
    assert record[0] == "x.py,sha256=LXEWQrcmsEQBYnyp-6wy9chTD7GQPMTbAiWHF5IaSIE,1"


@pytest.fixture
def worktree(project) -> Path:
    """A store with one commit and a worktree of it, as after `apply`."""
    project.store.mkdir(parents=True)
    git.git("init", "--quiet", "--bare", project.store)
    scratch = project.root / "scratch"
    git.git("clone", "--quiet", project.store, scratch)
    (scratch / "setup.py").write_text("one")
    (scratch / "flash_attn").mkdir()
    (scratch / "flash_attn" / "old.py").write_text("old")
    git.git("add", "--all", cwd=scratch)
    git.git("commit", "--quiet", "--message=x", cwd=scratch)
    git.git("push", "--quiet", "origin", "HEAD:refs/heads/x", cwd=scratch)
    return scratch


def commit(worktree: Path, **files: str | None) -> str:
    for name, content in files.items():
        path = worktree / name.replace("__", "/").replace("_py", ".py")
        path.unlink() if content is None else path.write_text(content)
    git.git("add", "--all", cwd=worktree)
    git.git("commit", "--quiet", "--message=y", cwd=worktree)
    git.git("push", "--quiet", "--force", "origin", "HEAD:refs/heads/x", cwd=worktree)
    return git.output("rev-parse", "HEAD^{tree}", cwd=worktree)


def test_the_copy_follows_the_tree_and_keeps_the_objects(project, worktree):
    first = git.output("rev-parse", "HEAD^{tree}", cwd=worktree)
    build_copy.sync(project, first, with_cutlass=False)
    copy = project.wheel_dir
    assert (copy / "flash_attn/old.py").read_text() == "old" and not (copy / ".git").exists()
    (copy / "build/temp").mkdir(parents=True)
    (copy / "build/temp/kernel.o").touch()
    (copy / "build/lib/flash_attn").mkdir(parents=True)
    (copy / "build/lib/flash_attn/old.py").touch()
    unchanged = (copy / "setup.py").stat().st_mtime_ns

    second = commit(worktree, flash_attn__old_py=None, flash_attn__new_py="new")
    build_copy.sync(project, second, with_cutlass=False)
    assert not (copy / "flash_attn/old.py").exists() and (copy / "flash_attn/new.py").read_text() == "new"
    assert (copy / "setup.py").stat().st_mtime_ns == unchanged
    assert (copy / "build/temp/kernel.o").exists() and not (copy / "build/lib").exists()


def test_the_copy_mends_a_file_that_was_tampered_with(project, worktree):
    tree = git.output("rev-parse", "HEAD^{tree}", cwd=worktree)
    build_copy.sync(project, tree, with_cutlass=False)
    (project.wheel_dir / "setup.py").write_text("tampered")
    build_copy.sync(project, tree, with_cutlass=False)
    assert (project.wheel_dir / "setup.py").read_text() == "one"


def test_a_git_folder_in_the_copy_is_refused(project, worktree):
    (project.wheel_dir / ".git").mkdir(parents=True)
    with pytest.raises(FapError, match="setup.py would run git"):
        build_copy.sync(project, git.output("rev-parse", "HEAD^{tree}", cwd=worktree), with_cutlass=False)


def test_a_tree_that_apply_did_not_make_is_refused(project, worktree):
    tree = git.output("rev-parse", "HEAD^{tree}", cwd=worktree)
    with pytest.raises(FapError, match="`make apply` made none"):
        build_copy.verified(project, worktree)
    state.write(project, state.State("b", "t", True, (), (), {}, "c", tree))
    assert build_copy.verified(project, worktree).tree == tree
    commit(worktree, setup_py="another")
    with pytest.raises(FapError, match=f"`make apply` made {tree[:12]}.*make refresh"):
        build_copy.verified(project, worktree)


@pytest.mark.parametrize("cores, gib, jobs", [(16, 128, 16), (16, 20, 4), (2, 4, 1), (1, 64, 1)])
def test_compilers_at_once_fit_the_cores_and_the_memory(cores, gib, jobs):
    assert wheel.max_jobs(cores, gib << 30) == jobs


def test_max_jobs_of_the_caller_wins(project, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert wheel.build_environment(project, "cuda")["MAX_JOBS"] == "3"


def test_a_build_says_how_far_it_is_and_keeps_its_output():
    log, screen, times = io.BytesIO(), io.StringIO(), iter([0, 30, 31, 60, 90])
    progress = build_progress.Progress(log, screen, lambda: next(times))
    lines = [
        b"running build_ext\n",
        b"kernel_build: no option leaves these out: new.cu\n",
        b"[1/4] nvcc a.cu\n",
        b"[2/4] nvcc b.cu\n",
        b"warning: b\n",
        b"[3/4] nvcc c.cu\n",
        b"[4/4] nvcc d.cu\n",
    ]
    for line in lines:
        progress(line)
    assert log.getvalue() == b"".join(lines)
    # The second file came too soon after the first to get a line, because no terminal overwrites lines here.
    assert screen.getvalue().splitlines() == [
        "kernel_build: no option leaves these out: new.cu",
        "compiled 1 of 4 files, 0:30 elapsed, about 1:30 left",
        "compiled 3 of 4 files, 1:00 elapsed, about 0:20 left",
        "compiled 4 of 4 files, 1:30 elapsed, linking",
    ]


def test_a_failed_build_shows_the_lines_that_name_errors(tmp_path):
    log = tmp_path / "log"
    log.write_text("ok\nx.h(3): error: no such thing\nninja: stopped\n")
    assert build_progress.errors_in(log) == "x.h(3): error: no such thing"
