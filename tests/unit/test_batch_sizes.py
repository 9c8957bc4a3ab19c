"""A batch's size and how it is cut and joined: known for every kind of batch, or refused in words that help."""

from __future__ import annotations

import collections
import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
import torch
from helpers.batch_kinds import Encoding, Graph, Graphs
from helpers.pages import ROOT, blocks
from helpers.sweep import FULL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    default_collate,
)

from dtrain.batches import BatchFunctions, BatchReader
from dtrain.dealing import Dealing, part_of
from dtrain.errors import DataError, UsageError
from dtrain.sharding import ShardedLoader

EXAMPLES = settings(max_examples=400 if FULL else 60, deadline=None)


class Pair(collections.namedtuple("Pair", ["one", "two"])):
    """A tuple with names."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A frozen one, whose parts a copy must get all the same."""

    x: Any
    name: str = "whole"


class Ordered(collections.OrderedDict):
    """A dict of the user's own type."""


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def packed(generator: torch.Generator, n: int) -> PackedSequence:
    lengths = torch.randint(1, 5, (n,), generator=generator).tolist()
    return pack_sequence([numbers(generator, length, 2) for length in lengths], enforce_sorted=False)


def graphs(generator: torch.Generator, n: int) -> Graphs:
    sizes = torch.randint(1, 6, (n,), generator=generator).tolist()
    made = [
        Graph(numbers(generator, size, 3), torch.randint(0, size, (2, size + 1), generator=generator)) for size in sizes
    ]
    return Graphs.from_data_list(made)


def images(generator: torch.Generator, n: int) -> list[Tensor]:
    return [numbers(generator, 3, 4 + i % 3, 5 + i % 2) for i in range(n)]


def targets(generator: torch.Generator, n: int) -> list[dict[str, Tensor]]:
    counts = torch.randint(0, 4, (n,), generator=generator).tolist()
    return [{"boxes": numbers(generator, k, 4), "labels": torch.arange(k)} for k in counts]


LEAVES: dict[str, Any] = {
    "rows": lambda g, n: numbers(g, n, 2),
    "vector": numbers,
    "array": lambda g, n: numbers(g, n, 3).numpy(),
    "texts": lambda g, n: [f"text {i}" for i in range(n)],
    "images": images,
    "targets": targets,
    "image tuple": lambda g, n: tuple(images(g, n)),
    "packed": packed,
    "graphs": graphs,
    "nested": lambda g, n: torch.nested.nested_tensor(
        [numbers(g, 1 + i % 3, 2) for i in range(n)], layout=torch.jagged
    ),
    "sparse": lambda g, n: numbers(g, n, 4).relu().to_sparse(),
    "number": lambda g, n: 0.5,
    "0-d": lambda g, n: torch.tensor(2.0),
    "nothing": lambda g, n: None,
    "text": lambda g, n: "whole",
}
NODES: dict[str, Any] = {
    "tuple": tuple,
    "dict": lambda parts: {f"part {i}": part for i, part in enumerate(parts)},
    "own dict": lambda parts: Ordered((str(i), part) for i, part in enumerate(parts)),
    "named tuple": lambda parts: Pair(parts[0], parts[-1]),
    "dataclass": lambda parts: Sample(parts[0]),
    "encoding": lambda parts: Encoding({f"part {i}": part for i, part in enumerate(parts)}),
}
FORMS = st.recursive(
    st.sampled_from(sorted(LEAVES)),
    lambda inner: st.tuples(st.sampled_from(sorted(NODES)), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=6,
)


def built(form: Any, generator: torch.Generator, n: int) -> Any:
    if isinstance(form, str):
        return LEAVES[form](generator, n)
    return NODES[form[0]]([built(part, generator, n) for part in form[1]])


def equal(one: Any, other: Any) -> bool:  # noqa: PLR0911 - one for each type
    """Whether two batches have the same types and values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, PackedSequence):
        return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor):
        if one.is_nested:
            return all(torch.equal(a, b) for a, b in zip(one.unbind(), other.unbind(), strict=True))
        dense = (one.to_dense(), other.to_dense()) if one.is_sparse else (one, other)
        return dense[0].shape == dense[1].shape and torch.equal(*dense)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, (Graphs, Sample, Graph)):
        return equal(vars(one), vars(other))
    if isinstance(one, collections.abc.Mapping):
        own = [{k: v for k, v in vars(each).items() if k != "data"} for each in (one, other) if hasattr(each, "data")]
        same = not own or equal(*own)
        return same and list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


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


IMAGES = images(torch.Generator().manual_seed(0), 10)


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
        ((Graph(torch.ones(4, 2), torch.ones(2, 1)), torch.ones(4)), "of a type that dtrain does not know"),
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


class Stream(IterableDataset):
    """Samples: an image each, of unequal size; or a sequence."""

    def __init__(self, n: int, said: int | None = None) -> None:
        self.n, self.said = n, said

    def __iter__(self) -> Any:
        return iter([(one, number) for number, one in enumerate(IMAGES[: self.n])])

    def __len__(self) -> int:
        if self.said is None:
            raise TypeError
        return self.said


def transposed(samples: list[Any]) -> Any:
    return tuple(zip(*samples, strict=True))


def time_first(samples: list[Any]) -> Any:
    return torch.stack([torch.full((7,), float(number)) for _, number in samples], 1)


def some_left_out(samples: list[Any]) -> Any:
    return torch.tensor([number for _, number in samples if number != 4])


def shares_of(loader: Any, rank: int = 0, size: int = 1, mode: Any = "global", **more: Any) -> list[Any]:
    return list(ShardedLoader(loader, Dealing(rank, size, mode, fill=True), 1, "train", **more).shares(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_counted_where_its_batches_are_put_together(workers: int) -> None:
    loader = DataLoader(Stream(10), 3, collate_fn=transposed, num_workers=workers)
    assert [share.count for share in shares_of(loader)] == [3, 3, 3, 1]
    dealt = [shares_of(loader, rank, 2) for rank in range(2)]
    assert [[share.batch[1] for share in rank] for rank in dealt] == [
        [(0, 1), (3, 4), (6, 7), (9,)],
        [(2,), (5,), (8,), (9,)],
    ]
    assert [share.count for share in dealt[1]] == [1, 1, 1, 0]
    with pytest.raises(DataError, match="collate_fn was given 3 samples, and made of them what seems to be 2"):
        shares_of(DataLoader(Stream(10), 3, collate_fn=some_left_out))
    assert [share.count for share in shares_of(DataLoader(Stream(10), 3, collate_fn=time_first))] == [3, 3, 3, 1]
    with pytest.raises(DataError, match=r"the first dimension of batch \(7, 3\) is not the batch's 3 samples"):
        shares_of(DataLoader(Stream(10), 3, collate_fn=time_first), 0, 2)
    own = BatchFunctions(lambda batch: batch.shape[1], lambda batch, sizes: batch.split(sizes, 1))
    for rank in range(2):
        shares = shares_of(DataLoader(Stream(10), 3, collate_fn=time_first), rank, 2, functions=own)
        assert [share.batch[0].tolist() for share in shares] == [
            list(share.batch[1]) for share in dealt_by(dealt, rank)
        ]


def dealt_by(dealt: list[list[Any]], rank: int) -> list[Any]:
    return dealt[rank]


class Ready(IterableDataset):
    """Batches of four images each, or of features and labels, of which the first dimensions agree by accident."""

    def __init__(self, form: type) -> None:
        self.form = form

    def __iter__(self) -> Any:
        return iter([self.form(IMAGES[:4]), self.form(IMAGES[4:8])])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_ready_tuple_is_parts_and_a_ready_list_may_be_samples(workers: int) -> None:
    """A DataLoader makes both lists."""
    for batches in (DataLoader(Ready(tuple), None, num_workers=workers), [tuple(IMAGES[:4]), tuple(IMAGES[4:8])]):
        assert [share.count for share in shares_of(batches)] == [3, 3]
        assert all(type(share.batch) in (list, tuple) and len(share.batch) == 4 for share in shares_of(batches))
    with pytest.raises(DataError, match="Yield a tuple where it is parts"):
        shares_of(DataLoader(Ready(list), None, num_workers=workers))
    assert [share.count for share in shares_of(DataLoader(Ready(list), None), fixed=True)] == [3, 3]
    own = BatchFunctions(len)
    assert [share.count for share in shares_of(DataLoader(Ready(list), None), functions=own)] == [4, 4]


def test_a_step_may_leave_parts_out() -> None:
    """As in train_step(model, one, other=None)."""
    reader = BatchReader(fixed=True)
    assert [
        reader.size_of(batch) for batch in ([torch.ones(4, 2)] * 2, [torch.ones(3, 2)], (torch.ones(2, 2),) * 2)
    ] == [4, 3, 2]


def test_the_example_of_the_page_is_right() -> None:
    page = ROOT / "docs/steps-and-recipes.md"
    (block,) = (one for one in blocks(page, "python") if "def split_batch" in one.text)
    names: dict[str, Any] = {}
    exec(block.text, names)  # noqa: S102 - the page's own
    batch = torch.arange(14.0).reshape(7, 2, 1), torch.tensor([5, 6])
    own = BatchFunctions(names["batch_size"], names["split_batch"])
    dealt = [shares_of(iter([batch]), rank, 3, functions=own)[0] for rank in range(3)]
    assert [share.count for share in dealt] == [1, 1, 0]
    assert [share.batch[1].tolist() for share in dealt] == [[5], [6], [5]]
    assert [tuple(share.batch[0].shape) for share in dealt] == [(7, 1, 1)] * 3


def test_batches_that_are_all_there_are_looked_at_before_the_first() -> None:
    seen = ShardedLoader([torch.ones(4, 2), (torch.ones(4), torch.ones(3))], Dealing(0, 1, "global", True), 1, "train")
    with pytest.raises(DataError, match=r"batch\[0\] \(4,\), batch\[1\] \(3,\)"):
        next(seen.shares(1))


@pytest.mark.parametrize("anew", [False, True])
def test_class_weights_as_long_as_the_batch_are_not_cut(anew: bool) -> None:
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def batches() -> Any:
        for n in range(3):
            yield torch.full((4, 2), float(n)), torch.arange(4), weights.clone() if anew else weights

    class Loader:
        def __iter__(self) -> Any:
            return batches()

    assert [share.count for share in shares_of(Loader())] == [4, 4, 4], "of no matter on one rank"
    with pytest.raises(DataError, match=r"batch\[2\] \(4,\) is the same in two batches, as class weights are"):
        shares_of(Loader(), 0, 2)

    def split(batch: Any, sizes: list[int]) -> list[Any]:
        return [(x, y, batch[2]) for x, y in zip(batch[0].split(sizes), batch[1].split(sizes), strict=True)]

    for rank in range(2):
        shares = shares_of(Loader(), rank, 2, functions=BatchFunctions(split_batch=split))
        assert [len(share.batch[0]) for share in shares] == [2, 2, 2]
        assert all(share.batch[2] is weights or torch.equal(share.batch[2], weights) for share in shares)


def test_what_repeats_and_is_no_constant_is_cut() -> None:
    """Masks of ones, places in a sequence, labels 0 and 1 in turn."""
    one = {"x": torch.randn(4, 3), "mask": torch.ones(4, 3), "place": torch.arange(3).expand(4, 3), "y": [0.0, 1.0] * 2}
    other = {**one, "x": torch.randn(4, 3), "mask": torch.ones(4, 3), "place": torch.arange(3).repeat(4, 1)}
    one["label"], other["label"] = torch.tensor([0.0, 1.0] * 2), torch.tensor([0.0, 1.0] * 2)
    assert [share.count for share in shares_of([one, other], 1, 2)] == [2, 2]


def test_a_stream_that_yields_one_batch_again_and_again_is_refused() -> None:
    class Reusing:
        def __iter__(self) -> Any:
            batch = torch.zeros(4, 2)
            for n in range(3):
                yield batch.fill_(n + 1)

    with pytest.raises(DataError, match="changes a batch that it has yielded"):
        shares_of(Reusing(), 0, 2)
    for how in (
        Dealing(0, 2, "per_rank", fill=True),
        *(Dealing(0, 1, "per_rank", True, group=2 - n, merge=1 + n) for n in (0, 1)),
    ):
        with pytest.raises(DataError, match="changes a batch that it has yielded"):
            list(ShardedLoader(Reusing(), how, 1, "train").shares(1))
    assert [
        float(share.batch.sum())
        for share in ShardedLoader(Reusing(), Dealing(0, 1, "global", True), 1, "train").shares(1)
    ]


def test_a_rank_with_an_empty_batch_gets_a_batch_with_samples_to_take_part() -> None:
    batches = [torch.zeros(0, 2), torch.ones(3, 2), torch.full((2, 2), 2.0), torch.zeros(0, 2)]
    for rank, expected in enumerate(([(0, 3, 3), (2, 2, 2)], [(3, 3, 3), (0, 2, 2)])):
        shares = shares_of(batches, rank, 2, "per_rank")
        assert [(share.count, share.rows, len(share.batch)) for share in shares] == expected


@pytest.mark.parametrize(
    ("said", "words"), [(2, "length is 2, and it yielded more"), (6, "length is 6, and it yielded 4"), (4, "")]
)
def test_a_length_that_proves_wrong_is_said_once(said: int, words: str, caplog: Any) -> None:
    class Loader:
        def __iter__(self) -> Any:
            return iter([torch.ones(2, 1)] * 4)

        def __len__(self) -> int:
            return said

    for rank, mode in ((0, "per_rank"), (0, "global"), (1, "global")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            sharded = ShardedLoader(Loader(), Dealing(rank, 2, mode, fill=True), 1, "train")
            for epoch in (1, 2):
                assert len(list(sharded.shares(epoch))) == (2 if mode == "per_rank" else 4)
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == bool(words and rank == 0)
        assert all(words in one and "schedule" in one for one in told)


def test_a_distributed_sampler_is_replaced_aloud_and_the_steps_are_those_that_come(caplog: Any) -> None:
    data = list(range(50))
    for replicas in (1, 2, 4):
        for drop_last in (False, True):
            sampler = DistributedSampler(data, num_replicas=replicas, rank=0, shuffle=False)
            loader = DataLoader(data, 4, sampler=sampler, drop_last=drop_last)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                for size, mode in ((1, "per_rank"), (2, "per_rank"), (2, "global")):
                    sharded = ShardedLoader(loader, Dealing(0, size, mode, fill=True), 1, "train")
                    shares = list(sharded.shares(1))
                    assert sharded.steps() == len(shares)
                    assert sum(share.total for share in shares) == (48 if drop_last else 50)
            (told,) = [record.getMessage() for record in caplog.records]
            assert told.startswith(
                f"the train loader's DistributedSampler (num_replicas={replicas}, rank=0) is replaced by a "
                "SequentialSampler over all 50 samples"
            )


def test_samples_that_a_collate_function_leaves_out_are_told(caplog: Any) -> None:
    data = [(torch.ones(2), n) if n % 5 else None for n in range(1, 13)]

    def there(samples: list[Any]) -> Any:
        return default_collate([sample for sample in samples if sample is not None])

    with caplog.at_level(logging.WARNING):
        assert [share.count for share in shares_of(DataLoader(data, 3, collate_fn=there))] == [3, 3, 3, 3]
        shares_of(DataLoader([one for one in data if one], 3, collate_fn=there))
        shares_of(DataLoader(IMAGES, 4, collate_fn=list))
    (told,) = [record.getMessage() for record in caplog.records]
    assert "a batch of the train loader has 3 indices and 2 rows; it counts as 3 samples" in told


def test_samplers_of_the_users_own_that_deal_are_refused() -> None:
    class Weighted(DistributedSampler):
        """One that draws in a way of its own."""

    class Batches(BatchSampler):
        """One that makes batches in a way of its own."""

    data = list(range(8))
    for loader, name in (
        (DataLoader(data, 4, sampler=Weighted(data, 1, 0)), "Weighted"),
        (DataLoader(data, batch_sampler=Batches(DistributedSampler(data, 1, 0), 4, False)), "Batches"),
    ):
        with pytest.raises(UsageError, match=f"the train loader's {name} deals to ranks"):
            shares_of(loader)


def test_batches_that_a_sampler_gives_as_lists_of_indices_are_counted_by_them() -> None:
    class Data:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, indices: list[int]) -> Any:
            return [IMAGES[index] for index in indices]

    loader = DataLoader(Data(), batch_size=None, sampler=BatchSampler(SequentialSampler(range(10)), 4, False))
    assert [share.count for share in shares_of(loader)] == [4, 4, 2]
    for rank in range(3):
        shares = shares_of(loader, rank, 3)
        assert [share.count for share in shares] == [[2, 2, 1], [1, 1, 1], [1, 1, 0]][rank]
        assert all(torch.equal(share.batch[0], IMAGES[share.indices[0]]) for share in shares)


def test_a_batch_size_that_is_not_asked_is_told_where_it_differs(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        for size in (len, lambda batch: len(batch) // 2):
            functions = BatchFunctions(size)
            loader = DataLoader([torch.ones(2, 1)] * 8, 4, collate_fn=torch.cat)
            assert [share.count for share in shares_of(loader, functions=functions)] == [4, 4]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("batch_size(batch) is not asked for batches of the train loader") and "says 8" in told
