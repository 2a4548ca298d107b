"""Tools that keep the patch set: fetch upstream, apply, refresh, rebase, lint, build, test. See `fap.py
--help`.
"""
