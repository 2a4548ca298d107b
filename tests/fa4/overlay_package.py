"""Import the overlay's modules that need no compiler, without flash_attn.cute, whose __init__ needs it."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
FOLDERS = (
    ROOT / "overlay/flash-attn-4/flash_attn/cute/nosoftmax",
    ROOT / "overlay/flash-attn/flash_attn/nosoftmax",
)
PACKAGE = "fa4_overlay"


def module(name: str) -> ModuleType:
    """Import nosoftmax/<name>.py; a file that both wheels share is imported from its one home."""
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(folder) for folder in FOLDERS]
        sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{name}")
