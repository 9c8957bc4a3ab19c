"""Versions of dtrain and of what it needs, read from the installed packages without importing them."""

from __future__ import annotations

import platform
from importlib import metadata

from dtrain import __version__
from dtrain.launch.env.fingerprint import code_hash
from dtrain.tools.doctor.finding import Finding, passed

NAME = "versions"
SHOWN = ("torch", "accelerate")


def versions() -> dict[str, str]:
    """Returns what must be the same on all nodes: name -> version; "missing" for what is not installed."""
    found = {"python": platform.python_version(), "dtrain": f"{__version__}, code {code_hash()}"}
    return found | {name: _installed(name) or "missing" for name in SHOWN}


def check_versions() -> Finding:
    """Compares the installed packages with what dtrain asks for."""
    words = ", ".join(f"{name} {version}" for name, version in versions().items())
    missing: list[str] = []
    unfit: list[str] = []
    for name, wanted, installed in unmet():
        (unfit if installed else missing).append(f"{name}{wanted}" + (f" (is {installed})" if installed else ""))
    if missing:
        return Finding(NAME, "fail", f"{words}; missing: {', '.join(missing)}", f"pip install '{missing[0]}'")
    if unfit:
        words = f"{words}; outside the tested range: {', '.join(unfit)}"
        return Finding(NAME, "warn", words, f"pip install '{unfit[0].partition(' ')[0]}'")
    return passed(NAME, words)


def unmet() -> list[tuple[str, str, str]]:
    """Returns dtrain's own requirements that do not hold: name, range, installed version or ""."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("dtrain") or []]
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return []
    found = []
    for one in wanted:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        installed = _installed(one.name)
        if installed is None or not one.specifier.contains(installed, prereleases=True):
            found.append((one.name, str(one.specifier), installed or ""))
    return found


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
