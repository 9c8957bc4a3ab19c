"""What a run holds, in the page: it comes out as it went in, and is never markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Dtrain, clean_environment
from helpers.runs import a_start, cells, make_run, rows
from hypothesis import given
from hypothesis import strategies as st

from dtrain.report.data import page_data, run_data
from dtrain.report.finding import find_runs
from dtrain.report.render import embedded, render
from dtrain.report.runs import Run, read_run
from dtrain.rundir.starts import RunStart

TEXTS = st.text() | st.sampled_from(
    ["</script>", "<!--", "<script>", "]]>", "&lt;", "\u2028", "{{script}}", "\\u003c", "</ScRiPt "]
)
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers() | st.none(), inner, max_size=3),
    max_leaves=8,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


class Elements(HTMLParser):
    """The elements of a page with what is in them, as a browser would tell them apart."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.within = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside.append("")
        self.within = True

    def handle_endtag(self, tag: str) -> None:
        self.within = False

    def handle_data(self, data: str) -> None:
        if self.within:
            self.inside[-1] += data


PLAIN = [tag for tag, _ in Elements(render({"runs": []})).found]


@given(JSON)
def test_data_comes_out_as_it_went_in(data: Any) -> None:
    text = embedded({"x": data})
    assert not re.search(r"[<>&\u2028\u2029]", text)
    assert text.isascii()
    assert json.loads(text) == {"x": data}


@given(NESTED, NESTED, TEXTS)
def test_no_run_adds_an_element_to_the_page(config: Any, fact: Any, text: str) -> None:
    start = RunStart(1.0, {"host": fact, "versions": {"torch": text}, "epoch": fact}, text=text)
    failure = {"at": 2.0, "traceback": text, "exception": fact, "others": config, "rank": fact}
    run = Run(text, Path("runs/x"), (text, "loss"), ((text, "0.5"),), {"model": config}, (start,), (failure,))
    page = Elements(render(page_data([run], live=False)))
    assert [tag for tag, _ in page.found] == PLAIN
    index = next(i for i, (_, attributes) in enumerate(page.found) if attributes.get("id") == "data")
    shown = json.loads(page.inside[index])["runs"][0]
    assert (shown["name"], shown["starts"][0]["text"], shown["failures"][0]["traceback"]) == (text, text, text)
    assert all(isinstance(value, str) for value in shown["config"].values())


@given(st.dictionaries(TEXTS, NESTED, max_size=4))
def test_a_config_is_text_by_dotted_keys(config: dict[str, Any]) -> None:
    shown = run_data(Run("x", Path("runs/x"), config=config))["config"]
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in shown.items())


def test_a_config_by_dotted_keys() -> None:
    nested = {"a": {"b": [1, "x"], "c": {}}, "d": None, "e": True, "f": 1e-5, "g": ""}
    shown = run_data(Run("x", Path("runs/x"), config=nested))["config"]
    assert shown == {"a.b": "[1, 'x']", "d": "null", "e": "true", "f": "1e-05", "g": ""}


@pytest.mark.parametrize("live", [False, True])
def test_the_policy_allows_the_pages_own_script_and_style_alone(live: bool) -> None:
    page = Elements(render({"runs": []}, live=live))
    policy = next(a["content"] for _, a in page.found if a.get("http-equiv") == "Content-Security-Policy") or ""
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))

    def hashed(tag: str) -> str:
        (text,) = (
            inside
            for (name, attributes), inside in zip(page.found, page.inside, strict=True)
            if name == tag and attributes.get("type") != "application/json"
        )
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["script-src"] == hashed("script")
    assert rules["style-src"] == hashed("style")
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == ("'self'" if live else "'none'")
    assert "unsafe" not in policy


def test_the_page_names_no_address_but_in_comments() -> None:
    page = re.sub(r"/\*.*?\*/", "", render({"runs": []}), flags=re.DOTALL)
    assert sorted(set(re.findall(r"https?://[\w./]+", page))) == ["http://www.w3.org/2000/svg"]


def test_every_value_is_the_histories(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows(25), starts=[a_start(1.0)])
    with (folder / "history.csv").open("a") as file:
        file.write("26,nan,inf,-inf,,1e-05,1.5,900.0\n27,0.5")
    (shown,) = page_data([read_run(find_runs([str(folder)], tmp_path)[0])], live=False)["runs"]
    known = cells(folder)[:26]
    assert [dict(zip(shown["cells"], row, strict=True)) for row in zip(*shown["cells"].values(), strict=True)] == known
    json.dumps(shown, allow_nan=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-o", "nowhere/a.html"], "-o nowhere/a.html: no such folder: nowhere."),
        (["-o", "runs"], "-o runs: is a folder."),
        (["-o", "a.html", "--serve"], "-o and --serve: use only one"),
        (["--port", "80"], "--port 80: needs --serve."),
        (["nobody", "-o", "b.html"], "nobody: no such run"),
        ([], "report.html already exists and is not overwritten. To replace it, use -o report.html."),
    ],
)
def test_what_cannot_be_is_one_message(dtrain: Dtrain, words: list[str], told: str) -> None:
    make_run(dtrain.folder / "runs/one", rows(2))
    (dtrain.folder / "report.html").write_text("mine")
    done = dtrain("report", *words)
    assert (done.code, done.out) == (2, "")
    assert told in done.err
    assert len(done.err.splitlines()) == 1
    assert (dtrain.folder / "report.html").read_text() == "mine"
    assert not list(dtrain.folder.glob(".*"))


@pytest.mark.parametrize("verb", [["history"], ["history", "one", "--json"], ["report", "-o", "a.html"]])
def test_looking_loads_nothing_heavy(dtrain: Dtrain, verb: list[str]) -> None:
    make_run(dtrain.folder / "runs/one", rows(2))
    code = f"import sys, json\nsys.argv = ['dtrain', *{verb!r}]\nfrom dtrain.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=dtrain.folder,
        capture_output=True,
        text=True,
        check=True,
        env=clean_environment(),
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert not loaded & {"torch", "pandas", "numpy", "wandb", "accelerate", "matplotlib"}
