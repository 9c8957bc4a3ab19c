"""What srun hands on to its tasks: with `--export=NONE`, or a list, what dtrain's own processes need goes along.

Without the secret the nodes could not know each other, and without the run's name each start would be another run.
sbatch's own `--export=NONE` comes to srun as the variable SLURM_EXPORT_ENV.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_OPTION, _VARIABLE = "--export", "SLURM_EXPORT_ENV"


def exported(
    command: Sequence[str], environment: Mapping[str, str], names: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Returns a command of srun's, and its environment, so that variables go along whatever is exported else.

    Args:
        command: srun and its options, then what it runs.
        environment: of srun.
        names: of variables in it. Their values stand in no command line, which every user can read.
    """
    words, more = list(command), dict(environment)
    for place, word in enumerate(words):
        if word == _OPTION and place + 1 < len(words):
            words[place + 1] = _with(words[place + 1], names)
            break
        if word.startswith(f"{_OPTION}="):
            words[place] = f"{_OPTION}={_with(word.partition('=')[2], names)}"
            break
        if word == "-m":  # python -m dtrain: what follows is its own
            break
    if _VARIABLE in more:  # empty: nothing is exported
        more[_VARIABLE] = _with(more[_VARIABLE], names)
    return words, more


def _with(value: str, names: Sequence[str]) -> str:
    """Returns a value of --export with further names; ALL has them already."""
    parts = value.split(",")
    if "ALL" in parts or not names:
        return value
    kept = [] if value in ("", "NONE", "NIL") else [value]  # as it stands: a quoted value may have commas in it
    return ",".join([*kept, *(name for name in names if name not in parts)])
