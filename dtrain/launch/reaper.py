"""Ends what ranks leave behind when their supervisor is killed: python reaper.py, with process groups on its stdin.

The kernel ends the ranks themselves then (see `dtrain.launch.lifeline`), but not their DataLoader workers: those
look for their parent every five seconds, and one that hangs never does.
"""

import contextlib
import os
import signal
import subprocess
import sys

ALL_IS_WELL = "ended"


class Reaper:
    """The supervisor's side.

    Args:
        groups: the process groups to end when this process dies before `dismiss` is called.
    """

    def __init__(self, groups: list[int]) -> None:
        from dtrain.launch.requests import kept_for_later  # not at the top, which the script runs without dtrain

        with kept_for_later():  # for ever: a scheduler sends them to every process, and this one must outlive the ranks
            self._process = subprocess.Popen(
                [sys.executable, "-IS", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what is sent to the supervisor's group does not reach it
            )
        self._tell("\n".join(map(str, groups)))

    def dismiss(self) -> None:
        """The supervisor has ended the groups itself."""
        self._tell(ALL_IS_WELL)
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError):  # somebody has killed it
            self._process.stdin.write(f"{text}\n".encode())  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]


def main() -> None:
    """Waits for the end of the supervisor: its last word, or the end of the pipe."""
    groups = []
    for line in sys.stdin:
        if line.strip() == ALL_IS_WELL:
            return
        groups.append(int(line))
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
