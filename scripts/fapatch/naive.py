"""Kernels that are wrong on purpose, on the GPU: what each test says of a softmax that was commented out by
hand.

  build   puts the patches of tests/naive on the patched tree and compiles the extension of each naive kernel
  into build/naive/<variant>,
          alone: the Python package stays the installed one. HEAD_DIMS (32,64), DTYPES (fp16) and ARCHS choose
          the kernels.
  test    runs the CUDA tests of tests/attention/test_finite.py and every test that a mutant names in its
  caught_by, with the installed
          extension and with each naive one before it on PYTHONPATH; writes docs/results/naive-kernels.json
          and .md.

`test` fails when the right kernel fails a test, or when a naive one passes a test and
tests/naive/right_anyway.toml does not say why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from . import apply, build_copy, cuda_toolkit, git, locking, naive_table, wheel
from .cuda_toolkit import Torch
from .errors import FapError, UsageError
from .naive_table import RIGHT, VARIANTS
from .process import run
from .project import Project

NEEDS_EXTENSION = True
EXTENSION = "flash_attn_2_cuda"
# minus-infinity.patch is what the first person does, masked-with-zero.patch what the next one mends on top of
# it.
PATCHES = {"minus-infinity": ("minus-infinity",), "masked-with-zero": ("minus-infinity", "masked-with-zero")}
OPTIONS = {"HEAD_DIMS": "32,64", "DTYPES": "fp16", "PASSES": ""}
# Prints the tests that mutants name, one a line.
CAUGHT_BY = (
    "from mutations import MUTANTS; print(*sorted({mutant.caught_by for mutant in MUTANTS}), sep='\\n')"
)
ABOUT = f"""
import json, torch
if not torch.cuda.is_available():
    raise SystemExit("torch sees no GPU")
import {EXTENSION} as extension
print(json.dumps({{"file": extension.__file__, "device": torch.cuda.get_device_name(),
    "torch": torch.__version__,
                  "head_dims": list(extension.built_head_dims), "dtypes": list(extension.built_dtypes)}}))
"""


@dataclass(frozen=True)
class Variant(Project):
    """The same checkout with a build copy of its own, in which one naive kernel is built."""

    name: str

    @property
    def folder(self) -> Path:
        """Where its extension goes."""
        return self.build / "naive" / self.name

    @property
    def wheel_dir(self) -> Path:
        return self.folder / "src"


def patched(project: Project, tree: str, variant: str) -> str:
    """The id of ``tree`` with the patches of ``variant`` on it, written to the store. Raises FapError when
    one does not apply.
    """
    folder = project.root / "tests" / "naive"
    patches = [(folder / f"{name}.patch").read_bytes() for name in PATCHES[variant]]
    hint = (
        f"the kernels have changed: bring the patches of {variant} in {folder.relative_to(project.root)} "
        "up to date with them"
    )
    return git.tree_with(tree, patches, repo=project.store, hint=hint)


def extension_in(folder: Path) -> Path:
    """The one extension in ``folder``. Raises FapError when there is none, or more than one."""
    found = sorted(folder.glob(f"{EXTENSION}*.so"))
    if len(found) != 1:
        raise FapError(
            f"{folder} holds {len(found)} files {EXTENSION}*.so, expected one", "fap.py naive build"
        )
    return found[0]


def build(project: Project, python: Path) -> None:
    """Compile the extension of every variant. A build that was stopped goes on where it was."""
    torch = Torch.of(python)
    nvcc = cuda_toolkit.find(project.venv, torch)
    wheel.choose_backend("cuda", torch, nvcc)
    variables = cuda_toolkit.build_environment(nvcc.toolkit, torch.packages)
    options = {
        **{name: os.environ.get(name) or value for name, value in OPTIONS.items()},
        "NO_SOFTMAX_ONLY": "1",
    }
    tree = build_copy.verified_tree(project, apply.ensure(project))
    for name in VARIANTS:
        variant = Variant(**vars(project), name=name)
        print(f"building {name}: {' '.join(f'{k}={v}' for k, v in options.items() if v)}", flush=True)
        wheel.run_setup(
            variant,
            "cuda",
            patched(project, tree, name),
            python,
            "setup.py",
            "build_ext",
            env={**variables, **options},
        )
        (built,) = (variant.wheel_dir / "build").glob(f"lib*/{EXTENSION}*.so")
        for old in variant.folder.glob(f"{EXTENSION}*.so"):
            old.unlink()
        shutil.copy2(built, variant.folder)
        print(f"{extension_in(variant.folder).relative_to(project.root)} is ready", flush=True)


def describe(folder: Path | None) -> dict:
    """What the extension in ``folder`` (None: the installed one) is and where it runs. Raises FapError when
    it is not the one imported.
    """
    said = run(sys.executable, "-c", ABOUT, env={"PYTHONPATH": str(folder or "")}, check=False)
    if said.returncode != 0:
        reason = (said.stderr.decode("utf-8", "replace").splitlines() or ["no output"])[-1]
        raise FapError(
            f"the extension in {folder or 'this environment'} cannot be tested: {reason}",
            "this needs a GPU, a wheel with the CUDA extension, and naive extensions built for this Python "
            "and torch",
        )
    about = json.loads(said.stdout)
    if folder is not None and Path(about["file"]).resolve() != extension_in(folder).resolve():
        raise FapError(
            f"python imported {about['file']} and not {extension_in(folder)}",
            "they are built for different Pythons",
        )
    return about


def chosen_tests(project: Project) -> list[str]:
    """What pytest is to run: every finite test, and whatever catches a mutant."""
    folder = project.root / "tests" / "attention"
    said = (
        run(sys.executable, "-c", CAUGHT_BY, env={"PYTHONPATH": str(folder)}, hint="make env")
        .stdout.decode()
        .split()
    )
    named = (
        (folder / module).with_suffix(".py").relative_to(project.root).as_posix() + f"::{function}"
        for module, _, function in (test.partition(".") for test in said)
        if module != "test_finite"
    )
    return ["tests/attention/test_finite.py", *named]


def run_tests(
    project: Project, tests: list[str], extension: Path | None, workers: int, report: Path
) -> naive_table.Column:
    """Run the CUDA cases of ``tests`` with the extension in that folder (None: the installed one); linear
    time does not use it.
    """
    result = run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "--no-summary",
        "-p",
        "no:cacheprovider",
        "-k",
        "quadratic and cuda",
        "-n",
        str(workers),
        f"--junitxml={report}",
        *tests,
        cwd=project.root,
        env={"PYTHONPATH": str(extension or "")},
        check=False,
        capture=False,
    )
    if result.returncode not in (0, 1):  # 1: some tests failed
        raise FapError(f"pytest stopped with exit code {result.returncode}", "its own message is above")
    return naive_table.read_junit(report)


def test(project: Project, args: argparse.Namespace) -> int:
    """Run the tests with every kernel and write down what they said; 0 when all is as it should be."""
    if args.workers < 1:
        raise UsageError(f"--workers {args.workers} is no number of processes", "for example --workers 4")
    reasons = naive_table.read_reasons(project.root / "tests" / "naive" / "right_anyway.toml")
    results = args.results or project.root / "docs" / "results"
    extensions = (args.extensions or project.build / "naive").resolve()
    folders = {RIGHT: None, **{name: extensions / name for name in VARIANTS}}
    about = {name: describe(folder) for name, folder in folders.items()}
    tests = chosen_tests(project)
    reports = project.build / "naive"
    reports.mkdir(parents=True, exist_ok=True)
    columns = {}
    for name, folder in folders.items():
        print(f"{naive_table.TITLES[name]}: {about[name]['file']}", flush=True)
        columns[name] = run_tests(project, tests, folder, args.workers, reports / f"{name}.xml")
    wrong = list(naive_table.complaints(columns, reasons))
    naive = about[VARIANTS[0]]
    facts = {
        "device": naive["device"],
        "torch": naive["torch"],
        "date": date.today().isoformat(),
        "naive kernels": f"head dimensions {', '.join(map(str, naive['head_dims']))}, "
        f"{', '.join(naive['dtypes'])}",
        "commands": "`scripts/fap.py naive build`, `scripts/fap.py naive test`",
    }
    results.mkdir(parents=True, exist_ok=True)
    counts = {name: {function: dict(c) for function, c in column.items()} for name, column in columns.items()}
    record = {**facts, "as_expected": not wrong, "complaints": wrong, "kernels": counts}
    (results / "naive-kernels.json").write_text(
        json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
    page = results / "naive-kernels.md"
    page.write_text(naive_table.markdown(columns, reasons, facts), encoding="utf-8")
    print(f"written to {page} and .json")
    print(*(wrong or ["every test says of every kernel what it should"]), sep="\n")
    return 1 if wrong else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("step", choices=("build", "test"))
    parser.add_argument(
        "--extensions",
        type=Path,
        help="test: a folder with one folder a variant that holds its extension, built elsewhere (default: "
        "build/naive)",
    )
    parser.add_argument(
        "--workers",
        "-n",
        type=int,
        default=4,
        help="test: processes at once on the GPU (default: %(default)s)",
    )
    parser.add_argument("--results", type=Path, help="test: where to write (default: docs/results)")


def main(project: Project, args: argparse.Namespace) -> int:
    if args.step == "test":
        return test(project, args)
    with locking.exclusive(project, "naive build"):
        build(project, Path(sys.executable))
    return 0
