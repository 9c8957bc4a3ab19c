"""What `dtrain init` writes, and that it writes all of it or nothing."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import pytest
from helpers.first_minutes import TEMPLATES, read_promise

from dtrain.cli import scaffold
from dtrain.config import bundled as share
from dtrain.config import load_settings
from dtrain.config.flat import flatten
from dtrain.errors import UsageError


def test_every_template_is_known_to_the_one_who_plays_them_and_to_the_help() -> None:
    import inspect

    from dtrain.cli.init import init

    assert tuple(scaffold.templates()) == TEMPLATES
    help_text = str(inspect.signature(init, eval_str=True).parameters["template"].annotation.__metadata__[0].help)
    assert help_text.replace(" or ", ", ").rstrip(".").split(", ") == list(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_short_explained_and_promises_something(name: str, tmp_path: Path) -> None:
    files = scaffold.write(scaffold.named(name), tmp_path)
    promise = read_promise(*files)
    assert promise.least > 0
    for file in files:
        lines = file.read_text().splitlines()
        assert len(lines) < 80, f"{file.name} has {len(lines)} lines"
        assert "dtrain.recipes." not in file.read_text() or name == "image-folder", "it stands on its own"
        if file.suffix == ".py":
            tree = ast.parse(file.read_text())
            functions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
            assert all(ast.get_docstring(node) for node in [tree, *functions])
    if share.OWN_CONFIG in [file.name for file in files]:
        settings = load_settings(str(tmp_path / share.OWN_CONFIG), [], {})
        assert settings.config.recipe == "recipe.py"
        assert settings.config.train.epochs == promise.epochs


@pytest.mark.parametrize(("name", "config"), [("text", "text"), ("tabular", "diabetes"), ("image-folder", "images")])
def test_a_copy_of_a_bundled_config_holds_its_values(name: str, config: str, tmp_path: Path) -> None:
    scaffold.write(scaffold.named(name), tmp_path)
    copy = load_settings(str(tmp_path / share.OWN_CONFIG), [], {})
    bundled = load_settings(f"configs/{config}.yaml", [], {})
    differing = {
        key for key, value in flatten(bundled.config.model_dump()).items()
        if flatten(copy.config.model_dump())[key] != value
    }  # fmt: skip
    assert differing == {"recipe"}
    assert f"configs/{config}.yaml" not in (tmp_path / share.OWN_CONFIG).read_text()


def test_a_file_that_is_there_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("mine")
    with pytest.raises(UsageError, match=r"train\.yaml is already there; nothing was written.*dtrain init DIR"):
        scaffold.write(scaffold.named("function"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train.yaml"]
    assert (tmp_path / "train.yaml").read_text() == "mine"


def test_a_link_to_nowhere_is_no_free_place(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"recipe\.py is already there"):
        scaffold.write(scaffold.named("function"), tmp_path)
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "train.yaml").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"file.*cannot be written: Not a directory; nothing was written"):
        scaffold.write(scaffold.named("function"), tmp_path / "file" / "deep")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_was_written_before_a_full_disk_goes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        file = real(path, *args, **kwargs)
        if path.name != share.OWN_CONFIG or "x" not in args:
            return file
        file.close()

        class Full(io.StringIO):
            def write(self, text: str) -> int:
                raise OSError(28, "No space left on device", str(path))

        return Full()

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(UsageError, match=r"train\.yaml: cannot be written: No space left on device; nothing was"):
        scaffold.write(scaffold.named("function"), tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_template_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--template tabula: .*Did you mean 'tabular'\? Valid: function, script, "):
        scaffold.named("tabula")
