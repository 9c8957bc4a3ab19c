"""Images in folders, a folder for each class: `pets/cat/1.jpg`, `pets/dog/1.jpg`, ...

`data.folder=pets` takes a folder of yours. Without it, `data/shapes` is made where it is missing: drawn shapes.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from dtrain import ConfigError
from dtrain.recipes.shapes import draw_shapes

SHAPES = "data/shapes"
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images under a folder, read when they are asked for: pixels (1, size, size) from -1 to 1, and the class."""

    def __init__(self, folder: Path, size: int) -> None:
        classes = sorted(path for path in folder.glob("*") if path.is_dir())
        files = [[file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES] for path in classes]
        found = ", ".join(f"{path.name}: {len(inside)}" for path, inside in zip(classes, files, strict=True)) or "none"
        if len(classes) < 2 or min(map(len, files)) < 2:
            raise ConfigError(f"data.folder = {folder.resolve()}: needs 2 or more folders of 2 images; has {found}.")
        self.files, self.size = [file for inside in files for file in inside], size
        self.labels = [label for label, inside in enumerate(files) for _ in inside]  # in the alphabet's order

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.files[index]) as image:  # for colours: "RGB", 3 channels here and in build_model
            pixels = bytearray(image.convert("L").resize((self.size, self.size)).tobytes())
        return torch.tensor(pixels).view(1, self.size, self.size) / 127.5 - 1, self.labels[index]


def build_dataloaders(
    folder: str = SHAPES, size: int = 32, batch_size: int = 16, valid_share: float = 0.25, num_workers: int = 0
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """A fixed split, with the same share of each class in both parts; `num_workers` are processes that read."""
    if folder == SHAPES and not Path(folder).exists():
        draw_shapes(Path(folder))
    data = ImageFolder(Path(folder), size)
    train, valid = train_test_split(range(len(data)), test_size=valid_share, stratify=data.labels, random_state=0)
    return (
        DataLoader(Subset(data, train), batch_size, shuffle=True, num_workers=num_workers),
        DataLoader(Subset(data, valid), batch_size, num_workers=num_workers),
    )


def build_model(classes: int = 3, width: int = 16) -> nn.Module:
    """Images (batch, 1, size, size) of any size to logits (batch, classes); `classes` is the number of folders."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, kernel_size=3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, kernel_size=3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(2 * width, 4 * width, kernel_size=3), nn.ReLU(), nn.AdaptiveMaxPool2d(1)),
        *(nn.Flatten(), nn.Linear(4 * width, classes)),
    )


def build_optimizer(model: nn.Module, lr: float = 0.003) -> torch.optim.Optimizer:
    """Adam over all weights."""
    return torch.optim.Adam(model.parameters(), lr=lr)


def train_step(model: Any, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss and accuracy of a batch. The loss keeps its graph: dtrain does the rest."""
    logits = model(images)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return {"loss": nn.functional.cross_entropy(logits, labels), "accuracy": accuracy}


valid_step = train_step
