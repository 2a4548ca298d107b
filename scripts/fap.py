#!/usr/bin/env python3
"""Keep and build the patch set: `fap.py COMMAND --help` explains each command, and the Makefile calls them.

VERSION, FAMILY, SOURCE, FA_SRC_DIR and FORCE in the environment choose the upstream release and its source.
Exit codes: 0 done, 1 failed or out of date, 2 wrong usage or a tree in the middle of something, 130
interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

from fapatch.base import locking
from fapatch.base.errors import FapError, UsageError
from fapatch.base.project import Project
from fapatch.source import store

# command: (module of fapatch, one line of help). The module has add_arguments(parser) and main(project, args)
# -> int. EXCLUSIVE = True in it keeps other runs out of the checkout. ANY_RELEASE = True ignores VERSION.
# NEEDS_EXTENSION = True refuses a family without compiled kernels. A module is imported when its command is
# run, because `env` must run before any package is installed.
COMMANDS = {
    "env": ("base.env", "make .venv, the project's own Python environment"),
    "lock-tools": ("base.lock_tools", "renew requirements.lock, the versions and hashes of .venv's packages"),
    "fetch": ("source.fetch", "bring upstream's source into .cache, verified"),
    "apply": ("series.apply", "make the patched tree in build/src"),
    "status": ("series.status", "say whether the patched tree is up to date, and if not, why"),
    "refresh": ("series.refresh", "export the commits of the patched tree to patches/ and overlay/"),
    "rebase": ("series.rebase", "carry the series to another release"),
    "bundle": ("series.bundle", "write one patch for plain `git apply` into dist/"),
    "lock": ("series.lock_edit", "add a release to upstream.toml"),
    "lint": ("series.lint", "check patches, headers and the lock"),
    "toolchain": ("kernels.toolchain", "install the kernels' compiler from the package index into .venv"),
    "wheel": ("wheel.wheel", "build the wheel into dist/ and install it into .venv"),
    "smoke": ("wheel.smoke", "run one forward and backward without softmax and check them against float64"),
    "sass-identity": (
        "kernels.sass_identity",
        "compare the machine code of upstream's kernels, pristine against patched",
    ),
    "compile-check": (
        "kernels.compile_check",
        "compile the kernels of flash-attn-4 for Hopper without a GPU and check their machine code",
    ),
    "upstream-test": ("upstream.upstream_test", "run a sample of upstream's own tests"),
    "test-transformers": (
        "integrations.transformers_test",
        "run tests/integrations with each transformers that is supported",
    ),
    "sanitize": ("kernels.sanitize", "run every kernel family under compute-sanitizer"),
    "clean": ("series.clean", "delete build/"),
    "distclean": ("series.clean", "delete everything that git ignores"),
}


def make_parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fap.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show every program that is started")
    parser.add_argument("--root", type=Path, help="another checkout of this repository")
    parser.add_argument("--family", help="upstream package (default: FAMILY, else the lock's default)")
    parser.add_argument("--release", help="upstream release (default: VERSION, else the family's default)")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((a for a in argv if a in COMMANDS), None)
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name == asked:
            chosen = importlib.import_module(f"fapatch.{module}")
            sub.description = chosen.__doc__
            sub.formatter_class = argparse.RawDescriptionHelpFormatter
            chosen.add_arguments(sub)
            sub.set_defaults(module=chosen)
    return parser


def run(argv: list[str]) -> int:
    args = make_parser(argv).parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.WARNING, format="%(message)s")
    if getattr(args.module, "ANY_RELEASE", False):
        os.environ.pop("VERSION", None)
    project = Project.open(args.root, args.family, args.release)
    if getattr(args.module, "NEEDS_EXTENSION", False) and not project.family.extension:
        raise UsageError(
            f"{args.command} is about a compiled extension, and FAMILY={project.family.name} is Python alone",
            f"leave FAMILY= out: {project.lock.default_family} is the default",
        )
    alone = getattr(args.module, "EXCLUSIVE", False)
    with locking.exclusive(project, args.command) if alone else nullcontext():
        store.own(project)
        return args.module.main(project, args)


def explain(error: OSError) -> FapError:
    """Turn an error of the operating system into a FapError with a hint."""
    where = error.filename or "the disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FapError(f"no space left for {where}", "free some space and run this again; nothing was lost")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FapError(
            f"{where} cannot be written or read: {error.strerror}",
            "check its owner and permissions, and run this again",
        )
    return FapError(f"{where}: {error.strerror or error}", "mend that and run this again")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    # Treat `kill` like Ctrl-C, so that half-made files are removed on the way out.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except FapError as e:
        error = e
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:
        error = explain(e)
    except ModuleNotFoundError as e:
        error = FapError(
            f"{e.name} is not installed for {sys.executable}",
            "make env, then .venv/bin/python scripts/fap.py",
        )
    except KeyboardInterrupt:
        print("interrupted  ->  nothing was lost; run the same command again", file=sys.stderr)
        return 130
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
