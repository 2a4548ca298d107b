"""Tools that keep the patch set: fetch upstream, apply, refresh, rebase, lint, build, test. See `fap.py
--help`.

FLOORS is the order of the rooms. A module imports from its own room and from the floors below it, never from
a floor above and never from another room of its own floor; tests/unit/test_layout.py holds that.
"""

FLOORS = (
    ("workers",),  # programs that another interpreter runs
    ("base",),  # processes, files, git, the lock and the environment
    ("source",),  # upstream's files: fetched, verified and stored
    ("series",),  # the patched tree: made, exported, carried to other releases and linted
    ("wheel",),  # the wheel: built, checked and shown to work
    ("kernels", "upstream"),  # what is checked with a compiler; upstream's own tests
)
