"""Test that a sample of upstream's own tests passes on the installed wheel, with softmax and without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEAST = 300


def test_upstream_sample():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "fap.py", "upstream-test"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((ROOT / "build" / "upstream-test" / "results.json").read_text(encoding="utf-8"))
    total = results["total"]
    assert results["failed"] == [] and results["not_finished"] == []
    assert total["True"]["ran"] + total["False"]["ran"] >= LEAST
    assert min(total["True"]["ran"], total["False"]["ran"]) >= LEAST // 3
