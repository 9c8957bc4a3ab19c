"""Runs without a recipe: of `train_model(..., run=...)` and its like, whose objects come from the user's own program.

Their config has the call's name for a recipe, and in place of builders' parameters what the objects were made with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.config.schema import BUILDER_SECTIONS
from dtrain.config.sources import Value
from dtrain.errors import ConfigError, RecipeError, UsageError

if TYPE_CHECKING:
    from dtrain.config.settings import Settings

TRAIN_MODEL, KERAS, SCRIPT = "dtrain.train_model", "dtrain.KerasModel.fit", "dtrain.run"
CALLS = (TRAIN_MODEL, KERAS, SCRIPT)
ACCEPT = "checkpoint.accept"
_CONFIG = "argument config"
# Of dtrain.run: what has an effect in a loop of one's own.
_OF_SCRIPTS = (
    "checkpoint.every_epochs",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "checkpoint.monitor",
    "checkpoint.mode",
    "checkpoint.on_error",
    "checkpoint.change_ranks",
    "checkpoint.accept",
    "checkpoint.check_data",
    "track.",  # which is refused with words of its own
)
# Of the other calls: what has none, and what does it instead.
_OF_RECIPES = {
    "train.init_": "put the weights into the model before the call: dtrain.load_weights(model, source).",
    "train.activation_checkpointing": "use torch.utils.checkpoint in the model's forward.",
    "train.hang_seconds": "it is for `dtrain train`, and `dtrain launch --hang-seconds N -- SCRIPT.py`.",
    "train.stop_seconds": "it is for `dtrain train`.",
}


def is_call(reference: str) -> bool:
    """Whether a config's `recipe` is the name of a call."""
    return reference in CALLS


def refuse_call(reference: str) -> None:
    """Refuses to build what a run without a recipe has trained.

    Raises:
        RecipeError: the reference is that of a call.
    """
    if is_call(reference):
        raise RecipeError(
            f"this is a run of {reference}, which has no recipe: its model and data are made in your own program. "
            f"There, {_again(reference)}; or load its weights to evaluate the model or to predict with it: "
            "dtrain.load(RUN, model=net). history, report and plot work as for any run."
        )


def _again(reference: str) -> str:
    if reference == SCRIPT:
        return "start the program again to resume the run"
    return f"call {reference.removeprefix('dtrain.')} again: it resumes the run, or returns its history if complete"


def way(settings: Settings, key: str, value: Any = None) -> str:
    """Returns how a key is set where a run was started: `accept=code` on a command line, an argument in a call.

    Args:
        settings: of the run.
        key: dotted.
        value: the one to be set; None where only the key is named.
    """
    if not is_call(settings.config.recipe):
        text = str(value).lower() if isinstance(value, bool) else value
        return key if value is None else f"{'accept' if key == ACCEPT else key}={text}"
    argument, _, name = settings.place_of(key).partition(" ")
    if argument == "argument" and name != "config":
        return f"{name}=" if value is None else f"{name}={value!r}"
    return f"config={{{key!r}: {'...' if value is None else repr(value)}}}".replace("'", '"')


def call_values(
    call: str,
    run: str | Path,
    own: Mapping[str, tuple[Any, str]],
    more: Mapping[str, Any] | None,
    full_key: Callable[[str, Value], str],
) -> dict[str, Value]:
    """Returns the values of a call's config.

    Args:
        call: one of `CALLS`.
        run: the run's folder.
        own: dotted key -> its value, and the argument that it comes from.
        more: the argument `config`: further keys, dotted, bare or nested.
        full_key: returns the full key of a bare one, with its value; it raises where there is none.

    Raises:
        UsageError: the folder has no name, or `config` is no mapping.
        ConfigError: a key of `config` is that of another argument, or of a builder.
    """
    folder = run_folder(run)
    values = {"recipe": Value(call, "the call", raw=call)}
    for key, text in (("run.dir", str(folder.parent)), ("run.name", folder.name)):
        values[key] = Value(text, "argument run", raw=text)
    for key, (value, argument) in own.items():
        values[key] = Value(value, f"argument {argument}")
    for key, value in _flat(more).items():
        full = full_key(key, Value(value, _CONFIG, raw=str(value)))
        if full in values or full.partition(".")[0] in (*BUILDER_SECTIONS, "parameters", "recipe", "run"):
            raise ConfigError(f'config={{"{key}": ...}}: {_instead(full, own)}')
        _refuse_unused(call, key, full)
        values[full] = Value(value, _CONFIG)
    return values


def _instead(key: str, own: Mapping[str, tuple[Any, str]]) -> str:
    if key in own:
        return f"pass it as the argument {own[key][1]}= of the call."
    if key.startswith("run."):
        return "pass it as the argument run= of the call, such as run='runs/first'."
    return "a call has no recipe with such parameters: it gets the objects themselves."


def _refuse_unused(call: str, key: str, full: str) -> None:
    """Refuses a key that would do nothing in a call."""
    if call == SCRIPT and not full.startswith(_OF_SCRIPTS):
        keys = ", ".join(_OF_SCRIPTS[:-1])
        raise ConfigError(
            f'config={{"{key}": ...}}: dtrain.run does nothing with it, since the loop is your own: do it there. Its '
            f"keys are {keys}."
        )
    remedy = next((words for prefix, words in _OF_RECIPES.items() if full.startswith(prefix)), None)
    if remedy is not None:
        raise ConfigError(f'config={{"{key}": ...}}: a call does nothing with it; {remedy}')


def run_folder(run: Any) -> Path:
    """Returns the folder that an argument `run` names.

    Raises:
        UsageError: it is no path that ends in a name.
    """
    if not isinstance(run, (str, os.PathLike)) or not str(run):
        raise UsageError(f"run = {run!r}: should be the path of the run's folder, such as 'runs/first'.")
    folder = Path(run).expanduser()
    if folder.name in ("", ".."):
        raise UsageError(f"run = {str(run)!r}: should end in the name of the run, such as 'runs/first'.")
    return folder


def _flat(more: Mapping[str, Any] | None) -> dict[str, Any]:
    if more is None:
        return {}
    if not isinstance(more, Mapping) or not all(isinstance(key, str) for key in more):
        raise UsageError(f'config = {more!r}: should be a mapping of keys, such as {{"checkpoint.every_steps": 100}}.')
    found: dict[str, Any] = {}
    for key, value in more.items():
        nested = isinstance(value, Mapping) and key not in found
        found |= {f"{key}.{inner}": one for inner, one in _flat(value).items()} if nested else {key: value}
    return found
