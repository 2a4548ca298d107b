"""Tools that maintain the patch set: fetch upstream, apply, refresh, rebase, lint, build, test. See `fap.py
--help`.

FLOORS orders the subpackages from the lowest floor to the highest. A module imports from its own subpackage
and from lower floors, never from a higher floor or another subpackage of its floor. tests/unit/test_layout.py
checks that.
"""

FLOORS = (
    ("workers",),  # programs that another interpreter runs
    ("base",),  # processes, files, git, the lock and the environment
    ("source",),  # fetch, verify and store upstream's files
    ("series",),  # make, export, rebase and lint the patched tree
    ("wheel",),  # build, check and smoke-test the wheel
    # checks that need a compiler; upstream's own tests; tests with other packages
    ("kernels", "upstream", "integrations"),
)
