"""Programs that another interpreter runs. They import nothing of this package."""

from pathlib import Path

HERE = Path(__file__).parent
