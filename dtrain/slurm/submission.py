"""From words of the command line to runs with names and folders, and to a job in the queue."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.config import Settings
from dtrain.config import bundled as share
from dtrain.config.keeping import write_secrets
from dtrain.config.recipe_file import locate, title_of
from dtrain.config.sources import read_scalar
from dtrain.errors import UsageError
from dtrain.files import PRIVATE, make_folder, write_below
from dtrain.layout import CODE, CONFIG, JOB, OWNER, SCRIPT, SECRETS, SLURM, STOP
from dtrain.masking import hide
from dtrain.rundir.job_record import CANCEL_NAME, JobRecord, read_record, write_record
from dtrain.slurm.client import run_client, submit
from dtrain.slurm.freeze import Code, find_code
from dtrain.slurm.text import output_file

_WRITTEN = (SCRIPT, JOB, CODE, CONFIG)  # in the run's slurm folder
_OLD = "old"  # there, what was before, for a submission that fails
_NOT_OF_A_RUN = (OWNER, SLURM, SECRETS)
_CONFIGS = (".yaml", ".yml")


@dataclass(frozen=True)
class PlannedRun:
    """One run that is to be submitted.

    Attributes:
        name: the run's, which is that of its folder.
        folder: the run's.
        words: what `dtrain train` is given: the config, if one is named, and values.
        differs: the values that it alone has in its array.
    """

    name: str
    folder: Path
    words: tuple[str, ...]
    differs: tuple[str, ...] = ()


def plan_runs(words: Sequence[str], settings: Settings, grid: Sequence[Sequence[str]] | None) -> list[PlannedRun]:
    """Gives each run its name, which is fixed now: a job that is started again must find its folder.

    Args:
        words: of the command line.
        settings: what they amount to.
        grid: the values of each run of an array; None for a single run.
    """
    config = settings.config
    runs = Path(config.run.dir).expanduser()
    name = config.run.name or _free_name(runs, title_of(config.recipe))
    # As text the job may read it elsewhere: a config that is edited meanwhile does not move the run.
    place = [word("run.dir", config.run.dir)] if settings.place_of("run.dir") != "command line" else []
    if grid is None:
        named = settings.place_of("run.name") == "command line"
        fixed = [*place, *([] if named else [word("run.name", name)])]
        return [PlannedRun(name, runs / name, (*words, *fixed))]
    return [
        PlannedRun(
            f"{name}-{n}", runs / f"{name}-{n}", (*words, *one, *place, word("run.name", f"{name}-{n}")), tuple(one)
        )
        for n, one in enumerate(grid)
    ]


def word(key: str, text: str) -> str:
    """Returns `key=text` such that a config's value reads back as this text."""
    try:
        plain = read_scalar(key, text, "").text() == text
    except UsageError:
        plain = False
    quote = "'"
    return f"{key}={text if plain else quote + text.replace(quote, 2 * quote) + quote}"


def _free_name(runs: Path, title: str) -> str:
    stem = f"{title}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in range(1, 1000))
    there = {path.name for path in runs.glob("*")} if runs.is_dir() else set()
    return next(name for name in names if not {name, f"{name}-0"} & there)


def check_folders(runs: Sequence[PlannedRun], *, ask_queue: bool = True) -> None:
    """Looks whether the runs' folders are free, or hold a run that can be gone on with.

    Raises:
        UsageError: one does not, or its job is in the queue; it is named.
        SlurmError: SLURM does not say what is in the queue.
    """
    there = [run for run in runs if run.folder.exists()]
    records = {run: read_record(run.folder) if run.folder.is_dir() else None for run in there}
    queue = _queue() if ask_queue and any(record and record.job for record in records.values()) else {}
    for run, record in records.items():
        state = queue.get(record.job) if record is not None else None
        if record is not None and state is not None:
            raise UsageError(
                f"run {run.name}: its job {record.job} is in the queue ({state.lower()}), and two jobs must not train "
                f"one run. Wait for it, cancel it (dtrain cancel {record.job}), or choose another run.name."
            )
        _check_folder(run)


def _queue() -> dict[str, str]:
    """Returns the state of each job in the queue, a task of an array by its own name."""
    lines = run_client(["squeue", "--noheader", "--array", "--format=%i %T"], needed_for="dtrain submit").splitlines()
    return dict(line.split(" ", 1) for line in lines if " " in line)


def _check_folder(run: PlannedRun) -> None:
    refusal = f"run.name = {run.name!r}: {run.folder} already exists and is not overwritten"
    if not run.folder.is_dir():
        raise UsageError(f"{refusal}; it is not a folder. Choose another run.name.")
    if (run.folder / STOP).exists():
        raise UsageError(f"{run.folder / STOP} exists: this run was stopped for good. Remove the file to continue.")
    other = any(path.name not in _NOT_OF_A_RUN for path in run.folder.iterdir())
    if other and not (run.folder / CONFIG).is_file():
        raise UsageError(f"{refusal}; it contains no run. Choose another run.name.")


def code_of(settings: Settings) -> Code | None:
    """Returns what `--freeze` copies; None where the recipe is installed, and so no part of what is edited.

    Raises:
        UsageError: the recipe's folder is not known without importing it, or is too large.
    """
    reference = settings.config.recipe
    path = locate(reference, settings.base)
    if path is not None:
        return find_code(path)
    top = Path(reference.partition(".")[0])
    if top.is_dir() or top.with_suffix(".py").is_file():
        file = f"{reference.replace('.', '/')}.py"
        raise UsageError(
            f"--freeze: the recipe {reference} is a module, which is looked up where the job runs. Name its file "
            f"instead: recipe={file}."
        )
    return None


def config_of(run: PlannedRun) -> Path | None:
    """Returns the config that a run's words name; None for a recipe, a bundled config's short name, or nothing."""
    first = run.words[0] if run.words else ""
    return share.find(first) if first.endswith(_CONFIGS) else None


def frozen_words(run: PlannedRun, recipe: str | None) -> PlannedRun:
    """Returns a run whose words name the copies of its config and of its recipe.

    Args:
        run: as `plan_runs` returns it.
        recipe: the place of the recipe's file in the copy; None where it is not copied.
    """
    words, first = list(run.words), run.words[0] if run.words else ""
    slurm = run.folder.absolute() / SLURM
    copy = [] if recipe is None else [word("recipe", str(slurm / CODE / recipe))]
    if first.endswith(_CONFIGS):
        words[0] = str(slurm / CONFIG)
    elif copy and first.endswith(".py"):
        words, copy = [str(slurm / CODE / str(recipe)), *words[1:]], []
    return replace(run, words=(*words, *copy))


def submit_runs(runs: Sequence[PlannedRun], text: str, code: Code | None, config: Path | None) -> str:
    """Writes the script, the record and the copies into each run's folder, and submits the job.

    Where that fails, all is as it was before.

    Args:
        runs: one run, or those of an array.
        text: the batch script.
        code: what is copied of the recipe; None for nothing.
        config: the config that is copied; None for none.

    Returns:
        the job's number.

    Raises:
        UsageError: a folder cannot be made or written; there is no sbatch here.
        SlurmError: SLURM refused the job.
    """
    with contextlib.ExitStack() as undo:
        for run in runs:
            try:
                undo.enter_context(_prepared(run, text, code, config))
            except OSError as error:
                raise UsageError(f"{error.filename or run.folder}: cannot be written: {error.strerror}.") from None
        job = submit(runs[0].folder / SLURM / SCRIPT, cwd=Path.cwd())
    for number, run in enumerate(runs):
        _note(run, job if not run.differs else f"{job}_{number}")
    return job


def _note(run: PlannedRun, job: str) -> None:
    """Notes the job's number; the job itself may have begun to write meanwhile."""
    record = read_record(run.folder) or JobRecord(job, name=run.name)
    write_record(run.folder, replace(record, job=job, submitted=time.time(), output=str(output_file(run.folder, job))))
    (run.folder / SLURM / CANCEL_NAME).unlink(missing_ok=True)  # it was for the job before
    shutil.rmtree(run.folder / SLURM / _OLD, ignore_errors=True)


@contextlib.contextmanager
def _prepared(run: PlannedRun, text: str, code: Code | None, config: Path | None) -> Iterator[None]:
    """Readies a run's folder; takes all back where what follows fails."""
    made = [folder for folder in (run.folder, *run.folder.parents) if not folder.exists()]
    slurm = run.folder / SLURM
    kept = False
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        make_folder(run.folder, SLURM)
        again = code is not None and code.is_in(slurm / CODE)
        _keep(slurm)
        kept = True
        before = read_record(run.folder)
        began = () if before is None else before.incarnations
        hidden = hide(run.words)[1]
        if hidden:
            write_secrets(run.folder, hidden)
        script = slurm / SCRIPT
        write_below(run.folder, f"{SLURM}/{SCRIPT}", text)
        write_record(
            run.folder, JobRecord("", None, str(script.absolute()), None, run.name, began, len(began), str(Path.cwd()))
        )
        if again:
            shutil.copytree(slurm / _OLD / CODE, slurm / CODE, symlinks=True)
        elif code is not None:
            code.copy_to(make_folder(run.folder, f"{SLURM}/{CODE}"))
        if config is not None:
            write_below(run.folder, f"{SLURM}/{CONFIG}", config.read_bytes(), mode=PRIVATE)  # it may hold secrets
        yield
    except BaseException:
        _take_back(run.folder, made, written=kept)
        raise


def _keep(slurm: Path) -> None:
    """Puts what is written anew aside."""
    old = slurm / _OLD
    shutil.rmtree(old, ignore_errors=True)  # which removes no link, and follows none
    old.mkdir()
    for name in _WRITTEN:
        if (slurm / name).exists():
            (slurm / name).rename(old / name)
    if (old / JOB).exists():
        write_below(slurm, JOB, (old / JOB).read_bytes())  # a reader finds one at any time


def _take_back(folder: Path, made: Sequence[Path], *, written: bool) -> None:
    if folder in made:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made[1:]:
            with contextlib.suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        return
    slurm = folder / SLURM
    for name in _WRITTEN if written else ():
        if (slurm / name).is_dir():
            shutil.rmtree(slurm / name)
        else:
            (slurm / name).unlink(missing_ok=True)
    for name in _WRITTEN:
        if (slurm / _OLD / name).exists():
            (slurm / _OLD / name).replace(slurm / name)
    shutil.rmtree(slurm / _OLD, ignore_errors=True)
    with contextlib.suppress(OSError):  # where there was none, it is empty
        slurm.rmdir()
