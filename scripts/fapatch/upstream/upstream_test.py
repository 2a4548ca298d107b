"""Run upstream's own tests/test_flash_attn.py from the patched tree: a deterministic sample on the CPU, any
part of it on a GPU.

Exit code 0 if every chosen case passed, skipped itself, or failed as listed in
tests/upstream/known_failures.toml; else 1. Every finished case is written to a journal at once. A case that
passed is not run again while the package, the tests and the plugin are the same, so a stopped run resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from ..base import locking
from ..base.errors import FapError, UsageError
from ..base.process import run
from ..base.project import Project
from ..series import apply
from . import report, sample

DEFAULT_COUNT = 336
BATCH = 20_000  # cases in one pytest process: bounds its memory in a full run
CASE_TIMEOUT = 300  # seconds


@dataclass(frozen=True)
class Size:
    """The work of one case of a test function: ``sequences`` = batch * heads, computed ``repeats`` times."""

    sequences: int
    repeats: int = 1


# From upstream's test file. A function that is not listed counts as one pass over 4 sequences of 9 heads.
SIZES = {
    "test_flash_attn_varlen_causal": Size(8 * 9),
    "test_flash_attn_splitkv": Size(12),
    "test_flash_attn_kvcache": Size(2 * 6),
    "test_flash_attn_race_condition": Size(60 * 4, repeats=251),
    "test_flash_attn_deterministic": Size(4 * 9, repeats=51),
    "test_flash_attn_varlen_deterministic": Size(2 * 9, repeats=51),
}
CPU_SCORES = 2_000_000
CPU_SEQLEN = 2048


def costs_too_much(function: str, parameters: Mapping[str, str]) -> bool:
    """Whether a CPU core would take more than a few seconds for this case."""
    length = int(parameters.get("seqlen", 128))
    seqlen_q, seqlen_k = int(parameters.get("seqlen_q", length)), int(parameters.get("seqlen_k", length))
    size = SIZES.get(function, Size(4 * 9))
    return (
        max(seqlen_q, seqlen_k) > CPU_SEQLEN
        or size.repeats * size.sequences * seqlen_q * seqlen_k > CPU_SCORES
    )


def skips_itself(function: str, parameters: Mapping[str, str]) -> bool:
    """Whether upstream's file skips this case in its first lines; a sample full of them would test little."""
    p = {
        **{
            "softcap": "0.0",
            "dropout_p": "0.0",
            "new_kv": "True",
            "rotary_fraction": "0.0",
            "has_leftpad": "False",
        },
        **parameters,
    }
    return (
        float(p["softcap"]) > 0
        and float(p["dropout_p"]) > 0
        or p["new_kv"] == "False"
        and float(p["rotary_fraction"]) > 0
        or p["has_leftpad"] == "True"
        and p.get("paged_kv_block_size", "None") != "None"
    )


SKIPS = sample.Rule(
    "which upstream's file skips itself: softcap with dropout, rotary without new keys, left padding with a "
    "paged cache",
    frozenset({"softcap", "dropout_p", "new_kv", "rotary_fraction", "has_leftpad", "paged_kv_block_size"}),
    skips_itself,
)
COSTS = sample.Rule(
    f"too long for the CPU: a sequence over {CPU_SEQLEN}, or over {CPU_SCORES / 1e6:g} million scores "
    "(repeats * batch * heads * seqlen_q * seqlen_k)",
    frozenset({"seqlen", "seqlen_q", "seqlen_k"}),
    costs_too_much,
)


WITH_SOFTMAX = sample.Rule(
    "with softmax, whose kernels this wheel was built without (NO_SOFTMAX_ONLY)",
    frozenset({sample.SOFTMAX}),
    lambda function, parameters: parameters.get(sample.SOFTMAX, "True") == "True",
)


def _environment(project: Project, threads: int) -> dict[str, str | None]:
    path = os.pathsep.join(
        filter(None, [str(project.root / "tests" / "upstream"), os.environ.get("PYTHONPATH", "")])
    )
    # If one of our tests calls this, the options of its pytest must not reach the new one.
    outer = {name: None for name in os.environ if name.startswith("PYTEST_")}
    return {**outer, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


def fingerprint(package: Path, *others: Path) -> str:
    """Hash (sha256) what a result depends on: the Python files and extensions of ``package``, and
    ``others``.
    """
    digest = hashlib.sha256()
    extensions = sorted(package.parent.glob("flash_attn_2_cuda*.so"))
    for path in [*sorted(package.rglob("*.py")), *extensions, *others]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _jobs(gpus: int) -> int:
    """The number of worker processes: one a core on the CPU, a few on each GPU. The largest reference
    computation takes about 3 GiB.
    """
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30 if hasattr(os, "sysconf") else 8
    return max(1, min(4 * gpus or cores, cores, memory // 3))


def _describe(project: Project, test_file: Path, folder: Path) -> dict:
    """Read the parameters of the test file, the folder of flash_attn, and whether there is a GPU (see
    axes.py).
    """
    axes = project.root / "tests" / "upstream" / "axes.py"
    said = run(
        sys.executable,
        axes,
        test_file,
        cwd=folder,
        env=_environment(project, 1),
        hint="`make wheel` installs flash_attn into .venv; run with .venv/bin/python",
    ).stdout
    return json.loads(said)


def _run_batch(
    project: Project, test_file: Path, folder: Path, batch: list[sample.Case], journal: Path, jobs: int
) -> None:
    plan: dict[str, list[sample.Index]] = {}
    for case in batch:
        plan.setdefault(case.function, []).append(case.index)
    plan_file = folder / f"plan-{os.getpid()}.json"
    plan_file.write_text(json.dumps(plan), encoding="utf-8")
    ini = folder / "pytest.ini"  # an own file, so that pytest reads no other project's configuration
    ini.write_text("[pytest]\n", encoding="utf-8")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    try:
        plugins = [word for name in ("no:cacheprovider", "cpu_as_cuda", "pick") for word in ("-p", name)]
        quiet = ("-q", "--no-header", "--no-summary", f"--junitxml={folder / 'junit.xml'}")
        spread = ("-n", str(jobs), "--dist", "worksteal", f"--timeout={CASE_TIMEOUT}")
        where = ("-c", ini, "--rootdir", folder, "--import-mode=importlib")
        files = ("--pick", plan_file, "--journal", journal, test_file)
        result = run(
            *(sys.executable, "-m", "pytest", *where, *plugins, *quiet, *spread, *files),
            cwd=folder,
            env=_environment(project, threads),
            check=False,
            capture=False,
        )
    finally:
        plan_file.unlink()
    if result.returncode not in (0, 1):  # 1: some tests failed, the journal says which
        raise FapError(
            f"pytest stopped with exit code {result.returncode}",
            "its own message is above; results so far are kept",
        )


def _number(text: str, name: str, kind: type, least: float, most: float, example: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(
            f"{name}={text} is not {what} from {least:g} to {most:g}", f"for example {name}={example}"
        )
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    env = os.environ.get
    parser.add_argument(
        "--count", default=env("COUNT"), help=f"how many cases (default {DEFAULT_COUNT}; environment: COUNT)"
    )
    parser.add_argument(
        "--fraction",
        default=env("FRACTION"),
        help="share of all cases, 0 to 1, in place of a count (FRACTION)",
    )
    parser.add_argument("--seed", default=env("SEED") or "0", help="seed of the sample (default 0; SEED)")
    parser.add_argument(
        "--jobs", default=env("JOBS"), help="worker processes (default: by cores and memory; JOBS)"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        default=env("FULL") == "1",
        help="all cases; on the CPU all cheap ones (FULL=1)",
    )
    parser.add_argument(
        "--summary", type=Path, help="also write the results without the single cases to this JSON file"
    )
    parser.add_argument(
        "--rerun", action="store_true", default=env("RERUN") == "1", help="forget earlier results (RERUN=1)"
    )


def main(project: Project, args: argparse.Namespace) -> int:
    seed = int(_number(args.seed, "SEED", int, 0, 10**9, "1"))
    fraction = (
        1.0
        if args.full
        else _number(args.fraction, "FRACTION", float, 0, 1, "0.001")
        if args.fraction
        else 0.0
    )
    count = (
        None if fraction else int(_number(args.count or str(DEFAULT_COUNT), "COUNT", int, 1, 10**9, "500"))
    )
    folder = project.build / "upstream-test"
    folder.mkdir(parents=True, exist_ok=True)
    with locking.exclusive(project, "upstream-test"):  # not for the whole run: a full run takes hours
        test_file = apply.ensure(project) / "tests" / "test_flash_attn.py"

    if not test_file.is_file():
        raise UsageError(
            f"upstream's {project.family.package} comes without tests",
            "leave FAMILY= out: the default family has them",
        )

    described = _describe(project, test_file, folder)
    on_gpu, package = described["gpus"] > 0, Path(described["package"])
    jobs = int(_number(args.jobs, "JOBS", int, 1, 1024, "2")) if args.jobs else _jobs(described["gpus"])
    functions = {
        name: [sample.Axis(tuple(a["names"]), tuple(a["labels"])) for a in axes]
        for name, axes in described["functions"].items()
    }
    rules = [SKIPS] if on_gpu else [SKIPS, COSTS]
    rules += [] if described["with_softmax"] else [WITH_SOFTMAX]
    chosen = sample.choose(functions, seed, count, fraction, rules)
    plugins = project.root / "tests" / "upstream"
    tested = (package, test_file, plugins / "cpu_as_cuda.py", plugins / "pick.py")
    key = fingerprint(*tested)
    journal = folder / f"journal-{key}.jsonl"
    if args.rerun:
        journal.unlink(missing_ok=True)
    before = report.read_journal(journal)
    todo = [c for c in chosen.cases if c.id not in before or before[c.id].outcome == "failed"]

    where = "GPU" if on_gpu else "CPU"
    print(f"upstream's {test_file.name} on the {where}, flash_attn from {package}")
    print(f"{len(chosen.cases)} of {chosen.eligible} cases, seed {seed}, {jobs} processes")
    for rule, count in chosen.left_out.items():
        print(f"left out: {count} cases {rule}")
    if len(todo) < len(chosen.cases):
        print(
            f"{len(chosen.cases) - len(todo)} finished earlier with this package and these tests, not run "
            "again (RERUN=1 forgets them)"
        )
    sys.stdout.flush()
    for start in range(0, len(todo), BATCH):
        _run_batch(project, test_file, folder, todo[start : start + BATCH], journal, jobs)
    if fingerprint(*tested) != key:
        journal.unlink()  # its results may belong to either version
        raise FapError(
            f"{package} or upstream's tests changed while the tests ran",
            "run this again, without `make wheel` beside it",
        )

    outcome = report.judge(
        chosen.cases,
        report.read_journal(journal),
        report.read_known_failures(plugins / "known_failures.toml"),
    )
    facts = {
        "date": date.today().isoformat(),
        "device": described["device"],
        "flash_attn": described["version"],
        "fingerprint": key,
        "seed": seed,
        "eligible": chosen.eligible,
        "left_out": chosen.left_out,
    }
    document = report.document(chosen.cases, outcome, facts)
    report.write_json(
        folder / "results.json", {**document, "results": [asdict(r) for r in outcome.results.values()]}
    )
    if args.summary:
        report.write_json(args.summary, document)
    print("\n" + report.table(chosen.cases, outcome))
    if text := report.failures(outcome):
        print("\n" + text)
    return 0 if outcome.ok else 1
