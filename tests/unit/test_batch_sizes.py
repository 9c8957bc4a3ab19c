"""A batch's size and how it is cut and joined: known for every kind of batch, or refused in words that help."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.batch_forms import FORMS, IMAGES, built, equal, graphs, numbers, packed, targets
from helpers.batch_kinds import Encoding, Graph
from helpers.sweep import FULL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from dtrain.data.batches import BatchFunctions, BatchReader
from dtrain.data.partition import part_of
from dtrain.errors import DataError, UsageError

EXAMPLES = settings(max_examples=400 if FULL else 60, deadline=None)


@EXAMPLES
@given(form=st.tuples(st.just("tuple"), st.lists(FORMS, min_size=1, max_size=3)), n=st.integers(4, 11), data=st.data())
def test_parts_that_are_joined_again_are_the_batch(form: Any, n: int, data: Any) -> None:
    """Beside a tensor of labels, so that the number of samples is clear; n is none of the images' channels."""
    generator = torch.Generator().manual_seed(n)
    batch = (*built(form, generator, n), torch.arange(n))
    size = data.draw(st.integers(1, n))
    reader = BatchReader(ranks=size)
    assert reader.size_of(batch) == n
    parts = [reader.cut(batch, *part_of(n, rank, size)) for rank in range(size)]
    for rank, part in enumerate(parts):
        start, stop = part_of(n, rank, size)
        assert part[-1].tolist() == list(range(start, stop))
        assert len(part) == len(batch)
        assert [type(one) for one in part] == [type(one) for one in batch]
    assert equal(reader.join(parts), batch)


@EXAMPLES
@given(form=FORMS, sizes=st.lists(st.integers(4, 9), min_size=2, max_size=4))
def test_a_stream_of_batches_is_counted_alike(form: Any, sizes: list[int]) -> None:
    reader = BatchReader(fixed=True)
    generator = torch.Generator().manual_seed(1)
    for n in sizes:
        assert reader.size_of((built(form, generator, n), numbers(generator, n, 2))) == n


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.ones(5, 2), 5),
        ((torch.ones(5, 2), torch.ones(5)), 5),
        ([torch.ones(5, 2), torch.ones(5, 1)], 5),
        ({"x": torch.ones(5, 2), "name": "a", "rate": 0.1, "scale": torch.tensor(1.0)}, 5),
        ({"x": torch.ones(5, 2), "names": ["a"] * 7}, 5),
        ({"texts": ["a", "b", "c"]}, 3),
        ((IMAGES[:4], torch.ones(4)), 4),
        ((IMAGES[:4], targets(torch.Generator(), 4)), 4),
        ((tuple(IMAGES[:3]), (7, 8, 9)), 3),
        ({"images": IMAGES[:5]}, 5),
        (([torch.ones(6, 2), torch.ones(6, 3)], torch.ones(6)), 6),  # two inputs
        ([{"x": torch.ones(3, 4, 5), "y": 1}, {"x": torch.ones(3, 4, 5), "y": 0}], 2),
        ([torch.ones(7, 2), torch.ones(4, 2)], 2),  # sequences
        ((torch.ones(6, 2), torch.ones(2, 6).T), 6),
        (packed(torch.Generator().manual_seed(1), 5), 5),
        (graphs(torch.Generator().manual_seed(1), 5), 5),
        (np.ones((5, 2)), 5),
        (Encoding({"input_ids": torch.ones(4, 7)}), 4),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else type(value).__name__,
)
def test_sizes_that_are_known(batch: Any, size: int) -> None:
    assert BatchReader().size_of(batch) == size


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ((torch.ones(7, 4, 8), torch.ones(4)), r"batch\[0\] \(7, 4, 8\), batch\[1\] \(4,\)"),  # time first
        ({"x": torch.ones(4, 8), "weights": torch.ones(3)}, r"batch\['weights'\] \(3,\)"),
        ((torch.ones(4, 8), torch.ones(9, 6)), "differ"),  # boxes of all images in one tensor
        (([torch.ones(5, 2), torch.ones(5, 2)],), "may be 2 or 5"),
        (IMAGES[:4], "a list of samples or of parts"),
        ({"name": "abc"}, "no tensor"),
        ((torch.tensor(1.0), torch.tensor(2.0)), "no tensor"),
        (Graph(torch.ones(3, 2), torch.ones(2, 1)), "no tensor"),
    ],
    ids=["time-first", "weights", "boxes", "list", "images", "text", "0-d", "object"],
)
def test_sizes_that_are_not_known_are_refused_with_what_to_define(batch: Any, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        BatchReader(split="valid").size_of(batch)
    assert "in a batch of the valid loader" in str(caught.value)
    assert "def batch_size(batch): return " in str(caught.value)
    known = BatchReader(BatchFunctions(lambda batch: 6))
    assert known.size_of(batch) == 6


def test_what_two_batches_show_of_each_other() -> None:
    """A size that was clear by accident is not used on in silence."""
    for first, second in (
        (
            (torch.ones(4, 4, 2), torch.ones(4)),
            (torch.ones(6, 4, 2), torch.ones(4)),
        ),  # time first, as long as the batch
        ((torch.ones(4, 2), torch.ones(4)), (torch.ones(2, 2), torch.ones(4))),  # class weights
        ([torch.ones(3, 5, 5), torch.ones(3, 5, 5)], [torch.ones(3, 5, 5)]),  # images, of equal size
        (({"x": IMAGES[:3]},), ({"x": [one[:2] for one in IMAGES[:3]]},)),  # what looked like samples
    ):
        reader = BatchReader()
        reader.size_of(first)
        with pytest.raises(DataError, match="is not known"):
            reader.size_of(second)


def test_a_list_of_images_is_never_cut_between_channels() -> None:
    """Of equal size, in a list that is the batch itself: on one rank of no matter, where all batches are as long."""
    batch = [torch.ones(3, 5, 5)] * 4
    reader = BatchReader(ranks=2)
    assert reader.size_of(batch) == 3
    with pytest.raises(DataError, match="Yield a tuple where it is parts"):
        reader.cut(batch, 0, 2)
    assert [tuple(one.shape) for one in BatchReader(ranks=2).cut(tuple(batch), 0, 2)] == [(2, 5, 5)] * 4
    assert [tuple(one.shape) for one in BatchReader(ranks=2, fixed=True).cut(batch, 0, 2)] == [(2, 5, 5)] * 4
    own = BatchReader(BatchFunctions(len), ranks=2)
    assert (own.size_of(batch), len(own.cut(batch, 0, 2)), len(own.cut(IMAGES[:5], 3, 5))) == (4, 2, 2)


def test_numbers_that_were_as_many_as_the_samples_by_accident_are_not_kept_whole() -> None:
    """The size of the images, beside two of them, and then beside three."""
    reader = BatchReader(ranks=2)
    assert reader.cut((torch.ones(2, 4), (224, 224)), 0, 1)[1] == (224,)
    with pytest.raises(DataError, match="was as long as an earlier batch and is not as long as this one"):
        reader.cut((torch.ones(3, 4), (224, 224)), 0, 1)
    other = BatchReader(ranks=2)
    assert other.cut((torch.ones(3, 4), (224, 224)), 0, 1)[1] == (224, 224)
    assert other.cut((torch.ones(2, 4), (224, 224)), 0, 1)[1] == (224, 224)


def test_packed_sequences_in_order_stay_so_where_they_can() -> None:
    longest_first = pack_sequence([torch.arange(float(n)) for n in (4, 3, 1)])
    reader = BatchReader(ranks=2)
    part = reader.cut((longest_first, torch.ones(3)), 1, 3)[0]
    assert equal(part, pack_sequence([torch.arange(3.0), torch.arange(1.0)]))
    joined = reader.join([(longest_first, torch.ones(3))] * 2)[0]
    assert [len(one) for one in unpack_sequence(joined)] == [4, 3, 1, 4, 3, 1]


def test_the_number_of_views_may_vary_beside_labels() -> None:
    reader = BatchReader(ranks=2)
    for views in (2, 3, 1):
        batch = ([torch.ones(6, 4)] * views, torch.ones(6))
        assert reader.size_of(batch) == 6
        assert [tuple(one.shape) for one in reader.cut(batch, 0, 2)[0]] == [(2, 4)] * views


def test_a_list_keeps_the_meaning_that_another_batch_gave_it() -> None:
    reader = BatchReader(ranks=2)
    assert reader.size_of(([torch.ones(6, 2), torch.ones(6, 3)], torch.ones(6))) == 6
    inputs, labels = reader.cut(([torch.ones(2, 2), torch.ones(2, 3)], torch.ones(2)), 0, 1)
    assert [tuple(one.shape) for one in inputs] == [(1, 2), (1, 3)]
    assert len(labels) == 1


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ((Graph(torch.ones(4, 2), torch.ones(2, 1)), torch.ones(4)), "of a type unknown to dtrain"),
        (([torch.ones(2, 5), torch.ones(2, 5)], torch.ones(2)), "a list of samples, or of parts"),
        ((type("Bare", (), {"num_graphs": 4})(), torch.ones(4)), "has no to_data_list"),
    ],
    ids=["object", "list", "graphs"],
)
def test_what_cannot_be_cut_is_refused_with_what_to_define(batch: Any, told: str) -> None:
    reader = BatchReader(ranks=2)
    size = reader.size_of(batch)
    with pytest.raises(DataError, match=told) as caught:
        reader.cut(batch, 0, 1)
    assert "def split_batch(batch, sizes)" in str(caught.value)
    assert "train.batch=per_rank" in str(caught.value)
    own = BatchReader(BatchFunctions(split_batch=lambda batch, sizes: [f"part of {n}" for n in sizes]), ranks=2)
    assert [own.cut(batch, *part_of(size, rank, 2)) for rank in range(2)] == [f"part of {size // 2}"] * 2


def test_the_users_functions_are_held_to_what_they_are_for() -> None:
    x = torch.ones(7, 4, 2)
    for told in (None, "4", 1.5, -1, True):
        with pytest.raises(DataError, match=r"batch_size\(batch\) returned"):
            BatchReader(BatchFunctions(lambda _, told=told: told)).size_of(x)
    assert BatchReader(BatchFunctions(lambda _: torch.tensor(4))).size_of(x) == 4
    asked: list[list[int]] = []

    def halves(batch: Tensor, sizes: list[int]) -> list[Tensor]:
        asked.append(sizes)
        return list(batch.split(sizes, 1))

    reader = BatchReader(BatchFunctions(lambda batch: batch.shape[1], halves), ranks=3)
    assert [tuple(reader.cut(x, *part_of(4, rank, 3)).shape) for rank in range(3)] == [(7, 2, 2), (7, 1, 2), (7, 1, 2)]
    assert [tuple(reader.cut(x[:, :2], *part_of(2, rank, 3)).shape) for rank in range(2)] == [(7, 1, 2), (7, 1, 2)]
    assert asked == [[2, 1, 1]] * 3 + [[1, 1]] * 2, "no part is empty"
    for wrong, words in ((lambda b, s: b, "Tensor"), (lambda b, s: [b], "1 batches"), (lambda b, s: [b] * 3, "says 4")):
        with pytest.raises(DataError, match=words):
            BatchReader(BatchFunctions(lambda batch: batch.shape[1], wrong), ranks=3).cut(x, 0, 2)
    with pytest.raises(UsageError, match="batch_size = 4: should be a function"):
        BatchFunctions(4)  # type: ignore[arg-type]


def test_features_and_labels_of_several_loaders_are_not_taken_for_two_samples() -> None:
    x, y = torch.zeros(32, 4), torch.zeros(32, dtype=torch.long)
    told = r'of the train loader is not known.* a batch of each of several loaders, .* with train\.combine=min \(combine="min"\)'
    with pytest.raises(DataError, match=told):
        BatchReader().size_of({"a": [x, y], "b": [torch.zeros(16, 4), torch.zeros(16, 1)]})
    assert BatchReader().size_of({"a": [x, y], "b": [torch.zeros(32, 4), torch.zeros(32, 1)]}) == 32
