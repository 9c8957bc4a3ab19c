"""What a hook may take and return, what a callback must be, and what they may keep of a run."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dtrain
from dtrain.callbacks.media import RunMedia, png_of
from dtrain.engine.call_hooks import _add_columns, _agreed, _plain
from dtrain.engine.hooks import ARGUMENTS, Hook, check_callbacks, hooks_of, states_of
from dtrain.errors import RecipeError, StepError, UsageError, notes_of
from dtrain.layout import MEDIA
from dtrain.rundir.media import INDEX, Entry, MediaFolder, folder_of, read_media


def given(**values: Any) -> dict[str, Any]:
    return {name: lambda value=value: value for name, value in values.items()}


def test_a_function_gets_what_it_names_in_any_order() -> None:
    hook = Hook.of("after_epoch", lambda run, net, *, epoch, other=7: (run, net, epoch, other))
    assert hook(given(model="m", epoch=3, row={}, run="r")) == ("r", "m", 3, 7)
    everything = Hook.of("before_epoch", lambda epoch, **rest: (epoch, rest))
    assert everything(given(model="m", epoch=1, run="r")) == (1, {"model": "m", "run": "r"})


@pytest.mark.parametrize("function", [lambda model, logs: None, lambda run, logs, /: None])
def test_what_it_cannot_have_is_named_with_what_it_can(function: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"after_epoch \(test_hooks_contract.py:\d+\) has a parameter '(logs|run)'"
    ) as told:
        Hook.of("after_epoch", function)
    assert "model, epoch, row and run, by name and in any order" in str(told.value)


def test_one_that_raises_says_where_it_is() -> None:
    def after_epoch() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError) as raised:
        Hook.of("after_epoch", after_epoch)({})
    assert notes_of(raised.value)[0].startswith("in after_epoch (test_hooks_contract.py:")


class Idle(dtrain.Callback):
    pass


class Half(dtrain.Callback):
    def state_dict(self) -> dict[str, int]:
        return {}


class Whole(Half):
    def load_state_dict(self, state: Any) -> None:
        pass

    def after_epoch(self, model: Any, row: Any, run: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ([Idle], r"callbacks\[0\] is the class Idle. Make an object of it: Idle\(\)"),
        ([Idle(), print], r"callbacks\[1\] is a builtin_function_or_method, not a dtrain.Callback"),
        ([Half()], r"callbacks\[0\], a Half, has state_dict\(\) but no load_state_dict\(\)"),
        ({"a": 1}, r"callbacks\[0\] is a dict"),
    ],
)
def test_what_is_no_callback_is_refused(objects: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_callbacks(objects, "callbacks")


def test_only_what_is_overridden_is_called_and_states_have_names_of_their_own() -> None:
    objects = check_callbacks((Idle(), Whole(), Whole()), "callbacks")
    assert [hook.name for hook in hooks_of({}, objects, "callbacks")] == ["after_epoch"] * 2
    assert list(states_of(objects)) == ["callback Whole", "callback Whole 2"]
    assert check_callbacks(None, "callbacks") == []
    assert len(check_callbacks(Whole(), "callbacks")) == 1


def test_a_name_that_is_no_function_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"r\.py: after_epoch is a int, not a function"):
        hooks_of({"after_epoch": 3}, [], "r.py")


def test_every_hook_is_a_method_whose_parameters_it_has() -> None:
    import inspect

    for name, known in ARGUMENTS.items():
        own = set(inspect.signature(getattr(dtrain.Callback, name)).parameters) - {"self"}
        assert own <= set(known)


ROW = {"epoch": 1, "loss": 0.5, "lr": 0.1}
HOOK = Hook.of("after_epoch", lambda: None)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (3, "returned a int. It should return None, False"),
        ({"loss": 1.0}, "'loss', which the history has already. Give it another name"),
        ({"seconds": 1.0}, "'seconds', which the history has already"),
        ({3: 1.0}, "a column named 3"),
        ({"a\nb": 1.0}, "a column named"),
        ({" ": 1.0}, "a column named"),
    ],
)
def test_what_is_no_column_is_refused(returned: Any, words: str) -> None:
    with pytest.raises(StepError, match=words):
        _add_columns({}, returned, HOOK, ROW)


@pytest.mark.parametrize("value", ["0.5", None, torch.zeros(2), [1], dtrain.Mean("1", 2)])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(StepError, match="A column's value is a number"):
        _plain(value, "after_epoch (r.py:1)")


def test_numbers_of_all_kinds_are_taken() -> None:
    values = [True, 2, 0.5, np.float32(0.5), np.int64(3), torch.tensor([[2.0]], requires_grad=True)]
    assert [_plain(value, "w")[1] for value in values] == [1.0, 2.0, 0.5, 0.5, 3.0, 2.0]
    assert _plain(dtrain.Mean(torch.tensor(3.0), 2), "w") == ["w", 3.0, 2.0]


def test_ranks_agree() -> None:
    nan = float("nan")
    told = [{"a": ["w", 1.0], "m": ["w", 1.0, 1.0], "n": ["w", nan]}, {}, {"m": ["w", 8.0, 2.0], "n": ["w", nan]}]
    found = _agreed(told)
    assert found["a"] == 1.0
    assert found["m"] == 3.0
    assert np.isnan(found["n"])
    assert _agreed([{"a": ["w", 1.0]}, {"a": ["w", 1.0 + 1e-9]}]) == {"a": 1.0}, "rounding of another device"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([{"a": ["w", 1.0]}, {"a": ["w", 2.0]}], "a = 1.0 on rank 0 and 2.0 on rank 1"),
        ([{}, {"a": ["w", 1.0]}, {"a": ["w", 1.0, 2.0]}], r"a = 1.0 on rank 1 and Mean\(1.0, 2.0\) on rank 2"),
        ([{"a": ["w", 0.0, 0.0]}, {"a": ["w", 0.0, 0.0]}], "count 0 on all ranks"),
    ],
)
def test_ranks_that_do_not_agree_are_refused(told: Any, words: str) -> None:
    with pytest.raises(StepError, match=words) as raised:
        _agreed(told)
    assert raised.value.on_all_ranks


# --- images and the like ---------------------------------------------------------------------------------


def pixels(image: Any) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png_of(image, "i"))).convert("RGB"))


def test_images_of_all_forms_have_the_same_pixels() -> None:
    known = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    forms = [
        known,
        torch.from_numpy(known),
        known.transpose(2, 0, 1),
        torch.from_numpy(known.transpose(2, 0, 1).astype(np.float32) / 255).requires_grad_(),
        known.astype(np.int64),
        Image.fromarray(known),
    ]
    for form in forms:
        assert np.array_equal(pixels(form), known)
    gray = known[..., 0]
    for form in (gray, gray[None], gray[..., None], gray / 255, torch.from_numpy(gray)):
        assert np.array_equal(pixels(form), np.repeat(gray[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((2, 5, 7)), r"shape \(2, 5, 7\): no dimension is of 1, 3 or 4 channels"),
        (np.zeros(5), r"a ndarray of shape \(5,\)"),
        (np.full((2, 2), 7.5), "values from 7.5 to 7.5"),
        (np.full((2, 2), -3), "values from -3 to -3"),
        (np.array([["a"]]), "should be a figure"),
        ([[1, 2], [3]], "is a list"),
        (np.zeros((0, 3)), "should be a figure"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        png_of(image, "i")


def test_what_is_kept_is_found_again_and_what_is_computed_again_goes(tmp_path: Path) -> None:
    media = RunMedia(tmp_path, 0, None)
    (tmp_path / "table.csv").write_text("a,b\n")
    for step in (2, 4, 6):
        media.add("histogram", "w/bias", torch.tensor([1.0, 2.0, float("nan")]), epoch=step // 2, step=step)
        media.add("text", "a note", f"at {step} \u2713", epoch=step // 2, step=step)
        media.add("image", "x", np.zeros((2, 2), np.uint8), epoch=step // 2, step=step)
        media.add("file", "table.csv", tmp_path / "table.csv", epoch=step // 2, step=step)
    found = read_media(tmp_path)
    assert [(one.kind, one.name, one.step) for one in found[:4]] == [
        ("histogram", "w/bias", 2),
        ("text", "a note", 2),
        ("image", "x", 2),
        ("file", "table.csv", 2),
    ]
    assert sum(found[0].counts) == 2
    assert found[0].edges[0] == 1.0
    assert (tmp_path / MEDIA / found[1].file).read_text() == "at 2 \u2713"
    MediaFolder(tmp_path, 4)
    assert [one.step for one in read_media(tmp_path)] == [2] * 4 + [4] * 4


def test_a_disk_that_takes_none_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    media = RunMedia(tmp_path, 0, None)
    (tmp_path / MEDIA).write_text("in the way")
    for step in (1, 2):
        media.add("text", "a", "b", epoch=1, step=step)
    assert caplog.text.count("cannot be saved in") == 1


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"kind": "image", "name": "a", "epoch": 1, "step": 2, "file": "../x"}', "3"]
)
def test_a_damaged_index_hides_no_other_line(tmp_path: Path, line: str) -> None:
    MediaFolder(tmp_path).add(Entry("text", "a", 1, 1), b"x", ".txt")
    with (tmp_path / MEDIA / INDEX).open("a") as file:
        file.write(f"{line}\n")
    MediaFolder(tmp_path, 9).add(Entry("text", "b", 1, 2), b"x", ".txt")
    assert [one.name for one in read_media(tmp_path)] == ["a", "b"]


def half(descriptor: int, data: bytes) -> int:
    """A write on a disk that is full after a part of it."""
    return os.pwrite(descriptor, data[: len(data) // 2], os.fstat(descriptor).st_size)


def test_an_entry_that_was_cut_by_a_full_disk_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    media = RunMedia(tmp_path, 0, None)
    media.add("histogram", "a", [1.0], epoch=1, step=1)
    with monkeypatch.context() as full:
        full.setattr("dtrain.files.os.write", half)
        media.add("histogram", "b", [1.0], epoch=1, step=2)
    media.add("histogram", "c", [1.0], epoch=1, step=3)
    assert [one.name for one in read_media(tmp_path)] == ["a", "c"]
    assert "histogram 'b' cannot be saved" in caplog.text and "is the disk full?" in caplog.text


def test_of_an_index_beyond_the_bound_the_end_is_read_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = MediaFolder(tmp_path)
    for step in range(1, 10):
        folder.add(Entry("text", "a", 1, step), b"x", ".txt")
    index = tmp_path / MEDIA / INDEX
    line = index.stat().st_size // 9
    for most, first in ((3 * line, 7), (3 * line + 1, 7), (4 * line - 1, 7)):
        monkeypatch.setattr("dtrain.rundir.media._MOST_INDEX", most)
        assert [one.step for one in read_media(tmp_path)] == list(range(first, 10))
    (said,) = caplog.messages
    assert f"{index} is larger than {3 * line:,} bytes: what its first {6 * line:,} bytes list is not shown" in said
    MediaFolder(tmp_path, 8)
    assert [json.loads(one)["step"] for one in index.read_text().splitlines()] == list(range(1, 9))
    with index.open("a") as file:
        file.write("x" * (3 << 20) + "\n")
    folder.add(Entry("text", "a", 1, 9), b"x", ".txt")
    monkeypatch.setattr("dtrain.rundir.media._MOST_INDEX", 64 << 20)
    assert [one.step for one in read_media(tmp_path)] == list(range(1, 10)), "a line without a bound is no line"


def test_a_file_is_copied_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 9
    (tmp_path / "it.bin").write_bytes(data)
    monkeypatch.setattr("dtrain.callbacks.media._PART", 1000)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("it may be larger than the memory"))
    media = RunMedia(tmp_path, 0, None)
    media.add("file", "it.bin", tmp_path / "it.bin", epoch=1, step=4)
    monkeypatch.undo()
    (entry,) = read_media(tmp_path)
    assert (tmp_path / MEDIA / entry.file).read_bytes() == data
    with pytest.raises(UsageError, match=r"no\.bin: cannot read the file: No such file"):
        media.add("file", "no.bin", tmp_path / "no.bin", epoch=1, step=4)


def test_no_name_leads_out_of_the_folder_or_to_another_ones() -> None:
    names = ["a", "a b", "a/b", "../a", "..", "", ".a", INDEX, "a" * 300, "\u56fe"]
    folders = [folder_of(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all("/" not in one and one not in ("", ".", "..", INDEX) and not one.startswith(".") for one in folders)


def test_nothing_is_written_through_a_planted_link(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    (run / MEDIA).symlink_to(other)
    RunMedia(run, 0, None).add("text", "a", "b", epoch=1, step=1)
    assert list(other.iterdir()) == []
