"""What the pages of results share: a record in docs/results/, its tables beside it, its plot in docs/."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write(
    description: str,
    name: str,
    markdown: Callable[[dict], str],
    draw: Callable[[dict, Path], None],
    argv: list[str] | None,
) -> int:
    """The command line of a page: read --json, by default docs/results/<name>.json, and write its .md beside
    it and docs/<its name>.png.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results" / f"{name}.json")
    args = parser.parse_args(argv)
    record = json.loads(args.json.read_text(encoding="utf-8"))
    args.json.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    draw(record, ROOT / "docs" / args.json.with_suffix(".png").name)
    return 0
