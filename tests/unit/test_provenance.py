"""Which sources belong to a recipe, as they were loaded; how two versions of one are compared; what a run keeps."""

from __future__ import annotations

import ast
import importlib
import os
import sys
import textwrap
import zipimport
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.checkpoint.code import code_differences, code_facts
from dtrain.config import load_settings
from dtrain.errors import CheckpointError, RecipeError
from dtrain.provenance import kept
from dtrain.provenance.code import Code, content_hash
from dtrain.provenance.kept import holds_copies_alone, keep, newest, read_kept
from dtrain.provenance.trees import first_change, imports_in_functions
from dtrain.provenance.variables import variable_hashes
from dtrain.recipe.loader import load_recipe

RECIPE = textwrap.dedent(
    """
    import importlib.util
    from pathlib import Path
    import helper_of_mine
    from package_of_mine.deep import layer

    spec = importlib.util.spec_from_file_location("by_path", Path(__file__).parent / "other" / "by_path.py")
    by_path = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(by_path)

    def train_step(model):
        import late_of_mine
        return late_of_mine.VALUE, helper_of_mine.VALUE
    """
)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A recipe with neighbours of every kind; nothing of it stays imported."""
    before, path = set(sys.modules), list(sys.path)
    for name in ("helper_of_mine.py", "late_of_mine.py", "package_of_mine/deep.py", "other/by_path.py", "unused.py"):
        file = tmp_path / "project" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("VALUE = 1\n\ndef layer():\n    return VALUE\n")
    (tmp_path / "project/package_of_mine/__init__.py").touch()
    (tmp_path / "project/mine.py").write_text(RECIPE)
    yield tmp_path / "project"
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    sys.path[:] = path


def load(project: Path) -> Code:
    return load_recipe("mine.py", project).code


AT_FIRST = {"mine.py", "helper_of_mine.py", "package_of_mine/__init__.py", "package_of_mine/deep.py", "by_path.py"}
AT_FIRST |= {"late_of_mine.py"}  # which a function imports, in a worker maybe


def test_what_was_loaded_counts_and_not_what_the_file_has_become(project: Path) -> None:
    recipe = load_recipe("mine.py", project)
    code = recipe.code
    assert set(code.files) == AT_FIRST
    for name in AT_FIRST - {"late_of_mine.py"}:
        code.places[name].write_text("edited = 1\n")
    assert code.files["mine.py"].decode() == RECIPE
    assert not code.update(), "nothing was loaded since"
    (project / "late_of_mine.py").write_text("VALUE = 2\n")
    recipe.module.train_step(None)
    assert code.update() and code.files["late_of_mine.py"] == b"VALUE = 2\n", "what was loaded, once it was"
    (project / "late_of_mine.py").write_text("VALUE = 3\n")
    importlib.reload(sys.modules["late_of_mine"])
    assert code.update() and code.files["late_of_mine.py"] == b"VALUE = 3\n"
    (project / "by_name_of_mine.py").write_text("")
    importlib.import_module("by_name_of_mine")
    assert code.update() and set(code.files) == AT_FIRST | {"by_name_of_mine.py"}


def test_a_stale_pyc_is_not_what_runs(project: Path) -> None:
    """An edit of the same length within the second leaves a .pyc that Python takes for current."""
    import py_compile

    helper = project / "helper_of_mine.py"
    times = helper.stat()
    py_compile.compile(str(helper))
    helper.write_text(helper.read_text().replace("= 1", "= 2"))
    os.utime(helper, ns=(times.st_atime_ns, times.st_mtime_ns))
    code = load(project)
    assert sys.modules["helper_of_mine"].VALUE == 2 and b"VALUE = 2" in code.files["helper_of_mine.py"]


@pytest.mark.parametrize("kind", ["zip", "pyc", "zip of pyc"])
def test_modules_without_a_source_file_belong_to_it(project: Path, tmp_path: Path, kind: str) -> None:
    import py_compile
    import zipfile

    moments = iter(range(1_700_000_000, 1_700_000_009))  # of which a .pyc has one, and that does not count

    def put(value: int) -> None:
        source = tmp_path / "part_of_mine.py"
        source.write_text(f"VALUE = {value}\n")
        os.utime(source, (moment := next(moments), moment))
        name = "part_of_mine.py"
        if "pyc" in kind:
            name = "part_of_mine.pyc"
            py_compile.compile(str(source), str(tmp_path / name), doraise=True)
        if "zip" in kind:
            with zipfile.ZipFile(project / "parts.zip", "w") as archive:
                archive.write(tmp_path / name, name)
        else:
            (tmp_path / name).replace(project / name)
        source.unlink(missing_ok=True)

    def loaded() -> Code:
        sys.modules.pop("part_of_mine", None)
        sys.path_importer_cache.clear()
        zipimport._zip_directory_cache.clear()  # type: ignore[attr-defined]
        return load(project)

    sys.path.insert(0, str(project / "parts.zip"))
    (project / "mine.py").write_text("import part_of_mine\n")
    name = "part_of_mine.pyc" if "pyc" in kind else "part_of_mine.py"
    put(1)
    code = loaded()
    assert set(code.files) == {"mine.py", name}
    there = code_facts(code, tmp_path)
    put(1)
    assert differences(there, loaded(), tmp_path) == []
    put(2)
    what = "its content" if "pyc" in kind else "line 1: `VALUE = 2`"
    assert differences(there, loaded(), tmp_path) == [f"{name} has changed: {what}"]
    del code.files[name]  # as where a function imports it later, and has not yet
    assert differences(there, code, tmp_path) == [f"{name} has changed: {what}"]


def test_modules_that_were_imported_before_belong_to_the_next_recipe_too(project: Path) -> None:
    first = load(project)
    second = load(project)
    assert set(second.files) == set(first.files) and second.hashes() == first.hashes()


def test_a_recipe_that_is_a_module(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    (project / "package_of_mine/mine.py").write_text("from package_of_mine import deep\nimport helper_of_mine\n")
    code = load_recipe("package_of_mine.mine", Path()).code
    assert set(code.files) == {
        "package_of_mine/mine.py",
        "package_of_mine/__init__.py",
        "package_of_mine/deep.py",
        "helper_of_mine.py",
    }
    assert code.name == "package_of_mine/mine.py"
    assert load_recipe("dtrain.recipes.text", Path()).code.files.keys() == {"dtrain/recipes/text.py"}


def test_what_is_installed_is_no_part_of_a_recipe_unless_it_is_the_recipe(project: Path) -> None:
    site = project / "lib/site-packages"
    site.mkdir(parents=True)
    sys.path.insert(0, str(site))
    (site / "installed_of_mine.py").write_text("x = 1\n")
    (site / "pack_of_mine").mkdir()
    (site / "pack_of_mine/__init__.py").write_text("")
    (site / "pack_of_mine/recipe.py").write_text("import installed_of_mine\nfrom pack_of_mine import part\n")
    (site / "pack_of_mine/part.py").write_text("")
    (project / "mine.py").write_text("import installed_of_mine, torch\n")
    assert set(load(project).files) == {"mine.py"}
    found = set(load_recipe("pack_of_mine.recipe", project).code.files)
    assert found == {"pack_of_mine/recipe.py", "pack_of_mine/part.py", "pack_of_mine/__init__.py"}


def differences(there: dict[str, Any], code: Code, run: Path) -> list[str]:
    return code_differences({"code": there}, code, run)


def test_each_changed_file_is_named_with_its_first_change(project: Path, tmp_path: Path) -> None:
    recipe = load_recipe("mine.py", project)
    recipe.module.train_step(None)
    there = code_facts(recipe.code, tmp_path)
    assert there["kept"] == "1" and set(there["files"]) == AT_FIRST
    for name in list(sys.modules):
        if name.endswith("_of_mine") or name.startswith("package_of_mine"):
            del sys.modules[name]
    assert differences(there, load(project), tmp_path) == []
    (project / "late_of_mine.py").write_text("VALUE = 2\n")  # not imported again yet
    (project / "mine.py").write_text(f"# a comment\n{RECIPE}".replace("return late", "return 1 + late"))
    assert differences(there, load(project), tmp_path) == [
        "late_of_mine.py has changed: line 1: `VALUE = 2`",
        "mine.py has changed: train_step, line 14: `return 1 + late_of_mine.VALUE, helper_of_mine.VALUE`",
    ]
    (tmp_path / "code/1/mine.py").write_text("planted = 1\n")
    assert "its copy is missing" in differences(there, load(project), tmp_path)[1]


def test_a_manifest_cannot_name_files_elsewhere(project: Path, tmp_path: Path) -> None:
    there = code_facts(load(project), tmp_path)
    for name in ("../mine.py", "/etc/passwd"):
        with pytest.raises(CheckpointError, match="outside of its run's folder"):
            differences({**there, "files": {name: "0"}}, load(project), tmp_path)
    (project / "mine.py").write_text(RECIPE + "x = 1\n")
    assert "its copy is missing" in differences({**there, "kept": "../code/1"}, load(project), tmp_path)[0]


def test_a_module_that_takes_anothers_place_is_named(project: Path, tmp_path: Path) -> None:
    there = code_facts(load(project), tmp_path)
    (project / "helper_of_mine").mkdir()
    (project / "helper_of_mine.py").rename(project / "helper_of_mine/__init__.py")
    del sys.modules["helper_of_mine"]
    importlib.invalidate_caches()
    found = differences(there, load(project), tmp_path)
    assert found[0].startswith("helper_of_mine.py is gone, and ") and found[0].endswith("is imported instead")
    assert found[1:] == ["helper_of_mine/__init__.py is imported now and was not before"]
    there["files"] = {"mine.py": there["files"]["mine.py"]}
    assert "package_of_mine/deep.py is imported now and was not before" in differences(there, load(project), tmp_path)


# --- trees ----------------------------------------------------------------------------------------------

OLD = '''
"""A module."""
import os

class Net:
    size = 3

    def forward(self, x):
        y = x + 1
        return y

def step(model, x=1):
    return model(x)
'''


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("y = x + 1", "y = x + 2", "Net.forward, line 9: `y = x + 2`"),
        ("size = 3", "size = 4", "Net, line 6: `size = 4`"),
        ("x=1", "x=2", "step, line 12: `def step(model, x=2):`"),
        ("class Net:", "class Net(dict):", "Net, line 5: `class Net(dict):`"),
        ("    return model(x)\n", "    return model(x)\n\nz = 1\n", "line 15: `z = 1`"),
        ("        return y\n", "", "Net.forward, its end is gone"),
        ("\ndef step(model, x=1):\n    return model(x)\n", "", "step is gone"),
        ('"""A module."""', '"""The module."""', 'line 2: `"""The module."""`'),
        ("import os", "import sys", "line 3: `import sys`"),
        ("y = x + 1", "y = x +", "its content"),
    ],
)
def test_the_first_change_is_told(old: str, new: str, told: str) -> None:
    assert first_change(OLD.encode(), OLD.replace(old, new).encode()) == told


def test_what_python_warns_of_is_not_said_again(recwarn: pytest.WarningsRecorder) -> None:
    source = b"def f():\n    import a\n    return '\\d', os.environ['X']\n"
    assert imports_in_functions(source, "x.py") == {"a"} and variable_hashes([source], {}) == {"X": ""}
    assert first_change(source, source + b"x = 1\n") and not recwarn.list


@settings(max_examples=25)
@given(st.data())
def test_comments_blank_lines_and_quotes_are_no_change(data: st.DataObject) -> None:
    lines = []
    for line in OLD.splitlines():
        lines += data.draw(st.lists(st.sampled_from(["", "# so", "   "]), max_size=2))
        lines.append(line + data.draw(st.sampled_from(["", "  ", "  # and so"])) * (not line.startswith('"')))
    assert first_change(OLD.encode(), "\r\n".join([*lines, ""]).encode()) == ""
    assert first_change(OLD.encode(), ast.unparse(ast.parse(OLD)).encode()) == ""


@settings(max_examples=10)
@given(st.integers(2, 1000))
def test_a_changed_number_is_a_change(number: int) -> None:
    assert str(number) in first_change(OLD.encode(), OLD.replace("x + 1", f"x + {number}").encode())


def test_imports_within_functions_are_found() -> None:
    source = (
        b"import top\ndef f():\n    import a.b, c\n    from . import d\n    from ..e import g\n    from h import i\n"
    )
    found = imports_in_functions(source, "p/q/r.py")
    assert found == {"a", "a.b", "c", "p", "p.q", "p.q.d", "p.e", "p.e.g", "h", "h.i"}
    assert imports_in_functions(b"def f(:", "x.py") == set()


# --- kept -----------------------------------------------------------------------------------------------


def test_each_state_is_kept_once_and_their_number_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_MOST_STATES", 3)
    one, two = {"a.py": b"1", "b/c.py": b"2"}, {"a.py": b"1", "b/c.py": b"3"}
    assert [keep(tmp_path, files) for files in (one, one, two, two, one)] == ["1", "1", "2", "2", "3"]
    assert keep(tmp_path, {**one, "late.py": b"4"}) == "3", "which was imported later"
    assert read_kept(tmp_path / "code/3", "late.py", content_hash(b"4")) == b"4"
    assert keep(tmp_path, two) == "4" and newest(tmp_path) == tmp_path / "code/4"
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == ["2", "3", "4"]
    assert holds_copies_alone(tmp_path / "code")
    (tmp_path / "code/thesis.tex").touch()
    assert not holds_copies_alone(tmp_path / "code")


def test_a_copy_that_a_full_disk_has_cut_is_not_believed(tmp_path: Path) -> None:
    files = {"a.py": b"x = 1\n", "late.py": b"y = 2\n"}
    keep(tmp_path, {"a.py": files["a.py"]})
    (tmp_path / "code/1/late.py").write_bytes(b"y")
    (tmp_path / "code/.2.part").mkdir()
    assert keep(tmp_path, files) == "2"
    assert all(read_kept(tmp_path / "code/2", name, content_hash(data)) == data for name, data in files.items())
    assert {path.name for path in (tmp_path / "code").iterdir()} == {"1", "2"}


def test_what_others_may_not_read_they_may_not_read_in_the_copy(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("open.py", "private.py", "gone.py")}
    for name, mode in (("open.py", 0o644), ("private.py", 0o600)):
        places[name].touch(mode)
    assert keep(tmp_path, dict.fromkeys(places, b"x = 1\n"), places) == "1"
    modes = {name: (tmp_path / "code/1" / name).stat().st_mode & 0o777 for name in places}
    assert modes == {"open.py": 0o644, "private.py": 0o600, "gone.py": 0o600}


def test_what_cannot_be_kept_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert keep(tmp_path, {"a.py": b"x" * (21 << 20)}) is None and "too large to copy" in caplog.text
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "code").symlink_to(tmp_path / "elsewhere")
    assert keep(tmp_path, {"a.py": b"x"}) is None and "it is a symbolic link" in caplog.text
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_planted_link_is_neither_read_nor_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"1")
    keep(tmp_path, {"a.py": b"1"})
    (tmp_path / "code/1/a.py").unlink()
    (tmp_path / "code/1/a.py").symlink_to(secret)
    assert read_kept(tmp_path / "code/1", "a.py", content_hash(b"1")) is None
    assert keep(tmp_path, {"a.py": b"2"}) == "2" and secret.read_bytes() == b"1"


def test_a_recipe_that_is_gone_has_a_copy_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtrain.cli.train import read_target

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/it").mkdir(parents=True)
    keep(tmp_path / "runs/it", {"gone.py": b"x = 1\n"})
    with pytest.raises(RecipeError, match=r"gone\.py: no such file .* recipe=runs/it/code/1/gone\.py trains with it"):
        read_target(["gone.py", "run.name=it"])
    assert read_target(["recipe=runs/it/code/1/gone.py", "run.name=it"]).config.run.name == "it"
    assert load_settings("gone.py", ["run.name=it"], environ={}).plain()["recipe"] == str(tmp_path / "gone.py")
