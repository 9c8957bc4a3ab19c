"""What of the pages is made from the code is as the code is; and every public name explains itself."""

from __future__ import annotations

import importlib.util
import inspect
import re
from types import ModuleType

import pytest
from helpers.pages import ROOT

import dtrain
from dtrain.config.schema import leaves


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs/make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_as_the_code_is(make: ModuleType) -> None:
    stale = [path.name for path, text in make.pages().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"{', '.join(stale)}: not as the code is. Run: python docs/make.py"


def test_every_key_is_in_the_table_with_its_default() -> None:
    """Read from the page itself, not through what makes it."""
    page = (ROOT / "docs/configs.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| (?:`([^`]*)`)? *\|", page, re.MULTILINE))
    assert set(rows) == set(leaves())
    assert (rows["train.epochs"], rows["train.stop_seconds"], rows["checkpoint.asynchronous"]) == ("3", "600", "true")
    assert (rows["train.max_steps"], rows["track.wandb.project"], rows["recipe"]) == ("", "", "dtrain.recipes.digits")
    words = re.findall(r"^\| `([a-z_.]+)` \|[^|]*\|[^|]*\| (.*) \|$", page, re.MULTILINE)
    assert all(text.strip() for _, text in words)


def test_the_api_page_has_every_public_name(make: ModuleType) -> None:
    named = [name for names in make.GROUPS.values() for name in names]
    assert {name for name in named if "." not in name} == set(dtrain.__all__) - {"__version__"}
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name in named:
        assert f"\n### {name if '.' in name else f'dtrain.{name}'}\n" in page


@pytest.mark.parametrize("name", sorted(set(dtrain.__all__) - {"__version__"}))
def test_every_public_name_explains_its_arguments(name: str) -> None:
    thing = getattr(dtrain, name)
    assert inspect.getdoc(thing)
    if not inspect.isclass(thing):
        _assert_explained(name, thing, inspect.getdoc(thing) or "")
        return
    for method, value in vars(thing).items():
        if not method.startswith("_") and callable(value):
            _assert_explained(f"{name}.{method}", value, inspect.getdoc(value) or "")
    if not issubclass(thing, Exception) and "__init__" in vars(thing):
        _assert_explained(name, thing.__init__, inspect.getdoc(thing) or "")


def _assert_explained(name: str, function: object, docstring: str) -> None:
    assert docstring, f"{name} has no docstring"
    kept = [p for p in inspect.signature(function).parameters if p not in ("self", "args", "kwargs", "options")]  # type: ignore[arg-type]
    missing = [p for p in kept if not re.search(rf"\b{p}\b", docstring)]
    assert not missing, f"{name}: its docstring does not say what {', '.join(missing)} is"


def test_a_docstring_becomes_markdown(make: ModuleType) -> None:
    made = make.markdown(
        "Does it::\n\n    a(1)\n\nArgs:\n    one: first\n        and on.\n    two: second\n\nReturns:\n    what.\n"
    )
    assert (
        made
        == "Does it:\n\n```text\na(1)\n```\n\n**Args**\n\n- `one`: first\n  and on.\n- `two`: second\n\n**Returns**\n\nwhat.\n"
    )
