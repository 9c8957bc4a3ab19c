"""The environment variables that a run's code reads, as far as they are compared when it is resumed."""

from __future__ import annotations

import pytest

from dtrain.provenance.variables import variable_hashes


def test_variables_that_sources_read_by_name_are_noted_as_hashes() -> None:
    source = b"""
import os
from os import environ, getenv
a = os.environ["SCALE"], environ.get("MODE", "x"), getenv("FLAG"), os.getenv("UNSET"), __import__("os").environ.get("DEEP")
b = os.environ["API_TOKEN"], os.environ["SLURM_JOB_ID"], os.environ["RANK"], os.environ["LOCAL_RANK"], environ.get("TMPDIR")
c = os.environ["HOME"], {"environ": 1}["environ"], a.get("NOT")
"""
    environ = {"SCALE": "1", "MODE": "2", "FLAG": "3", "DEEP": "4", "API_TOKEN": "s", "RANK": "0", "HOME": "/"}
    found = variable_hashes([source], environ)
    assert found.keys() == {"SCALE", "MODE", "FLAG", "DEEP", "UNSET"} and found["UNSET"] == ""
    other = variable_hashes([source], environ | {"SCALE": "2", "HOME": "/home"})
    assert {name for name in found if found[name] != other[name]} == {"SCALE"}


@pytest.mark.parametrize(
    "read",
    [
        "os.environ['BOOST']",
        "'BOOST' in os.environ",
        "'BOOST' not in os.environ",
        "os.environb[b'BOOST']",
        "os.getenv(key='BOOST', default='1')",
        "E.get('BOOST')",
        "G('BOOST')",
        "H['BOOST']",
        "os.environ.get(NAME)",
        "os.environ[NAME]",
        "os.environ.__getitem__('BOOST')",
    ],
)
def test_a_variable_is_seen_however_it_is_read(read: str) -> None:
    head = "import os\nfrom os import environ as E, getenv as G\nH = os.environ\nNAME = 'BOOST'\n"
    assert variable_hashes([f"{head}def step():\n    return {read}\n".encode()], {"BOOST": "3"}).keys() == {"BOOST"}


@pytest.mark.parametrize(
    ("name", "value", "compared"),
    [
        *((name, "x", True) for name in ("MAX_TOKENS", "PAD_TOKEN", "N_KEYPOINTS", "AUTHORS", "PASSES", "PATH_DROP")),
        *(
            (name, "x", True)
            for name in ("TEMPERATURE", "TEMP_SCALE", "HF_MODEL", "WORLD_MODEL", "GROUP_NORM", "CI_WIDTH")
        ),
        *((name, "x", False) for name in ("HF_TOKEN", "MY_API_KEY", "DB_PASSWORD", "DB_PASS", "GIT_PAT", "AUTH")),
        *((name, "1234", False) for name in ("DB_PASSWORD", "CARD_PIN")),
        ("DB", "postgres://me:hush@host/db", False),
        ("KEY", "f83ka02-kd", False),
        *(
            (name, "x", False)
            for name in ("CUDA_VISIBLE_DEVICES", "SLURM_PROCID", "LOCAL_WORLD_SIZE", "HOSTNAME", "TMPDIR")
        ),
    ],
)
def test_which_variables_are_compared(name: str, value: str, compared: bool) -> None:
    source = f"import os\nx = os.environ.get({name!r})\n".encode()
    assert bool(variable_hashes([source], {name: value})) is compared
