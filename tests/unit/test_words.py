"""Exceptions in words: whose fault, one word for the cause, what is folded away."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import dtrain
from dtrain import errors
from dtrain.errors import NotFiniteError, add_place, keep_reserve, make_room, place_of
from dtrain.launch.monitor.describe import cause_of, explain


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("Connection closed by peer"), "exception"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), "peer"),
        (ConnectionResetError("Connection reset by peer"), "peer"),
        (MemoryError(), "out_of_memory"),
        (OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory"),
        (NotFiniteError("nan"), "nan"),
        (SystemExit(3), "exit"),
    ],
)
def test_one_word_for_an_exception(error: BaseException, cause: str) -> None:
    assert cause_of(error) == cause


def test_frames_of_torch_are_counted_and_the_place_is_told_once() -> None:
    try:
        nn.Linear(2, 2)(torch.ones(3, 3))
    except RuntimeError as error:
        add_place(error, "rank 1, epoch 2, train step 3")
        found = explain(error)
        assert explain(error) == found, "to describe an exception does not change it"
    assert "frames of torch\n" in found.told.traceback
    assert "torch/nn" not in found.told.traceback
    assert Path(__file__).name in found.told.traceback
    assert found.text.count("rank 1, epoch 2") == 1
    assert found.told.type == "RuntimeError"


def test_of_memory_errors_that_follow_one_another_the_first_tells_whose_it_is() -> None:
    def users() -> None:
        raise MemoryError from None

    bare = MemoryError()  # without a traceback, for want of memory

    source = "def ours(step):\n    try:\n        step()\n    except MemoryError:\n        raise MemoryError\n"
    names: dict[str, Callable[..., None]] = {}
    exec(compile(source, str(Path(dtrain.__file__).parent / "steps.py"), "exec"), names)  # noqa: S102
    with pytest.raises(MemoryError) as caught:
        names["ours"](users)
    first = caught.value.__context__
    assert first is not None
    first.__context__ = bare
    last = caught.value.with_traceback(caught.tb.tb_next)  # without the frame of this test itself
    add_place(last, "rank 0, epoch 2, valid step 3")
    found = explain(last)
    assert "MemoryError, raised by your code\n  at rank 0, epoch 2, valid step 3" in found.text
    assert found.told.cause == "out_of_memory"
    assert "users" in found.told.traceback
    assert found.text.count("MemoryError") == 3, "the line that raises it, its own, and the summary"


class Place:
    """One whose words take memory that is there only once some was given back."""

    def __str__(self) -> str:
        if errors._reserve:
            raise MemoryError
        return "rank 1, epoch 2, train step 3"


def test_the_place_of_a_memory_error_is_put_into_words_once_there_is_memory_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(errors, "_reserve", [])
    keep_reserve()
    error = MemoryError()
    add_place(error, Place())
    assert place_of(error) == "rank 1, epoch 2, train step 3"


def test_what_the_calls_of_the_first_memory_error_hold_is_given_back() -> None:
    class Held:
        pass

    def users() -> None:
        held = Held()
        there.append(weakref.ref(held))
        raise MemoryError

    def cleans_up() -> None:
        try:
            users()
        finally:
            raise MemoryError  # as clean-up does where there is no memory

    there: list[weakref.ref[Held]] = []
    with pytest.raises(MemoryError) as caught:
        cleans_up()
    assert there[0]() is not None
    make_room(caught.value)
    assert there[0]() is None
