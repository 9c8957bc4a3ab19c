"""The tests' own SLURM: several at once, each in a world of its own, of which nothing is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from helpers.cluster import Plan, cluster, missing, need
from helpers.commands import clean_environment
from helpers.running import wait_for

HOLDER = """
import sys
sys.path.insert(0, {tests!r})
from helpers.cluster import Plan, cluster
with cluster(Plan(nodes=2)) as made:
    made.sbatch("--nodes=2", "--output=none", "--wrap=srun sleep 600", cwd=made.base)
    made.cut("n2")
    print(made.base, flush=True)
    sys.stdin.read()
"""


def of_cluster(base: Path) -> list[str]:
    """The processes that name a cluster's folder, in their command line or environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if str(base).encode() in text and folder.name != str(os.getpid()):
            found.append(text.replace(b"\0", b" ").decode(errors="replace")[:200])
    return found


def test_two_at_once_and_nothing_is_left_even_of_one_that_is_killed(tmp_path: Path) -> None:
    need(missing())
    links, mounts = Path("/proc/net/dev").read_text().count(":"), Path("/proc/self/mounts").read_text()
    script = HOLDER.format(tests=str(Path(__file__).parents[1]))
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        assert theirs.is_dir()
        with cluster(Plan(nodes=2)) as mine:
            assert mine.base != theirs and of_cluster(theirs)
            job = mine.sbatch("--nodes=2", "--wrap=srun hostname", cwd=tmp_path)
            assert sorted(mine.wait(job, "COMPLETED").text.split()) == ["n1", "n2"]
            other.send_signal(signal.SIGKILL)
            other.wait()
            wait_for(lambda: not of_cluster(theirs), f"all of a cluster to end: {of_cluster(theirs)}", 20)
            shutil.rmtree(theirs)
            mine.power_off("n2")
            assert of_cluster(mine.base)
            mine.clear()
            assert mine.on("n2", "hostname", cwd=tmp_path).out == "n2\n"
    assert not mine.base.exists()
    assert of_cluster(mine.base) == []
    assert Path("/proc/net/dev").read_text().count(":") == links
    assert Path("/proc/self/mounts").read_text() == mounts
