"""Ends what ranks leave behind when their supervisor is killed: python reaper.py JSON, with a pipe to it as its stdin.

The kernel ends the ranks themselves then (see `dtrain.launch.signals.lifeline`), but not their DataLoader workers:
those look for their parent every five seconds, and one that hangs never does. The supervisor's temporary folders go,
too: of a notebook's call they hold its data and its code.
"""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time

ALL_IS_WELL = "ended"
_TRIES, _PAUSE_SECONDS = 20, 0.1  # a process that was just killed may still make a file


class Reaper:
    """The supervisor's side.

    Args:
        groups: the process groups to end when this process dies before `dismiss` is called.
        folders: of this user's own, to remove then.
    """

    def __init__(self, groups: list[int], folders: list[str]) -> None:
        from dtrain.launch.signals.stop_request import (
            kept_for_later,  # not at the top, which the script runs without dtrain
        )

        found = [(os.path.abspath(folder), os.lstat(folder).st_ino) for folder in folders]  # noqa: PTH100
        told = json.dumps({"groups": groups, "folders": found})
        with kept_for_later():  # for ever: a scheduler sends them to every process, and this one must outlive the ranks
            self._process = subprocess.Popen(
                [sys.executable, "-IS", __file__, told],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what is sent to the supervisor's group does not reach it
            )

    def dismiss(self) -> None:
        """The supervisor has ended the groups itself."""
        self._log(ALL_IS_WELL)
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError):  # somebody has killed it
            self._process.stdin.write(f"{text}\n".encode())  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]


def main() -> None:
    """Waits for the end of the supervisor: its last word, or the end of the pipe."""
    if sys.stdin.read().strip() == ALL_IS_WELL:
        return
    told = json.loads(sys.argv[1])
    for group in told["groups"]:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    for folder, inode in told["folders"]:
        remove(folder, inode)


def remove(folder: str, inode: int) -> None:
    """Removes a folder, as long as it is the one that was meant; no link is followed."""
    import shutil  # which is seldom needed, and takes as long to load as all else here

    for _ in range(_TRIES):
        try:
            found = os.lstat(folder)
        except OSError:
            return
        if not stat.S_ISDIR(found.st_mode) or found.st_ino != inode or found.st_uid != os.geteuid():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    main()
