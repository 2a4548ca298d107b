"""Run every family of CUDA kernels without softmax under compute-sanitizer: memcheck, racecheck, initcheck
and synccheck.

The calls are those of tests/gpu/small_shapes.py. Each pair of tool and head dimension runs in one process.
Its findings are printed when it ends, and kept in a JSON file beside those of other runs. Exit code 0 if no
tool found anything and every result was right.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from ..base.errors import FapError, UsageError
from ..base.process import run
from ..base.project import Project

NEEDS_EXTENSION = True
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
HEAD_DIMS = ("32", "64", "96", "128", "192", "256")
# Parts of the kernel names of CUTLASS, of CuTe, and of nosoftmax/backends/linear/kernels.py.
OURS_ALONE = tuple(
    word
    for name in ("flash", "_walk", "_scan", "_sum_segments")
    for word in ("--kernel-regex", f"kns={name}")
)
# memcheck watches all kernels, and initcheck must see every kernel that writes. The other two are slow and
# watch our kernels alone. Errors of the CUDA API are left to torch and the compiler, which raise those that
# matter: cuda-bindings asks for functions the driver lacks.
OPTIONS = {
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": OURS_ALONE,
    "initcheck": (),
    "synccheck": OURS_ALONE,
}
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)")
CALLS = re.compile(r"^(\d+) calls, (\d+) wrong$", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """The report of one tool on one head dimension: how many errors, in how many calls, and how many wrong
    results.
    """

    tool: str
    head_dim: str
    errors: int
    calls: int
    wrong: int


def parse(tool: str, head_dim: str, output: str) -> Finding:
    """Read a tool's summary. Raises FapError if there is none, because the run ended early."""
    summary, calls = SUMMARY.search(output), CALLS.search(output)
    if not (summary and calls):
        last = "\n".join(output.splitlines()[-15:])
        raise FapError(
            f"{tool} at head dimension {head_dim} ended without a summary:\n{last}",
            "run tests/gpu/small_shapes.py without it",
        )
    return Finding(tool, head_dim, int(summary[1] or summary[2]), int(calls[1]), int(calls[2]))


def backends(tool: str, head_dim: str) -> tuple[str, ...]:
    """Choose the backends of small_shapes.py whose kernels ``tool`` can judge.

    FA4 is left out for initcheck, which does not follow TMA, by which FA4's kernels write their results. It
    is also left out for synccheck at head sizes 65 to 96: there two whole warp groups of upstream's backward
    reach a barrier in two branches, and synccheck calls it divergent.
    """
    without_fa4 = tool == "initcheck" or (tool, head_dim) == ("synccheck", "96")
    return ("fa2", "linear") if without_fa4 else ("fa2", "linear", "fa4")


def watch(
    project: Project, sanitizer: str, tool: str, head_dim: str, dtypes: list[str], log: Path
) -> Finding:
    done = run(
        sanitizer,
        "--tool",
        tool,
        *OPTIONS[tool],
        sys.executable,
        project.root / "tests" / "gpu" / "small_shapes.py",
        "--head-dims",
        head_dim,
        "--dtypes",
        *dtypes,
        "--backends",
        *backends(tool, head_dim),
        env={
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"
        },  # an allocation for each tensor, whose bounds memcheck can watch
        check=False,
    )
    output = (done.stdout + done.stderr).decode("utf-8", "replace")
    log.write_text(output, encoding="utf-8")
    return parse(tool, head_dim, output)


def keep(path: Path, finding: dict) -> None:
    """Add ``finding`` to the JSON list at ``path``, replacing an earlier one of the same tool and head
    dimension.
    """

    def place(f: dict) -> tuple[int, int]:
        return TOOLS.index(f["tool"]), HEAD_DIMS.index(f["head_dim"])

    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    findings = [f for f in earlier if place(f) != place(finding)] + [finding]
    path.write_text(json.dumps(sorted(findings, key=place), indent=1) + "\n", encoding="utf-8")


def chosen(text: str, choices: tuple[str, ...], option: str) -> list[str]:
    items = text.split(",")
    if unknown := [item for item in items if item not in choices]:
        raise UsageError(f"{option} {text}: {', '.join(unknown)} is not among {', '.join(choices)}")
    return items


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tools", default=",".join(TOOLS), help="default: %(default)s")
    parser.add_argument("--head-dims", default=",".join(HEAD_DIMS), help="default: %(default)s")
    parser.add_argument("--dtypes", default="fp16,bf16", help="default: %(default)s")
    parser.add_argument(
        "--jobs", type=int, default=6, help="processes at once on the GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=Path, help="also keep the findings in this file, beside those of earlier runs"
    )


def main(project: Project, args: argparse.Namespace) -> int:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise FapError(
            "compute-sanitizer is not on the PATH", "it comes with the CUDA toolkit, in its bin folder"
        )
    tools, head_dims = chosen(args.tools, TOOLS, "--tools"), chosen(args.head_dims, HEAD_DIMS, "--head-dims")
    dtypes = chosen(args.dtypes, ("fp16", "bf16"), "--dtypes")
    device = (
        run(
            sys.executable,
            "-c",
            "import torch; print(torch.cuda.get_device_name())",
            hint="the sanitizers need a GPU",
        )
        .stdout.decode()
        .strip()
    )
    folder = project.build / "sanitize"
    folder.mkdir(parents=True, exist_ok=True)
    findings: list[Finding] = []
    ended_early = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [
            pool.submit(watch, project, sanitizer, tool, head_dim, dtypes, folder / f"{tool}-{head_dim}.log")
            for tool in tools
            for head_dim in head_dims
        ]
        for done in as_completed(runs):
            try:
                finding = done.result()
            except FapError as error:  # the other processes go on, and their findings are kept
                ended_early += 1
                print(f"error: {error}", flush=True)
                continue
            findings.append(finding)
            print(
                f"{finding.tool:<10} head dimension {finding.head_dim:>3}: {finding.calls} calls, "
                f"{finding.errors} errors, {finding.wrong} wrong results",
                flush=True,
            )
            if args.json:
                keep(
                    args.json,
                    {**asdict(finding), "dtypes": dtypes, "device": device, "date": date.today().isoformat()},
                )
    bad = sum(1 for f in findings if f.errors or f.wrong)
    said = [f"{bad} of {len(findings)} runs found something"] * bool(bad) + [
        f"{ended_early} ended early"
    ] * bool(ended_early)
    print(
        f"{device}: {sum(f.calls for f in findings)} calls under {len(tools)} tools, "
        + (f"{', '.join(said)}: see {folder.relative_to(project.root)}" if said else "nothing found")
    )
    return 1 if said else 0
