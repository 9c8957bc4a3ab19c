"""DTRAIN_ variables of the environment that nothing reads: most often a key's name without its section."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from dtrain.config.schema import BUILDER_SECTIONS, leaves
from dtrain.config.sources import ENVIRONMENT_PREFIX
from dtrain.launch.env.inherited import GIVEN, MARK
from dtrain.launch.env.job import HANG, TIMEOUT
from dtrain.launch.env.slurm_env import NONCE, PORT_FILE
from dtrain.launch.monitor.exit_report import REPORT_DIR
from dtrain.launch.nodes.secret import KEY, SECRET, SECRET_FILE
from dtrain.launch.signals.lifeline import PARENT
from dtrain.masking import HIDDEN

_OWN = (
    TIMEOUT,
    SECRET,
    SECRET_FILE,
    NONCE,
    PORT_FILE,
    GIVEN,
    MARK,
    REPORT_DIR,
    PARENT,
    HANG,
    KEY,
    HIDDEN,
)  # from NONCE on: for dtrain's own ranks
_TESTS = f"{ENVIRONMENT_PREFIX}TEST_"  # of dtrain's tests, which start commands


def ignored_variables(environ: Mapping[str, str]) -> list[str]:
    """Returns a sentence for each DTRAIN_ variable that nothing reads, with the name that was probably meant."""
    return [
        f"{name} is ignored: dtrain has no such variable. {_remedy(name)}"
        for name in sorted(environ)
        if name.startswith(ENVIRONMENT_PREFIX)
        and "__" not in name  # which is a key of the config, and checked
        and name not in _OWN
        and not name.startswith(_TESTS)
    ]


def _remedy(name: str) -> str:
    said = name[len(ENVIRONMENT_PREFIX) :].lower()
    section, _, rest = said.partition("_")
    if section in BUILDER_SECTIONS and rest:
        return f"Did you mean {_variable(f'{section}.{rest}')!r}?"
    meant = {name[len(ENVIRONMENT_PREFIX) :].lower(): name for name in (TIMEOUT, SECRET, SECRET_FILE)}
    for key in reversed(leaves()):  # of several keys of one name the first counts
        meant |= {key.replace(".", "_"): _variable(key), key.rpartition(".")[2]: _variable(key)}
    near = difflib.get_close_matches(said, meant, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {meant[near[0]]!r}?"
    return f"Set a config key with {ENVIRONMENT_PREFIX}SECTION__KEY, as in {_variable('train.epochs')}=5."


def _variable(key: str) -> str:
    return f"{ENVIRONMENT_PREFIX}{key.replace('.', '__').upper()}"
