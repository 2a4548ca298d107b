"""Test that the revision at run time is that in the wheels' names."""

from __future__ import annotations

import runpy

from fapatch.base.project import Project


def test_both_wheels_have_the_revision_that_the_package_says():
    project = Project.open()
    said = runpy.run_path(str(project.root / "overlay/flash-attn/flash_attn/nosoftmax/revision.py"))[
        "REVISION"
    ]
    families = project.lock.families
    assert {family.name: family.revision for family in families} == {family.name: said for family in families}
