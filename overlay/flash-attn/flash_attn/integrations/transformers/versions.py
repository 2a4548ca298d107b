"""Say which transformers are supported, in one error."""

from types import ModuleType

OLDEST = (4, 57)
NEEDED = "4.57"  # the oldest that `make test-transformers` runs


def require() -> ModuleType:
    """Import transformers. Raises ImportError if it is missing or too old, with the version that is
    needed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(_message(f"it can't be imported: {error}")) from error
    if _release(transformers.__version__) < OLDEST:
        raise ImportError(_message(f"this is {transformers.__version__}"))
    return transformers


def _release(version: str) -> tuple:
    """Return (major, minor) of a version such as 5.24.0.dev0."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _message(why: str) -> str:
    return (
        f"flash_attn.integrations.transformers needs transformers {NEEDED} or newer, and {why}: "
        f'pip install "transformers>={NEEDED}"'
    )
