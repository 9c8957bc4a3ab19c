"""What the bundled recipes read: against NumPy and files made by hand; and what they refuse."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_diabetes

from dtrain import ConfigError
from dtrain.recipes import diabetes, images, mnist, text
from dtrain.recipes.shapes import draw_shapes

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
LABELS = bytes([3, 1, 4, 1, 9])


def idx(magic: int, sizes: tuple[int, ...], content: bytes) -> bytes:
    return struct.pack(f">{1 + len(sizes)}I", magic, *sizes) + content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The four files: unpacked and gzipped."""
    for name in ("train", "t10k"):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(0x803, PIXELS.shape, PIXELS.tobytes()))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(0x801, (5,), LABELS)))
    return tmp_path


def test_mnist_is_read_as_it_was_written(folder: Path) -> None:
    dl_train, dl_valid = mnist.build_dataloaders(str(folder), batch_size=2)
    pixels, labels = dl_train.dataset[:]
    np.testing.assert_allclose(pixels.numpy()[:, 0], (PIXELS / 255 - 0.1307) / 0.3081, atol=1e-6)
    assert labels.tolist() == list(LABELS)
    assert labels.dtype == torch.int64
    assert len(dl_valid.dataset) == 5
    deep = folder / "MNIST" / "raw"  # as torchvision lays them
    deep.mkdir(parents=True)
    for file in [path for path in folder.iterdir() if path.is_file()]:
        file.rename(deep / file.name)
    assert mnist.find_file(folder, "t10k-labels-idx1-ubyte").name == "t10k-labels-idx1-ubyte.gz"


GOOD = idx(0x803, PIXELS.shape, PIXELS.tobytes())
BROKEN = {
    "another kind": (idx(0x801, (5,), LABELS), "magic number is 0x00000801, not 0x00000803"),
    "another size": (idx(0x803, (5, 32, 32), bytes(5 * 1024)), r"header says \[5, 32, 32\]"),
    "none": (idx(0x803, (0, 28, 28), b""), r"header says \[0, 28, 28\]"),
    "too many": (idx(0x803, (4_000_000_000, 28, 28), b""), r"header says \[4000000000, 28, 28\]"),
    "cut off": (GOOD[:-1], "3920 bytes should follow its header, but there are 3919"),
    "too long": (GOOD + b"x", "3920 bytes should follow its header, but there are more"),
    "no head": (GOOD[:7], "cannot be read"),
    "a pickle": (b"\x80\x04\x95" + bytes(13), "magic number is 0x80049500"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_file_is_named(folder: Path, what: str) -> None:
    content, told = BROKEN[what]
    file = folder / "t10k-images-idx3-ubyte"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file.name}: .*{told}"):
        mnist.build_dataloaders(str(folder))


@pytest.mark.parametrize(
    "packed", [b"no gzip", gzip.compress(GOOD)[:-9], gzip.compress(GOOD)[:200] + b"xx" + gzip.compress(GOOD)[202:]]
)
def test_a_damaged_archive_is_named(folder: Path, packed: bytes) -> None:
    (folder / "train-images-idx3-ubyte").unlink()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(packed)
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte\.gz: cannot be read.*https://"):
        mnist.build_dataloaders(str(folder))


def test_labels_and_images_must_belong_together(folder: Path) -> None:
    file = folder / "train-labels-idx1-ubyte.gz"
    for labels, told in ((LABELS[:4], "4 labels up to 4 for 5 images"), (bytes([0, 1, 2, 3, 10]), "5 labels up to 10")):
        file.write_bytes(gzip.compress(idx(0x801, (len(labels),), labels)))
        with pytest.raises(ConfigError, match=f"{file.name}: {told}"):
            mnist.build_dataloaders(str(folder))


def test_missing_files_are_named_with_where_to_get_them(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ConfigError, match=r"data\.folder = .*no t10k-labels-idx1-ubyte or .*\.gz in .*https://.*PATH"):
        mnist.build_dataloaders(str(folder))


def test_diabetes_is_standardised_by_its_training_rows_alone() -> None:
    dl_train, dl_valid = diabetes.build_dataloaders()
    features, labels = load_diabetes(return_X_y=True, scaled=False)
    train, valid = (loader.dataset.tensors for loader in (dl_train, dl_valid))
    assert [len(part[0]) for part in (train, valid)] == [331, 111]
    np.testing.assert_allclose(train[0].mean(dim=0), 0, atol=1e-5)
    np.testing.assert_allclose(train[0].std(dim=0), 1, atol=1e-5)
    assert valid[0].mean(dim=0).abs().max() > 0.05, "the validation rows' own mean is not taken"
    # Back to the table's own units, with the training rows' mean and deviation, found by their place in it.
    from sklearn.model_selection import train_test_split

    rows, others = train_test_split(range(442), test_size=0.25, random_state=42)
    for column, parts in ((features, (train[0], valid[0])), (labels[:, None], (train[1], valid[1]))):
        mean, deviation = column[rows].mean(axis=0), column[rows].std(axis=0, ddof=1)
        for part, place in zip(parts, (rows, others), strict=True):
            np.testing.assert_allclose(part.numpy(), (column[place] - mean) / deviation, atol=1e-4)


def test_images_have_their_folders_class_in_the_alphabets_order(tmp_path: Path) -> None:
    for name, shade in (("b", 255), ("a", 0)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        Image.new("RGB", (9, 5), (shade,) * 3).save(tmp_path / name / "1.png")
        Image.new("L", (4, 4), shade).save(tmp_path / name / "deeper" / "2.JPG", "JPEG")
        (tmp_path / name / "notes.txt").write_text("no image")
    data = images.ImageFolder(tmp_path, 6)
    assert [(image.shape, image.unique().tolist(), label) for image, label in data] == [
        ((1, 6, 6), [value], label) for value, label in ((-1, 0), (-1, 0), (1, 1), (1, 1))
    ]
    (tmp_path / "b" / "1.png").unlink()
    with pytest.raises(ConfigError, match=r"data\.folder = .*2 images; has a: 2, b: 1\."):
        images.ImageFolder(tmp_path, 6)
    with pytest.raises(ConfigError, match=r"data\.folder = /.*none: needs 2 or more folders.*; has none\."):
        images.build_dataloaders(str(tmp_path / "none"))


def test_shapes_are_drawn_once_and_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dl_train, dl_valid = images.build_dataloaders()
    assert (len(dl_train.dataset), len(dl_valid.dataset)) == (270, 90)
    drawn = {path.relative_to("data/shapes"): path.read_bytes() for path in Path("data/shapes").rglob("*.png")}
    (tmp_path / "data/shapes/circle/0.png").write_bytes(b"mine")
    draw_shapes(Path("data/shapes"))  # as a rank does that comes second
    assert (tmp_path / "data/shapes/circle/0.png").read_bytes() == b"mine"
    assert [path.name for path in Path("data").iterdir()] == ["shapes"], "nothing is left beside it"
    draw_shapes(Path("data/again"))
    assert drawn == {path.relative_to("data/again"): path.read_bytes() for path in Path("data/again").rglob("*.png")}


def test_a_texts_labels_are_its_next_characters(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("0123456789" * 5)
    dl_train, dl_valid = text.build_dataloaders(str(file), length=4)
    features, labels = dl_train.dataset.tensors
    assert bytes(features[0].tolist()) == b"0123"
    assert bytes(labels[0].tolist()) == b"1234"
    assert (
        bytes(features.flatten().tolist() + dl_valid.dataset.tensors[0].flatten().tolist())
        == b"0123456789" * 4 + b"01234567"
    )
    assert (len(features), len(dl_valid.dataset)) == (10, 2)
    with pytest.raises(ConfigError, match=r"data\.file = nothing: should be a file of 641 bytes or more, and has 0"):
        text.build_dataloaders("nothing")


def test_no_character_sees_what_comes_after_it() -> None:
    torch.manual_seed(0)
    net = text.build_model(width=16, layers=2, heads=2, context=12)
    before = torch.randint(256, (1, 12))
    after = before.clone()
    after[0, 7] = (after[0, 7] + 1) % 256
    with torch.no_grad():
        for _ in (net.train(), net.eval()):
            change = (net(before) - net(after)).abs().sum(dim=2)[0]
            assert change[:7].max() < 1e-5
            assert change[7:].min() > 1e-4
