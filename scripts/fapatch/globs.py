"""Path patterns of the lock: `*` within a folder, `**` over folders. (Path.full_match does this from Python
3.13 on.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache


@lru_cache(maxsize=None)
def _regex(pattern: str) -> re.Pattern[str]:
    parts = {"**/": r"(?:[^/]+/)*", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return re.compile(
        "".join(parts.get(piece) or re.escape(piece) for piece in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))
    )


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether any of ``patterns`` stands for the whole of ``path``."""
    return any(_regex(p).fullmatch(path) for p in patterns)
