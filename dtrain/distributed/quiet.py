"""Accelerate, imported without the box on progress bars that its import shows in a notebook."""

from __future__ import annotations

import warnings


def import_accelerate() -> None:
    """Imports it: tqdm, which it uses and dtrain does not, would ask for ipywidgets ("IProgress not found")."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        import accelerate  # noqa: F401
