"""Keep what an example measures in a JSON file, row by row, so that a run which was ended goes on.

Several processes may fill one file, each its share of the rows: `--share 1/2` beside `--share 2/2`. Files
that were filled on several machines are merged by

    python examples/record.py merged.json part1.json part2.json
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

VARY = ("date", "seconds", "rows")  # may differ between the runs of one record


class Record:
    """A JSON file of `about`, which all its rows share, and "rows". fresh: begin anew."""

    def __init__(self, path: Path, about: dict, fresh: bool = False) -> None:
        self.path, self.about = path, json.loads(json.dumps(about))
        if fresh:
            path.unlink(missing_ok=True)
        self.rows()

    def rows(self) -> list[dict]:
        """Return what is in the file. Raises SystemExit if its rows were measured otherwise."""
        if not self.path.exists():
            return []
        found = json.loads(self.path.read_text(encoding="utf-8"))
        differ = [
            f"{name} {found.get(name)!r} there, {self.about.get(name)!r} here"
            for name in sorted((found.keys() | self.about.keys()) - set(VARY))
            if found.get(name) != self.about.get(name)
        ]
        if differ:
            raise SystemExit(
                f"{self.path} is of another run: {'; '.join(differ)}. Give another --json, or --fresh"
            )
        return found["rows"]

    def add(self, *rows: dict) -> None:
        """Add rows to those that are in the file now, while no other process does."""
        with _alone(self.path):
            text = json.dumps({**self.about, "rows": [*self.rows(), *rows]}, indent=1) + "\n"
            beside = self.path.with_suffix(".new")
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, self.path)

    def missing(self, wanted: Iterable[dict]) -> list[dict]:
        """Return the cases of `wanted` that no row has."""
        rows = self.rows()
        return [case for case in wanted if not any(row.items() >= case.items() for row in rows)]

    def fill(
        self, wanted: Iterable[dict], args: argparse.Namespace, measure: Callable[..., dict]
    ) -> Iterator:
        """Add a row for each missing case of this process's share until the time is up, and yield it.
        measure(**case) returns the rest of the row.
        """
        number, count = args.share
        share, began = self.missing(list(wanted)[number - 1 :: count]), time.monotonic()
        for place, case in enumerate(share, 1):
            if time.monotonic() - began > args.seconds:
                print(
                    f"the time is up, {len(share) - place + 1} are left: the same command goes on", flush=True
                )
                return
            row = {**case, **measure(**case)}
            self.add(row)
            print(f"{time.monotonic() - began:5.0f} s  {place}/{len(share)}", end="  ")
            yield row


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _share(text: str) -> tuple[int, int]:
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise ValueError
    return number, count


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run that fills a record."""
    parser.add_argument("--json", type=Path, help="the record; the same command goes on with it")
    parser.add_argument("--fresh", action="store_true", help="begin the record anew")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start nothing new after this time"
    )
    parser.add_argument(
        "--share",
        type=_share,
        default=(1, 1),
        metavar="I/N",
        help="part I of N of the work, for a process of its own",
    )


def merge(target: Path, parts: Iterable[Path]) -> None:
    """Add the rows of `parts` that `target` lacks, to one made anew if it is not there."""
    for part in parts:
        about = json.loads(part.read_text(encoding="utf-8"))
        rows, record = about.pop("rows"), Record(target, about)
        there = record.rows()
        record.add(*(row for row in rows if row not in there))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("merged", type=Path)
    parser.add_argument("parts", type=Path, nargs="+")
    args = parser.parse_args()
    merge(args.merged, args.parts)


if __name__ == "__main__":
    main()
