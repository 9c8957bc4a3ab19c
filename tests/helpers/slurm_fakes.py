"""SLURM's commands, played by small programs on PATH: they note what they are given, and answer what a test says."""

from __future__ import annotations

from pathlib import Path

import pytest

_PROGRAM = """#!/bin/sh
pwd -P > '{folder}/{name}.cwd'
cd '{folder}'
(printf '%s' {name}; printf ' %s' "$@"; echo) | sed 's/--Format=.*/--Format/' >> calls.txt
[ -f {name}.hangs ] && exec sleep 60
[ -f {name}.next ] && mv {name}.next squeue.out
[ -f {name}.err ] && {{ cat {name}.err >&2; exit 1; }}
cat {name}.out 2>/dev/null
exit 0
"""


def queue_line(
    identity: str, state: str, *, number: str = "", reason: str = "None", end: str = "N/A", script: str = "/w/a.sbatch"
) -> str:
    """Returns a job as squeue prints it."""
    _, _, task = identity.partition("_")
    fields = (identity, task or "N/A", number or identity.partition("_")[0], state, reason, "29:59", "0", "", end, "0")
    return "\x1f".join([*fields, "name", script, "/w"]) + "\x1f\x1e\n"


class Slurm:
    """SLURM, as far as its commands are.

    Args:
        folder: where they are put.
        monkeypatch: of the test.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        for name in ("squeue", "sacct", "scontrol", "scancel", "sbatch"):
            path = folder / "bin" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_PROGRAM.format(folder=folder, name=name))
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        self.fails("sacct", "Slurm accounting storage is disabled")

    def answers(self, name: str, text: str) -> None:
        """Has a command print a text from now on."""
        (self.folder / f"{name}.err").unlink(missing_ok=True)
        (self.folder / f"{name}.out").write_text(text, encoding="utf-8")

    def fails(self, name: str, words: str) -> None:
        """Has a command fail from now on."""
        (self.folder / f"{name}.err").write_text(words + "\n")

    def changes(self, name: str, queue: str) -> None:
        """Has the next call of a command change what squeue prints."""
        (self.folder / f"{name}.next").write_text(queue)

    def hangs(self, name: str) -> None:
        """Has a command not come to an end from now on."""
        (self.folder / f"{name}.hangs").touch()

    def called_in(self, name: str) -> Path:
        """Returns the folder that a command last ran in."""
        return Path((self.folder / f"{name}.cwd").read_text().rstrip("\n"))

    def calls(self, *names: str) -> list[str]:
        """Returns what these commands were given so far."""
        path = self.folder / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.partition(" ")[0] in names]
