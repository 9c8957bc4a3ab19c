"""Which tests run side by side."""

from __future__ import annotations

from helpers.parallel import group, next_group

FILES = [
    *("page/test_page.py", "slurm/test_ending.py", "slurm/test_starts.py", "faults/test_fault_sweep.py"),
    *("faults/test_stop.py", "launch/test_train.py", "unit/test_lock.py", "unit/test_help.py", "ranks/test_exact.py"),
]


def dealt(few_cores: bool, turns: list[int]) -> list[tuple[int, str]]:
    """Which process runs what, where they come for it in these turns."""
    waiting = list(dict.fromkeys(map(group, FILES)))
    found = []
    for number in turns:
        found.append((number, next_group(waiting, number, few_cores)))
        waiting.remove(found[-1][1])
    assert waiting == []
    return found


def test_on_few_cores_one_process_computes_and_the_other_waits() -> None:
    assert dealt(True, [0, 1, 0, 1, 0, 1, 0]) == [
        (0, "page"), (1, "faults/test_stop.py"), (0, "machine"), (1, "launch/test_train.py"),
        (0, "unit/test_lock.py"), (1, "ranks/test_exact.py"), (0, "unit/test_help.py"),
    ]  # fmt: skip


def test_whoever_is_done_helps_the_other() -> None:
    assert dealt(True, [0] * 7)[4:] == [
        (0, "ranks/test_exact.py"),
        (0, "launch/test_train.py"),
        (0, "faults/test_stop.py"),
    ]
    assert [name for _, name in dealt(True, [1] * 7)][3:] == [
        "page",
        "machine",
        "unit/test_lock.py",
        "unit/test_help.py",
    ]


def test_on_many_cores_each_takes_the_next() -> None:
    assert [name for _, name in dealt(False, [0, 1, 2, 3, 3, 2, 1])] == list(dict.fromkeys(map(group, FILES)))
