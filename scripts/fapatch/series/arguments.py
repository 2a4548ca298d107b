"""Compare flash_attn/extension.py of the overlay, which stands for upstream's extension, with the extension's
own parameter lists. An argument that a release adds is then reported here and not in a user's call.
"""

from __future__ import annotations

import ast
import re

from ..base import git
from ..base.errors import FapError
from ..base.project import Project
from ..source.fetch import Base
from . import overlay

API = "csrc/flash_attn/flash_api.cpp"
STAND_IN = "flash_attn/extension.py"
Signatures = dict[str, list[str]]


def of_api(text: str) -> Signatures:
    """Read every function that the extension defines: function -> names of its parameters. Upstream ends some
    names with an underscore, which is left out.
    """
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    found = {}
    for name, function in re.findall(r'\bm\.def\("(\w+)",\s*&(?:\w+::)*(\w+)', code):
        parameters = re.search(rf"\b{function}\(([^;{{}}]*)\)\s*\{{", code)
        listed = re.sub(r"<[^<>]*>", "", parameters[1] if parameters else "").split(",")
        words = (re.findall(r"\w+", parameter.partition("=")[0]) for parameter in listed)
        found[name] = [w[-1].rstrip("_") for w in words if w]
    return found


def of_stand_in(text: str) -> Signatures:
    """Read the table SIGNATURES: function -> names of its parameters. A parameter that some releases lack is
    in brackets. Slashes join the names that one parameter has in different releases.
    """
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SIGNATURES":
            return {name: line.split() for name, line in ast.literal_eval(node.value).items()}
    raise FapError(f"{STAND_IN} has no table SIGNATURES", "git checkout overlay/")


def differences(table: Signatures, api: Signatures) -> list[str]:
    """List a line for each function whose parameters in ``api`` differ from ``table``."""
    found = []
    for name in sorted(table.keys() | api.keys()):
        listed, given = _in_one_wording(table.get(name, []), api.get(name, []))
        known = [n.strip("[]") for n in listed]
        taken = [n.strip("[]") for n in listed if not n.startswith("[") or n.strip("[]") in given]
        if taken == given:
            continue
        added, gone = [n for n in given if n not in known], [n for n in taken if n not in given]
        says = [f"takes {', '.join(added)}"] * bool(added) + [f"lacks {', '.join(gone)}"] * bool(gone)
        found.append(f"{name} {' and '.join(says) or 'has another order: ' + ' '.join(given)}")
    return found


def _in_one_wording(listed: list[str], given: list[str]) -> tuple[list[str], list[str]]:
    """Return both, with every other name of a parameter in ``listed`` replaced by its first name."""
    first: dict[str, str] = {}
    for names in (n.strip("[]").split("/") for n in listed):
        first.update(dict.fromkeys(names, names[0]))
    return [re.sub(r"/[^\]]*", "", n) for n in listed], [first.get(n, n) for n in given]


def check(project: Project, base: Base, files: dict[str, bytes]) -> None:
    """Raise FapError, which names functions and arguments, unless the overlay ``files`` fit the extension of
    ``base``.
    """
    api = dict(git.read_tree(base.commit, lambda path: path == API, repo=project.store)).get(API)
    if api is None or STAND_IN not in files:
        return
    if found := differences(of_stand_in(files[STAND_IN].decode()), of_api(api.decode("utf-8", "replace"))):
        raise FapError(
            f"{API} of {project.release.version} is not what {STAND_IN} stands for: {'; '.join(found)}",
            f"correct SIGNATURES in {overlay.home(project.family, STAND_IN)}; what some releases lack goes "
            "into [brackets], and another name of the same argument behind a slash",
        )
