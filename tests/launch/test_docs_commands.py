"""The pages' commands are run, in an empty folder with the pages' own files, and print what the pages say."""

from __future__ import annotations

import shlex

import pytest
from helpers import terminals
from helpers.commands import BIN, Dtrain
from helpers.pages import CHINESE, PAGES, Block, blocks, files_of, said
from helpers.sweep import FULL
from helpers.terminals import on_terminal

_WIDTH = 130
_PATIENCE = 250.0


def _is_run(block: Block) -> bool:
    return block.mark.startswith("run") and (FULL or "full sweep" not in block.mark)


# Each list is run in one folder, in its order: later commands go on with earlier runs.
RUN = {page.name: [b for b in blocks(page, "console") if _is_run(b)] for page in PAGES if page not in CHINESE}
RUN = {name: found for name, found in RUN.items() if found and name != "README.zh-CN.md"}  # as docs/zh: the same blocks


@pytest.mark.timeout(1800 if FULL else 300)
@pytest.mark.parametrize("page", sorted(RUN))
def test_the_commands_of_a_page_print_what_it_says(page: str, dtrain: Dtrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminals, "PATIENCE", _PATIENCE)
    for name, text in files_of(RUN[page][0].page).items():
        (dtrain.folder / name).write_text(text)
    for block in RUN[page]:
        for command, lines in block.commands:
            _check(block, command, lines, _output(dtrain, block, command, lines))


def _output(dtrain: Dtrain, block: Block, command: str, lines: list[str]) -> str:
    program, *words = shlex.split(command)
    argv = [BIN / program, *words]
    if "terminal" not in block.mark:
        done = dtrain.run(*argv, timeout=_PATIENCE)
        assert done.code == _code(lines), f"{block}: {command}\n{done.text}"
        return done.text
    with on_terminal(argv, dtrain.folder, columns=_WIDTH, rows=100) as (process, terminal):
        terminal.to_the_end()
        assert process.wait(60) == _code(lines), f"{block}: {command}\n{terminal.text}"
        return terminal.text


def _code(lines: list[str]) -> int:
    """The exit code that goes with what a page shows."""
    if any(line.startswith("dtrain: error: ") for line in lines):
        return 2
    return int(any(line.startswith("different: ") for line in lines))


def _check(block: Block, command: str, lines: list[str], output: str) -> None:
    if "any order" in block.mark:
        assert sorted(output.splitlines()) == sorted(lines), f"{block}: {command}"
        return
    if not lines:
        return
    differs = said(lines).differs(output)
    assert not differs, "\n".join([f"{block}: {command}: {differs}", "--- the page", *lines, "--- it printed", output])


def test_every_page_with_files_runs_something_with_them() -> None:
    for page in PAGES:
        words = " ".join(command for block in blocks(page, "console") for command, _ in block.commands)
        texts = files_of(page)
        for name in texts:
            imported = any(f"from {name.removesuffix('.py')} import" in text for text in texts.values())
            assert imported or name in words, f"{page.name}: {name}"


def test_what_differs_is_found() -> None:
    """The comparison itself: numbers that are measured vary, words and whole numbers do not."""
    page = said(["epoch 1  loss 0.543  0.9s", "...", "run: runs/digits-20261123-182301"])
    like = "epoch 1  loss 0.541  1.75s\nmore\nrun: runs/digits-20270101-000000\n"
    assert not page.differs(like)
    assert not page.differs(like.replace("more\n", ""))
    for one, other in (("epoch 1", "epoch 2"), ("digits", "other"), ("0.541", "0.741"), ("loss ", "")):
        assert page.differs(like.replace(one, other))
    assert not said(["at ... of 3"]).differs("at 1, 2 of 3")
    assert said(["at ... of 3"]).differs("at 1, 2 of 4")
