"""Whether a run's code is that which its checkpoint was trained with, file by file."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipimport import zipimporter

from dtrain.config import Settings
from dtrain.config.calls import ACCEPT, is_call, way
from dtrain.distributed.world import World
from dtrain.errors import CheckpointError, UsageError, WorldError
from dtrain.layout import CODE
from dtrain.provenance.code import Code, content_hash
from dtrain.provenance.kept import keep, read_kept
from dtrain.provenance.loading import without_header
from dtrain.provenance.opened import opened_files
from dtrain.provenance.trees import first_change
from dtrain.provenance.variables import variable_hashes

logger = logging.getLogger(__name__)

_MOST_NAMED = 5
_SHOWN = 12  # digits of a hash


def code_facts(code: Code, run: Path | None) -> dict[str, Any]:
    """Returns what a checkpoint says of the code; JSON.

    Args:
        code: what was loaded so far.
        run: the run's folder, in which the sources are kept; None for nowhere.
    """
    if code.update() or code.noted is None or code.noted[0] != run:
        kept = None if run is None else keep(run, code.files, code.places)
        variables = variable_hashes(code.files.values(), os.environ)
        code.noted = run, {"name": code.name, "files": code.hashes(), "kept": kept, "variables": variables}
    return code.noted[1]


def code_differences(there: Mapping[str, Any], code: Code, run: Path) -> list[str]:
    """Returns, in words, the files that are not those of a checkpoint; comments and formatting do not count.

    Args:
        there: the checkpoint's manifest.
        code: what was loaded here.
        run: the folder of the checkpoint's run, where copies are.
    """
    if not there.get("code"):
        return _older(there["recipe"], code)
    before: dict[str, str] = there["code"]["files"]
    copy = _copy(there, run)
    differences = []
    for name, wanted in before.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"a checkpoint lists a source {name!r} outside of its run's folder")
        content = code.files.get(name)
        content = _not_loaded(name, code) if content is None else content
        other = _elsewhere(name) if content is None else None
        if other is not None:
            differences.append(f"{name} is gone, and {other} is imported instead")
        if content is not None and content_hash(content) != wanted:
            differences += _changed(name, None if copy is None else read_kept(copy, name, wanted), content)
    return differences + [f"{name} is imported now and was not before" for name in code.files if name not in before]


def _copy(there: Mapping[str, Any], run: Path) -> Path | None:
    """The copy of the code that a checkpoint names; None where there is none."""
    kept = str((there.get("code") or {}).get("kept"))
    copy = run / CODE / kept
    return copy if kept.isdecimal() and copy.is_dir() else None


def _changed(name: str, before: bytes | None, now: bytes) -> list[str]:
    if before is None:
        return [f"{name} has changed (its copy is missing, so comments count, too)"]
    where = first_change(before, now)
    return [f"{name} has changed: {where}"] if where else []


def _not_loaded(name: str, code: Code) -> bytes | None:
    """A file that is imported later than at the start, by a function, say: as it is on the disk."""
    for root in code.roots():
        with contextlib.suppress(OSError, ImportError):
            data = zipimporter(str(root)).get_data(name) if root.is_file() else (root / name).read_bytes()
            return without_header(name, data)
    return None


def _elsewhere(name: str) -> str | None:
    """The file of another module that was imported by a file's name: what is installed, say."""
    module = sys.modules.get(name.rpartition(".")[0].removesuffix("/__init__").replace("/", "."))
    return getattr(module, "__file__", None)


def _older(recipe: Mapping[str, str], code: Code) -> list[str]:
    """The same for a checkpoint that knows the recipe's file alone, by the beginning of its hash."""
    logger.warning(
        "the checkpoint is from an older dtrain, which did not record the recipe's imported modules or the data: these "
        "are not compared"
    )
    if content_hash(code.files.get(code.name, b"")).startswith(recipe["content"]):
        return []
    return [f"the content of {code.name} has changed (comments count, too: its copy is missing)"]


def check_code(there: Mapping[str, Any], code: Code, settings: Settings, run: Path) -> list[str]:
    """Compares the code with that of a checkpoint.

    Returns:
        in words, what differs and was accepted (`checkpoint.accept`).

    Raises:
        UsageError: it differs, and that was not accepted.
    """
    _warn_of_variables((there.get("code") or {}).get("variables", {}), code)
    _warn_of_opened(there.get("opened", {}))
    differences = code_differences(there, code, run)
    if differences and "code" not in settings.config.checkpoint.accept:
        raise _refused(differences, there, settings, run)
    for difference in differences:
        logger.warning("accepted: %s", difference)
    return differences


def _warn_of_variables(before: Mapping[str, str], code: Code) -> None:
    now = variable_hashes(code.files.values(), os.environ)
    other = [name for name, value in now.items() if before.get(name, value) != value]
    if other:
        logger.warning(
            "%s, which the recipe reads from the environment, %s not as it was when the checkpoint was saved. If "
            "results depend on it, restore its value.",
            ", ".join(other),
            "is" if len(other) == 1 else "are",
        )


def _warn_of_opened(before: Mapping[str, str]) -> None:
    other = opened_files.changed(before)
    if other:
        logger.warning(
            "%s%s, which the code opens, %s not what the run was trained with. If results depend on it, restore it.",
            ", ".join(other[:_MOST_NAMED]),
            ", ..." * (len(other) > _MOST_NAMED),
            "is" if len(other) == 1 else "are",
        )


def _refused(differences: list[str], there: Mapping[str, Any], settings: Settings, run: Path) -> UsageError:
    shown = "; ".join(differences[:_MOST_NAMED]) + f"; and {len(differences) - _MOST_NAMED} more" * (
        len(differences) > _MOST_NAMED
    )
    copy = _copy(there, run)
    way_back = "" if copy is None else f"; the original is in {shlex.quote(str(copy))}"
    accept = way(settings, ACCEPT, "code")
    if is_call(settings.config.recipe):
        accept = f"accept the change by {accept}"
    else:
        accept = (
            "accept the change by adding accept=code to the command, or with "
            f"{shlex.join(['dtrain', 'train', '--resume', str(run), 'accept=code'])}"
        )
    return UsageError(
        f"the code is not that of the checkpoint: {shown}. One history must not come from two programs. Restore the "
        f"code{way_back}; or {accept}; or choose another {way(settings, 'run.name')}."
    )


def check_same_code(world: World, code: Code) -> None:
    """Compares what the ranks have loaded, which a shared file system may not give all of them alike.

    Raises:
        WorldError: a file differs; it is named with the ranks, and every rank raises it.
    """
    mine = code.hashes()
    whole = content_hash(repr(mine).encode())
    if len(set(world.gather_json(whole))) == 1:
        return
    told: list[dict[str, str]] = world.gather_json(mine)
    for name in dict.fromkeys(name for one in told for name in one):
        # One rank alone may import something: what draws on rank 0, say.
        having: dict[str, list[int]] = {}
        for rank, one in enumerate(told):
            if name in one:
                having.setdefault(one[name][:_SHOWN], []).append(rank)
        if len(having) > 1:
            which = ", ".join(f"{digest} on rank {', '.join(map(str, r))}" for digest, r in having.items())
            raise WorldError(
                f"{name} was not loaded with the same content on all ranks: {which}. Was it edited while the ranks "
                "started, or does a node see an older copy? Try again once all nodes have the same file.",
                on_all_ranks=True,
            )
