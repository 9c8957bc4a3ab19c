"""What is copied of a recipe's code, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.errors import UsageError
from dtrain.slurm import freeze
from dtrain.slurm.freeze import find_code


def write(folder: Path, *names: str, text: str = "x = 1\n") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write(tmp_path, "mine.py", "util.py", "labels.txt", "nets/__init__.py", "nets/deep/cnn.py", "nets/cnn.py")
    write(tmp_path, "nets/sizes.json", "nets/fast.so", "data/a.txt", "data/b.csv", "notes.md", ".git/hook.py")
    write(tmp_path, "runs/it/slurm/code/mine.py", "old/slurm/job.json", "old/lost.py", "__pycache__/mine.py")
    write(tmp_path, "venv/pyvenv.cfg", "venv/lib.py", "empty.d/x.py")
    return tmp_path


def test_what_can_be_imported_is_copied_with_the_small_files_beside_it(project: Path, tmp_path: Path) -> None:
    (project / "big.txt").write_bytes(b"x" * ((1 << 20) + 1))
    (project / "nets/loop").symlink_to(project / "nets")
    (project / "gone.py").symlink_to(project / "nowhere")
    code = find_code(project / "mine.py")
    names = {"mine.py", "util.py", "labels.txt", "nets/__init__.py", "nets/deep/cnn.py", "nets/cnn.py"}
    assert set(map(str, code.files)) == names | {"nets/sizes.json", "nets/fast.so"}
    assert code.left == ("big.txt", "data", "empty.d", "gone.py", "notes.md", "old", "runs", "venv")
    copy = code.copy_to(tmp_path / "to")
    assert copy == tmp_path / "to/mine.py"
    assert sorted(str(p.relative_to(tmp_path / "to")) for p in (tmp_path / "to").rglob("*") if p.is_file()) == sorted(
        map(str, code.files)
    )
    assert "copied: 8 files" in code.told()
    assert "not copied: big.txt, data" in code.told()


def test_a_recipe_that_looks_for_its_place_is_told(project: Path) -> None:
    assert "__file__" not in find_code(project / "mine.py").told()
    write(project, "nets/cnn.py", text="here = __file__\n")
    assert "nets/cnn.py may look up files by __file__" in find_code(project / "mine.py").told()


@pytest.mark.parametrize(
    ("limit", "words"), [("_MOST_FILES", "8 files"), ("_MOST_BYTES", "at most"), ("_MOST_SEEN", "beside")]
)
def test_too_much_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch, limit: str, words: str) -> None:
    monkeypatch.setattr(freeze, limit, 7)
    with pytest.raises(UsageError, match=words):
        find_code(project / "mine.py")


def test_a_linked_recipe_is_copied_from_where_it_lies(project: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link.py").symlink_to(project / "mine.py")
    code = find_code(tmp_path / "elsewhere/link.py")
    assert code.recipe == (project / "mine.py").resolve()
    assert Path("util.py") in code.files


def test_a_copy_finds_data_by_its_own_place(project: Path, tmp_path: Path) -> None:
    """Beside the recipe, and above it in its project; the folder of runs, in which the copy is, is no part of it."""
    write(project, "src/train/mine.py", text="here = __file__\n")
    write(project, "src/common/net.py", "src/train/data/a.bin", "pyproject.toml")
    code = find_code(project / "src/train/mine.py")
    to = project / "runs/new/slurm/code"
    copy = code.copy_to(to)
    assert copy == to / "src/train/mine.py" and not copy.is_symlink()
    assert (
        (copy.parent / "data/a.bin").exists() and (to / "data/b.csv").exists() and (to / "src/common/net.py").exists()
    )
    assert (to / "data").is_symlink() and not (to / "runs").exists() and not (to / "venv/runs").exists()
    assert code.name == "src/train/mine.py"
