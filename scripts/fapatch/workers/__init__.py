"""Scripts that another interpreter runs. They import nothing from this package."""

from pathlib import Path

HERE = Path(__file__).parent
