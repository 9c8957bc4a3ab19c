"""MNIST, or any data in its format (Fashion-MNIST, KMNIST): the four IDX files of a folder, with or without .gz."""

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain import ConfigError

SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"
IMAGES, LABELS = 0x00000803, 0x00000801  # unsigned bytes in 3 dimensions, and in 1
SIDE, CLASSES = 28, 10
MOST = 1_000_000  # images of a file; one that says more is none of these


def find_file(folder: Path, name: str) -> Path:
    """Finds a file, unpacked or not, also where torchvision puts it."""
    places = [place / (name + end) for place in (folder, folder / "MNIST" / "raw") for end in ("", ".gz")]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise ConfigError(
            f"data.folder = {str(folder)!r}: there is no {name} or {name}.gz in {folder.resolve()}. Needed: "
            "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte. "
            f"Download them from {SOURCE}, or set their folder: data.folder=PATH."
        )
    return found


def read_idx(path: Path, magic: int) -> Tensor:
    """Reads an IDX file: (n, 28, 28) or (n,) bytes.

    Raises:
        ConfigError: it is not what its name says: another kind, another size, damaged.
    """
    sizes = (SIDE, SIDE) if magic == IMAGES else ()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            there = int.from_bytes(file.read(4), "big")
            if there != magic:
                raise ConfigError(f"{path}: its magic number is {there:#010x}, not {magic:#010x}.")
            count, *shape = struct.unpack(f">{1 + len(sizes)}I", file.read(4 + 4 * len(sizes)))
            if tuple(shape) != sizes or not 0 < count <= MOST:
                raise ConfigError(f"{path}: its header says {[count, *shape]} bytes, not [n, {SIDE}, {SIDE}] or [n].")
            wanted = count * SIDE ** len(sizes)
            content = file.read(wanted + 1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}. Download it again from {SOURCE}.") from None
    if len(content) != wanted:
        told = "more" if len(content) > wanted else f"{len(content)}"
        raise ConfigError(
            f"{path}: {wanted} bytes should follow its header, but there are {told}. Download it again from {SOURCE}."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(count, *sizes)


def read_split(folder: Path, name: str) -> TensorDataset:
    """The images (n, 1, 28, 28), standardised with MNIST's mean and deviation, and the labels (n,) of a split."""
    images = read_idx(find_file(folder, f"{name}-images-idx3-ubyte"), IMAGES)
    labels = read_idx(file := find_file(folder, f"{name}-labels-idx1-ubyte"), LABELS)
    if len(images) != len(labels) or int(labels.max()) >= CLASSES:
        raise ConfigError(
            f"{file}: {len(labels)} labels up to {int(labels.max())} for {len(images)} images. Each image needs one "
            "label, from 0 to 9."
        )
    return TensorDataset((images.unsqueeze(1).float() / 255 - 0.1307) / 0.3081, labels.long())


def build_dataloaders(folder: str = "data/mnist", batch_size: int = 64) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The 60,000 training images, and the 10,000 of the test set to validate on."""
    train, valid = read_split(Path(folder), "train"), read_split(Path(folder), "t10k")
    return DataLoader(train, batch_size, shuffle=True), DataLoader(valid, 4 * batch_size)


def build_model(width: int = 16) -> nn.Module:
    """Images (batch, 1, 28, 28) to logits (batch, 10): two convolutions, and a layer over what they found."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, kernel_size=5, stride=2), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, kernel_size=3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(2 * width * 5 * 5, CLASSES)),
    )


def build_optimizer(model: nn.Module, lr: float = 0.002) -> torch.optim.Optimizer:
    """Adam over all weights."""
    return torch.optim.Adam(model.parameters(), lr=lr)


def train_step(model: Any, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss and accuracy of a batch. The loss keeps its graph: dtrain does the rest."""
    logits = model(features)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return {"loss": nn.functional.cross_entropy(logits, labels), "accuracy": accuracy}


valid_step = train_step
