"""The revision of this patch set: both wheels have it, and two that talk to each other have the same."""

REVISION = 2
