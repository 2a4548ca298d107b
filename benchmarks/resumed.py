"""Collect the rows of a benchmark, so that a run that was stopped goes on where it was.

Each row goes to a JSON file and into the page beside it at once. A later run measures what is missing there,
if the file is of the same device and versions.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

_SAME = ("device", "torch", "packages")


def options(doc: str) -> argparse.ArgumentParser:
    """Return the command line that these benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0, help="start nothing new after this time")
    parser.add_argument(
        "--json", type=Path, help="write the rows here, and a page with the ending .md beside it"
    )
    return parser


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def started(path: Path | None, packages: Iterable[str]) -> dict:
    """Return the record in `path` if it is of this device and these versions, else a new one."""
    record = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in packages},
        "rows": [],
    }
    if path is not None and path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if all(earlier.get(name) == record[name] for name in _SAME):
            return earlier
    return record


def collect(
    record: dict,
    args: argparse.Namespace,
    wanted: Iterable[dict],
    measure: Callable[..., dict],
    page: Callable[[dict], str],
) -> None:
    """Measure each case in `wanted` that the record lacks. measure(**case) returns the rest of its row. A
    case that fails has "ms": None and the reason.
    """
    deadline = time.monotonic() + args.seconds
    for case in wanted:
        if any(all(row.get(name) == x for name, x in case.items()) for row in record["rows"]):
            continue
        if time.monotonic() > deadline:
            print("the time is up: the same command goes on from here", flush=True)
            return
        try:
            found = measure(**case)
        except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[0][:160]
            found = {"ms": None, "why_not": f"{type(error).__name__}: {reason}"}
            torch.cuda.empty_cache()
        record["rows"].append({**case, **found})
        print(*case.values(), found, flush=True)
        write(record, args.json, page)


def write(record: dict, path: Path | None, page: Callable[[dict], str]) -> None:
    """Write the record and its page, if there is a path."""
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(page(record), encoding="utf-8")
