"""Which dtrain this is, and where it lies."""

from pathlib import Path

__version__ = "0.2.0"

PACKAGE = Path(__file__).resolve().parent
RECIPES = PACKAGE / "recipes"  # bundled; a user's own code, as far as messages and stacks go
