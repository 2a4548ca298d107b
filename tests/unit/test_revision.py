"""The revision that users read at run time is that of the wheels' names."""

from __future__ import annotations

import runpy

from fapatch.project import ROOT, Project


def test_both_wheels_have_the_revision_that_the_package_says():
    said = runpy.run_path(str(ROOT / "overlay/flash-attn/flash_attn/nosoftmax/revision.py"))["REVISION"]
    families = Project.open().lock.families
    assert {family.name: family.revision for family in families} == {family.name: said for family in families}
