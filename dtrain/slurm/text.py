"""The batch script of a run, as text: a pure function of what was asked for.

The last lines are the same as in `slurm/train.sbatch` and `slurm/train_per_rank.sbatch`, which are for use by hand.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import UsageError
from dtrain.layout import SLURM
from dtrain.slurm.request import JobRequest

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_COMMENT_COLUMN = 42
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", "'": "\\'"}

_BEFORE_ALL = """\
# Not `python -m dtrain`, with which Python looks for each module in the present folder first: a random.py or types.py
# beside a recipe would take the place of its own.
dtrain=(-c 'import sys; sys.path[:1] = filter(None, sys.path[:1]); from dtrain.cli import main; main()')

# Since SLURM 22.05 srun does not inherit --cpus-per-task from the job.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# This shell becomes `dtrain slurm-job`, which runs srun. On SIGUSR1 it asks the ranks to save and stop, and requeues
# the job, unless the run is complete, was stopped for good, failed by itself, or makes no progress.
"""

PER_NODE_END = f"""\
{_BEFORE_ALL}\
# The launchers terminate all ranks when one fails, and report why: srun does not interfere (kill-on-bad-exit, wait).
exec "$python" "${{dtrain[@]}}" slurm-job --requeues "$requeues" "${{words[@]}}" -- \\
    srun --kill-on-bad-exit=0 --wait=0 "${{srun_options[@]}}" "${{container[@]}}" "$rank_python" \\
    "${{dtrain[@]}}" launch -n "$ranks" "${{launch_options[@]}}" -- train "${{words[@]}}"
"""

PER_RANK_END = f"""\
{_BEFORE_ALL}\
# There is no launcher: srun terminates all ranks 20 s after the first one exits. Not at once (kill-on-bad-exit), since
# ranks that stop on request (exit code 75) would be killed when the first of them exits.
exec "$python" "${{dtrain[@]}}" slurm-job --requeues "$requeues" "${{words[@]}}" -- \\
    srun --kill-on-bad-exit=0 --wait=20 "${{srun_options[@]}}" "${{container[@]}}" "$rank_python" \\
    "${{dtrain[@]}}" train "${{train_options[@]}}" "${{words[@]}}"
"""


@dataclass(frozen=True)
class Script:
    """What a batch script is written from, besides what is asked of SLURM.

    Attributes:
        runs: the words of `dtrain train` (config, then values) of the run; of each run, in an array.
        output: the file for the job's output, as `output_pattern` returns it.
        python: the Python of the batch shell.
        rank_python: the Python of the ranks; another one in a container.
        about: a line that says what this is.
    """

    runs: Sequence[Sequence[str]]
    output: str
    python: str
    rank_python: str
    about: str = ""


def script_text(request: JobRequest, script: Script) -> str:
    """Returns the batch script of a checked request."""
    parts = [
        "#!/bin/bash",
        *([f"# {_one_line(script.about)}"] if script.about else []),
        *(directive(option, comment) for option, comment in _options(request, script.output)),
        "set -eo pipefail",
        *_env_setup(request.env_setup),
        "set -u",
        "",
        *_words(request, script.runs),
        *_settings(request, script),
        "",
    ]
    return "\n".join(parts) + "\n" + (PER_RANK_END if request.per_rank else PER_NODE_END)


def output_pattern(folder: Path, *, array: bool) -> str:
    """Returns the file for a job's output, as sbatch's --output wants it.

    Args:
        folder: the run's folder; in an array, that of the first one without its -0.
        array: whether each task of an array has one of its own.

    Raises:
        UsageError: SLURM cannot write to a file of such a name.
    """
    # Relative, SLURM would also replace what looks like a pattern in the name of the present folder.
    text = str(folder.absolute())
    if "\\" in text:
        raise UsageError(
            f"{text}: SLURM cannot write a job's output to a path with a backslash. Choose another run.dir."
        )
    if not text.isprintable():
        raise UsageError(f"{text!r}: the path of a job's output must not contain line breaks or control characters.")
    escaped = text.replace("%", "%%")
    return f"{escaped}-%a/{SLURM}/job-%A_%a.out" if array else f"{escaped}/{SLURM}/job-%j.out"


def output_file(folder: Path, job: str) -> Path:
    """Returns the file that a pattern stands for.

    Args:
        folder: the run's own folder.
        job: "123"; "123_4" for a task of an array.
    """
    return folder.absolute() / SLURM / f"job-{job}.out"


def directive(option: str, comment: str = "") -> str:
    """Returns a line that sbatch reads as this option, whatever is in its value."""
    name, equals, value = option.partition("=")
    line = f"#SBATCH {name}{equals}{_for_sbatch(value)}"
    return f"{line:<{_COMMENT_COLUMN}} # {comment}" if comment else line


def quoted(word: str) -> str:
    """Returns a word as bash reads it back, on one line, in UTF-8."""
    raw = os.fsencode(word)
    if word.isprintable():
        return shlex.quote(word)
    # sbatch takes no script with DOS line breaks in it, and bytes that are no text cannot be written as such.
    whole = all(not 0xDC80 <= ord(char) <= 0xDCFF for char in word)
    chars = word if whole else raw.decode("latin-1")
    return "$'" + "".join(_escaped(char, ascii_only=not whole) for char in chars) + "'"


def _escaped(char: str, *, ascii_only: bool) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isascii() and char.isprintable():
        return char
    if char.isprintable() and not ascii_only:
        return char
    return "".join(f"\\{byte:03o}" for byte in char.encode("latin-1" if ascii_only else "utf-8"))


def _for_sbatch(value: str) -> str:
    """Within quotes sbatch takes a backslash before any character away, and reads the rest as it is."""
    if not value or _PLAIN.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _options(request: JobRequest, output: str) -> list[tuple[str, str]]:
    """Returns sbatch's options, each with what there is to say about it."""
    many = request.ranks_per_node
    tasks = (many, "one task per rank") if request.per_rank else (1, "one launcher, which starts the ranks of the node")
    cpus = "for each rank" if request.per_rank else f"for all ranks of a node ({many})"
    asked = {"partition": request.partition, "account": request.account, "qos": request.qos}
    asked |= {"constraint": request.constraint, "mem": request.mem, "gpus-per-node": request.gpus_per_node}
    found = [
        (f"--job-name={request.job_name}", ""),
        *((f"--{name}={value}", "") for name, value in asked.items() if value is not None),
        (f"--nodes={request.nodes}", ""),
        (f"--ntasks-per-node={tasks[0]}", tasks[1]),
        (f"--cpus-per-task={request.task_cpus}", cpus),
    ]
    if request.time is not None:
        found.append((f"--time={request.time}", ""))
    if request.tasks is not None:
        limit = "" if request.at_once is None else f"%{request.at_once}"
        found.append((f"--array=0-{request.tasks - 1}{limit}", "one run each; %K: how many at once"))
    return [
        *found,
        (f"--output={output}", ""),
        ("--open-mode=append", "append to the output of earlier starts"),
        ("--requeue", "SLURM may requeue it: node failure, preemption"),
        (f"--signal=B:USR1@{request.stop_before}", "to this shell, that many seconds before the time limit"),
        *((word, "") for word in request.sbatch_args),
    ]


def _env_setup(file: Path | None) -> list[str]:
    if file is None:
        return []
    name = quoted(str(file.absolute()))  # a name without a folder would be looked for on PATH
    return [
        "# Before set -u, since such files often use unset variables.",
        "# shellcheck source=/dev/null",
        f"source {name} || {{",
        "    printf '%s exited with status %s: end the file with the command true if "
        f'that is not a failure\\n\' {name} "$?" >&2',
        "    exit 2",
        "}",
    ]


def _words(request: JobRequest, runs: Sequence[Sequence[str]]) -> list[str]:
    if request.tasks is None:
        return ["words=(", *(f"    {quoted(word)}" for word in runs[0]), ")"]
    return [
        "case ${SLURM_ARRAY_TASK_ID:-none} in",
        *(f"{task}) words=({' '.join(map(quoted, words))}) ;;" for task, words in enumerate(runs)),
        '*) echo "this script has no run for array task ${SLURM_ARRAY_TASK_ID:-none}" >&2; exit 2 ;;',
        "esac",
    ]


def _settings(request: JobRequest, script: Script) -> list[str]:
    cpu = ["--cpu"] if request.cpu else []
    retries = ["--retries", str(request.retries)] if request.retries else []
    ranks = [f"ranks={request.ranks_per_node}", _array("launch_options", [*cpu, *retries])]
    return [
        f"python={quoted(script.python)}",
        f"requeues={request.requeues}",
        *([_array("train_options", cpu)] if request.per_rank else ranks),
        _array("srun_options", request.srun_args),
        _array("container", request.container),
        f"rank_python={quoted(script.rank_python)}",
    ]


def _array(name: str, words: Sequence[str]) -> str:
    return f"{name}=({' '.join(map(quoted, words))})"
