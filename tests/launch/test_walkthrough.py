"""The walkthrough's three styles as its page has them: run, killed with SIGKILL, resumed bitwise, loaded and used."""

from __future__ import annotations

import shlex
import subprocess
import time
from pathlib import Path

import pytest
from helpers.commands import Dtrain, clean_environment, popen
from helpers.pages import ROOT, Block, blocks, files_of, said
from helpers.sweep import some

PAGE = ROOT / "docs/walkthrough.md"
STYLES = {"script": 0, "function": 1, "keras": 2}  # the runs' names, in the page's order
_KILL = ["timeout", "-s", "KILL"]
_MEASURED = ["seconds", "samples_per_second"]


def killed(dtrain: Dtrain, argv: list[str], run: Path) -> None:
    """Starts a command and kills it once its run has some checkpoints; it must not have ended by itself."""
    process = popen(
        argv, cwd=dtrain.folder, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 250
        while len(list((run / "checkpoints").glob("epoch-*"))) < 2:
            assert process.poll() is None, f"{argv} ended by itself"
            assert time.monotonic() < until, "no checkpoint"
            time.sleep(0.005)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(60)
    assert process.returncode == -9


@pytest.mark.timeout(900)
@pytest.mark.parametrize("style", some(["function"], ["script", "keras"]))
def test_a_style_is_killed_resumed_and_used(dtrain: Dtrain, style: str) -> None:
    for name, text in files_of(PAGE).items():
        (dtrain.folder / name).write_text(text)
    block: Block = blocks(PAGE, "console")[STYLES[style]]
    run = dtrain.folder / "runs" / style
    for command, lines in block.commands:
        words = shlex.split(command)
        if words[:3] == _KILL:
            killed(dtrain, words[4:], run)
            continue
        done = dtrain.run(*words, timeout=250)
        assert done.code == 0, done.text
        differs = said(lines).differs(done.text)
        assert not differs, f"{block}: {command}: {differs}\n{done.text}"
    kept = dtrain.folder / "killed.csv"
    (run / "history.csv").rename(kept)
    run.rename(dtrain.folder / "killed")
    whole = dtrain.run(*shlex.split(block.commands[1][0]), timeout=250)
    assert whole.code == 0, whole.text
    assert numbers(kept) == numbers(run / "history.csv"), "as if it had not been killed"


def numbers(file: Path) -> list[dict[str, str]]:
    import csv

    with file.open(newline="") as opened:
        return [{name: cell for name, cell in row.items() if name not in _MEASURED} for row in csv.DictReader(opened)]
