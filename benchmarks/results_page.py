"""Write a page of results: tables beside the record in docs/results/, a plot in docs/, and a section of
docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def with_section(page: str, name: str, text: str) -> str:
    """Return ``page`` with ``text`` between the marks of the record ``name``; unchanged if it has no
    marks.
    """
    start, end = f"<!-- from results/{name}.json -->\n", "\n<!-- end -->"
    before, found, after = page.partition(start)
    return before + start + text.rstrip("\n") + end + after.partition(end)[2] if found else page


def summarize(record: Path, text: str) -> None:
    """Write the section of ``record``, a file of docs/results/, in docs/speed.md."""
    page = record.resolve().parents[1] / "speed.md"
    if page.is_file():
        page.write_text(with_section(page.read_text(encoding="utf-8"), record.stem, text), encoding="utf-8")


def write(
    description: str,
    name: str,
    markdown: Callable[[dict], str],
    summary: Callable[[dict], str],
    draw: Callable[[dict, Path], None],
    argv: list[str] | None,
) -> int:
    """Run the command line of a page: read --json, by default docs/results/<name>.json, and write its .md
    beside it, its section of docs/speed.md and docs/<its name>.png.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results" / f"{name}.json")
    args = parser.parse_args(argv)
    record = json.loads(args.json.read_text(encoding="utf-8"))
    args.json.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    summarize(args.json, summary(record))
    draw(record, ROOT / "docs" / args.json.with_suffix(".png").name)
    return 0
