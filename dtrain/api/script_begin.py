"""Where a script's run begins: its folder opened as that of any run, and compared with what the script has."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from dtrain import __version__
from dtrain.api.prepared import PreparedLoader, Process
from dtrain.api.script_state import Objects
from dtrain.callbacks.progress import ConsoleOptions
from dtrain.checkpoint.code import check_code, check_same_code, code_facts
from dtrain.checkpoint.compat import check_facts, check_ranks
from dtrain.checkpoint.folder import Saved
from dtrain.checkpoint.locate import Loaded, Parts, read
from dtrain.checkpoint.samples import check_data, data_marks
from dtrain.checkpoint.weights import WEIGHTS, check_fit
from dtrain.config import Settings
from dtrain.config.calls import SCRIPT
from dtrain.distributed.world import World
from dtrain.errors import StopRequested, UsageError
from dtrain.launch.signals.stop_request import StopRequest
from dtrain.layout import STOP
from dtrain.provenance.code import Code
from dtrain.provenance.pieces import Reached
from dtrain.rundir.history import History
from dtrain.rundir.lock import Ownership, owned
from dtrain.rundir.starts import here, noted
from dtrain.trainer.agreed import agree
from dtrain.trainer.folder import OpenRun, open_folder, take_up
from dtrain.trainer.messages import log_resumed


class First(NamedTuple):
    """What the first prepared loader says of all: the world, whose batch size, and the seed."""

    world: World
    batch: str
    seed: int


def check_prepared(process: Process) -> First:
    """Looks whether a run can begin.

    Raises:
        UsageError: nothing was prepared yet, or this process has a run.
    """
    if process.run is not None:
        raise UsageError("this program has a run already: a second dtrain.run begins once the first one's epochs end.")
    if not process.loaders:
        raise UsageError("dtrain.run comes after dtrain.prepare: prepare the model and its loaders first.")
    loader = process.loaders[0]
    return First(process.joined(cpu=False), loader.batch, loader.seed)


def script_code(objects: Objects, loaders: Sequence[PreparedLoader]) -> Code:
    """Returns the script's file, with the modules of the user's own that it imports; of a notebook, what it defines."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    roots = {
        **{f"net_{number}": net for number, net in enumerate(objects.nets)},
        **{f"other_{number}": other for number, other in enumerate((*objects.optimizers, *objects.others))},
        **{f"loader_{number}": one.loader for number, one in enumerate(loaders)},
    }
    reached = Reached(roots)
    if not isinstance(file, str) or not Path(file).is_file():
        return reached.code(Path.cwd() / "notebook.ipynb", {})
    path = Path(file).resolve()
    return Code.of_pieces(path, {path.name: path.read_bytes()}, reached.modules, main)


@dataclass
class Begun:
    """A script's run whose folder is open.

    Attributes:
        folder: the run's, absolute.
        history: of the rows so far.
        facts: returns what a checkpoint says of the run.
        loaded: the checkpoint that it goes on from; None for a run that begins.
        ownerships: of rank 0.
    """

    folder: Path
    history: History
    facts: Callable[[], dict[str, Any]]
    owner: contextlib.ExitStack
    start: Callable[[], contextlib.AbstractContextManager[None]]
    loaded: Loaded | None = None
    ownerships: list[Ownership] = field(default_factory=list)

    def note_start(self) -> None:
        """Notes that training begins."""
        self.owner.enter_context(self.start())

    def close(self, error: BaseException | None) -> None:
        """Notes how it ended, and lets the folder go."""
        with contextlib.suppress(BaseException if error is not None else StopRequested):
            self.owner.__exit__(None if error is None else type(error), error, None)


def begin_script(settings: Settings, world: World, objects: Objects, code: Code, request: StopRequest) -> Begun:
    """Opens the run's folder, and reads and compares the checkpoint that there is in it.

    Raises:
        AgreedError: some rank could not; every rank raises it, and what was there is as it was.
    """
    check_same_code(world, code)
    owner, ownerships = contextlib.ExitStack(), list[Ownership]()
    loaders = _stand_in(settings)
    samples = data_marks(loaders) if world.is_main and settings.config.checkpoint.check_data else {}

    def own(folder: Path) -> None:
        ownerships.append(owner.enter_context(owned(folder, request.asked)))
        if (folder / STOP).exists():
            raise UsageError(f"{folder / STOP} exists: this run was stopped for good. Remove the file to continue.")

    try:
        opened = agree(
            world, lambda: open_folder(settings, "auto", _usable(settings, world), own) if world.is_main else None
        )
        told = world.gather_json(None if opened is None else [str(opened.folder), opened.found is not None])[0]
        folder = Path(told[0]).absolute()
        facts = _facts_of(settings, world, code, samples, folder)
        loaded = _loaded(settings, world, objects, code, opened, facts, samples) if told[1] else None
        rows = [] if loaded is None else loaded.run["rows"]
        history = agree(world, lambda: None if opened is None else take_up(opened, settings, rows)) or History()
    except BaseException:
        owner.close()
        raise
    history.rows = list(rows)
    if loaded is not None:
        log_resumed(opened, loaded, ConsoleOptions())
    notes = {
        **here(code.recipe.parent),
        "ranks": world.size,
        "device": str(world.device),
        "checkpoint": None if loaded is None else str(loaded.path),
    }

    def start() -> contextlib.AbstractContextManager[None]:
        if not world.is_main:
            return contextlib.nullcontext()
        return noted(folder, notes, lambda: int(history.rows[-1].get("epoch", 0)) if history.rows else 0)

    return Begun(folder, history, facts, owner, start, loaded, ownerships)


def _stand_in(settings: Settings) -> Any:
    """What `data_marks` reads of an engine: the loaders, and the seed."""
    from dtrain.api.prepared import PROCESS

    loaders = [one.loader for one in PROCESS.loaders]
    task = SimpleNamespace(dl_train=loaders[0], dl_valid=loaders[1] if len(loaders) > 1 else None)
    return SimpleNamespace(task=task, options=SimpleNamespace(seed=settings.config.train.seed))


def _usable(settings: Settings, world: World) -> Callable[[Saved], str]:
    def usable(saved: Saved) -> str:
        change = settings.config.checkpoint.change_ranks and settings.config.train.batch == "per_rank"
        if change and saved.step is not None and saved.facts["ranks"] != world.size:
            return f"{saved.path} was saved within an epoch on another number of ranks"
        return ""

    return usable


def _facts_of(
    settings: Settings, world: World, code: Code, samples: dict[str, Any], run: Path
) -> Callable[[], dict[str, Any]]:
    from dtrain.api.prepared import PROCESS

    loaders = [one.loader for one in PROCESS.loaders]
    lengths: dict[str, int] = {}
    for number, loader in enumerate(loaders, start=1):
        for name, thing in (("batches", loader), ("samples", getattr(loader, "dataset", None))):
            with contextlib.suppress(TypeError, NotImplementedError):
                lengths[f"loader {number}'s {name}"] = len(thing)  # type: ignore[arg-type]

    def facts(kept: Path | None = run) -> dict[str, Any]:
        return {
            "format": 2,
            "dtrain": __version__,
            "torch": str(torch.__version__),
            "ranks": world.size,
            "device": world.device.type,
            "config": settings.plain(),
            "recipe": {"name": SCRIPT, "content": ""},
            "code": code_facts(code, kept),
            "opened": {},
            "data": lengths,
            "samples": samples,
            "accepted": [],
        }

    return facts


def _loaded(  # noqa: PLR0913, PLR0917 - called at one place with all of them
    settings: Settings,
    world: World,
    objects: Objects,
    code: Code,
    opened: OpenRun | None,
    facts: Callable[..., dict[str, Any]],
    samples: dict[str, Any],
) -> Loaded:
    """Reads the checkpoint on rank 0, tells all ranks, and compares it with what the script has."""
    parts = agree(world, lambda: read(opened.found.saved.path) if opened and opened.found else Parts())
    shared = parts.shared(world)
    loaded = agree(world, shared.loaded)

    def check() -> None:
        where = str(loaded.path)
        if world.is_main:
            check_facts(loaded.facts, facts(None), settings)
            check_code(loaded.facts, code, settings, loaded.path.parent.parent)
            check_data(loaded.facts.get("samples", {}), samples, _stand_in(settings), settings)
            check_ranks(loaded.facts, loaded.run["step"], world.size, settings)
        objects.check(loaded.run, where)
        check_fit(objects.nets[0], loaded.weights, f"{where}/{WEIGHTS}")

    agree(world, check)
    return loaded
