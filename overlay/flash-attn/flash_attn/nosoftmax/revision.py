"""The revision of this patch set, in both wheels. Two wheels work together only with the same revision."""

REVISION = 7
