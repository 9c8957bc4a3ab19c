"""Runs SLURM's own commands: sbatch, squeue, sacct, scontrol, scancel, sinfo."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.errors import SlurmError, UsageError
from dtrain.launch.env.inherited import without_rank

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 60.0
# They change what a command does or prints without a word: SBATCH_TIMELIMIT, SQUEUE_STATES, SLURM_TIME_FORMAT, and
# all that a job's own shell has about its job.
_SILENT_OPTIONS = ("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SCONTROL_")
_KEPT = ("SLURM_CONF",)
_JOB_ID = re.compile(r"(\d+)(?:;\S+)?")  # a cluster's name follows where there are several


class NoAnswerError(SlurmError):
    """A command did not come to an end in time."""


def has_client(name: str) -> bool:
    """Whether one of SLURM's commands, such as squeue, is on this machine."""
    return shutil.which(name) is not None


def run_client(
    argv: Sequence[str], *, needed_for: str, cwd: Path | None = None, seconds: float = TIMEOUT_SECONDS
) -> str:
    """Runs one of SLURM's commands.

    Args:
        argv: the command and its arguments; no shell sees them.
        needed_for: what a person asked for, such as "dtrain submit", for messages.
        cwd: where it runs; None for the present folder.
        seconds: how long it may take.

    Returns:
        its standard output. Bytes that are no UTF-8 are there as surrogates, as in `os.fsdecode`.

    Raises:
        UsageError: the command is not on this machine.
        NoAnswerError: it took too long.
        SlurmError: it failed.
    """
    name = argv[0]
    found = shutil.which(name)
    if found is None:
        raise UsageError(
            f"{name} not found on PATH: {needed_for} needs the SLURM commands. Run it on a "
            "login node of the cluster, or add them to PATH."
        )
    try:
        # By name, not by the path found: a wrapper may look at how it was called.
        done = subprocess.run(
            list(argv),
            executable=found,
            cwd=cwd,
            env=client_environment(os.environ, name, cwd),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        unknown = " The job may or may not have been submitted: check squeue." if name == "sbatch" else ""
        raise NoAnswerError(f"{name} did not answer within {seconds:g} s.{unknown}") from None
    except OSError as error:
        raise SlurmError(f"{name} cannot be run ({found}): {error.strerror}.") from None
    words = done.stderr.decode("utf-8", "backslashreplace").strip()
    if done.returncode != 0:
        raise SlurmError(f"{name} failed (exit code {done.returncode}): {words or 'it printed nothing'}")
    if words and name == "sbatch":
        logger.warning("%s", words)  # a site's own word on a submission
    return os.fsdecode(done.stdout)


def client_environment(environ: Mapping[str, str], name: str, cwd: Path | None = None) -> dict[str, str]:
    """Returns the environment that a command gets: this one's, without variables that are options in disguise.

    Args:
        environ: the present environment.
        name: the command.
        cwd: where it will run.
    """
    kept = {
        key: value
        for key, value in without_rank(environ).items()
        if key in _KEPT or not key.startswith(_SILENT_OPTIONS)
    }
    if name != "sbatch":  # whose environment is the job's as well
        kept["LC_ALL"] = "C"
    if cwd is not None:
        kept["PWD"] = str(cwd)
    return kept


def ignored_options(environ: Mapping[str, str]) -> list[str]:
    """Returns the variables that would be options of sbatch, and are not used: SBATCH_ACCOUNT, say."""
    return sorted(key for key in environ if key.startswith("SBATCH_"))


def submit(script: Path, *, cwd: Path, options: Sequence[str] = (), needed_for: str = "dtrain submit") -> str:
    """Submits a batch script.

    Args:
        script: the file.
        cwd: the folder that the job runs in.
        options: of sbatch; they go before those in the script.
        needed_for: what a person asked for, for messages.

    Returns:
        the job's id, such as "123".

    Raises:
        UsageError: there is no sbatch here.
        SlurmError: SLURM refused the job, or its answer has no id.
    """
    # Absolute: a name that begins with a dash is no option.
    argv = ["sbatch", "--parsable", *options, str(script.absolute())]
    answer = run_client(argv, needed_for=needed_for, cwd=cwd)
    # A site's wrapper may print words of its own first.
    ids = [match[1] for line in answer.splitlines() if (match := _JOB_ID.fullmatch(line.strip()))]
    if not ids:
        raise SlurmError(f"sbatch submitted {script} and printed no job id: {answer.strip()!r}. Check squeue.")
    return ids[-1]
