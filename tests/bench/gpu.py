"""What a step costs on a GPU with dtrain, as a multiple of a loop written by hand; bf16 on both sides.

    python tests/bench/gpu.py [--model cnn|transformer|resnet] [--pairs 5] [--steps 50] [--workers 12] [--device cuda]

`cnn` is the digits recipe's net, `transformer` one of 100 million parameters (12 layers, 768 wide, 256 tokens a row),
`resnet` a ResNet-18 on images of 224 pixels that workers make. For `resnet` an epoch is also compared with what takes
longer of its two halves: the loader alone (its batches are thrown away), and the card alone (steps on one batch).
An epoch of either side trains a number of steps and reads its mean loss once, at the end; the two take turns in one
process. `--device cpu --width 32 --batch 1 --steps 2` tries the bench itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from helpers.callbacks import on
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

_WARM_UP = 2  # epochs of each side that are not counted
_TOKENS, _WORDS = 256, 32_000
_PIXELS = 224


class Residual(nn.Module):
    """Two convolutions of 3 pixels and a way around them, as in ResNet-18 and -34."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(inplace=True),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        same = stride == 1 and inner == outer
        around = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        self.around: nn.Module = nn.Identity() if same else around

    def forward(self, x: Tensor) -> Tensor:
        """Takes and returns images (batch, channels, rows, columns)."""
        return torch.relu(self.convolutions(x) + self.around(x))


def resnet18() -> nn.Module:
    """ResNet-18 for ten classes."""
    widths = (64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [Residual(widths[max(0, n - 1)], width, 2 if n in (2, 4, 6) else 1) for n, width in enumerate(widths)]
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Images(Dataset[Any]):
    """Images of noise, each made anew from its index."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """The number of images."""
        return self.rows

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns an image and its class."""
        generator = torch.Generator().manual_seed(index)
        whole = torch.randint(256, (3, _PIXELS, _PIXELS), generator=generator, dtype=torch.uint8)
        return whole.float().div_(255), index % 10


class Transformer(nn.Module):
    """A causal language model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, width)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, 0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.mask: Tensor
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(_TOKENS), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Takes word numbers (batch, tokens); returns each word's score at each place (batch, words, tokens)."""
        hidden = self.layers(self.words(rows), mask=self.mask, is_causal=True)
        return (hidden @ self.words.weight.T).transpose(1, 2)


def problem(asked: argparse.Namespace) -> tuple[nn.Module, DataLoader[Any]]:
    """The net, the same at each call, and its training batches in pinned memory."""
    model, steps, width, batch = asked.model, asked.steps, asked.width, asked.batch
    torch.manual_seed(0)
    if model == "resnet":
        batch = batch or 256
        workers: dict[str, Any] = {"num_workers": asked.workers, "persistent_workers": asked.workers > 0}
        pins = torch.cuda.is_available()
        return resnet18(), DataLoader(Images(steps * batch), batch, shuffle=True, pin_memory=pins, **workers)
    if model == "cnn":
        from dtrain.recipes.digits import DigitsNet

        batch, net = batch or 128, DigitsNet(dropout=0.0)
        data = TensorDataset(torch.randn(steps * batch, 1, 32, 32), torch.randint(10, (steps * batch,)))
    else:
        batch, net = batch or 16, Transformer(width)
        words = torch.randint(_WORDS, (steps * batch, _TOKENS))
        data = TensorDataset(words, words.roll(-1, dims=1))
    return net, DataLoader(data, batch, shuffle=True, pin_memory=torch.cuda.is_available())


def hand_written(net: nn.Module, loader: Iterable[Any], device: torch.device) -> Callable[[], float]:
    """The loop that an expert writes: no read-back within an epoch. Returns a function that trains one."""
    net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    loss_func = nn.CrossEntropyLoss()

    def epoch() -> float:
        total, count = torch.zeros((), dtype=torch.float64, device=device), 0
        for batch in loader:
            rows, labels = (part.to(device, non_blocking=True) for part in batch)
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_func(net(rows).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(labels)
            count += len(labels)
        return total.item() / count

    return epoch


def duel(asked: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Trains with both by turns; returns the seconds of their epochs."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    from dtrain.distributed.world import bring_up
    from dtrain.engine.loop import Engine
    from dtrain.engine.train_step import Task

    world = bring_up(cpu=asked.device == "cpu")
    hand = hand_written(*problem(asked), world.device)
    net, loader = problem(asked)
    net.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)  # type: ignore[assignment]
    loss_func = nn.CrossEntropyLoss()
    ours, hands, losses = [], [], []

    def train_step(model: nn.Module, rows: Tensor, labels: Tensor) -> Tensor:
        return loss_func(model(rows), labels)

    def turn(row: dict[str, Any]) -> None:
        ours.append(row["seconds"])
        before = time.perf_counter()
        losses.append((row["loss"], hand()))  # its read-back waits for the device
        hands.append(time.perf_counter() - before)

    engine = Engine(Task(net, train_step, loader), world, epochs=_WARM_UP + asked.pairs)
    engine.callbacks.add(on(on_epoch_end=turn))
    engine.fit()
    mine, other = losses[-1]
    if not abs(mine - other) < 0.15:
        raise SystemExit(f"the two learnt different things: loss {mine} and, by hand, {other}")
    return ours[_WARM_UP:], hands[_WARM_UP:]


def alone(asked: argparse.Namespace) -> tuple[float, float]:
    """Returns the median seconds of an epoch of the loader alone, and of the card alone."""
    device = torch.device(asked.device)
    net, loader = problem(asked)
    fetching = [_seconds(lambda: sum(1 for _ in loader)) for _ in range(_WARM_UP + asked.pairs)]
    batch = [part.to(device) for part in next(iter(loader))]
    epoch = hand_written(net, [batch] * asked.steps, device)
    return median(fetching[_WARM_UP:]), median([_seconds(epoch) for _ in range(_WARM_UP + asked.pairs)][_WARM_UP:])


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Runs and prints."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", choices=("cnn", "transformer", "resnet"), default="cnn")
    words.add_argument("--pairs", type=int, default=5)
    words.add_argument("--steps", type=int, default=50, help="of an epoch")
    words.add_argument("--batch", type=int, help="rows; by default 128, for the transformer 16, for the ResNet 256")
    words.add_argument("--workers", type=int, default=12, help="of the ResNet's loader")
    words.add_argument("--width", type=int, default=768, help="of the transformer")
    words.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    asked = words.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: --device cpu --width 32 --batch 1 --steps 2 tries the bench itself.")
    ours, hands = duel(asked)
    ratios = sorted(one / two for one, two in zip(ours, hands, strict=True))
    where = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    print(
        f"{asked.model} on {where}, bf16, torch {torch.__version__}: {median(ratios):.3f} of the hand-written loop's "
        f"time ({ratios[0]:.3f} to {ratios[-1]:.3f}, {asked.pairs} pairs), {median(ours) / asked.steps * 1e3:.3f} ms a step"
    )
    if asked.model == "resnet":
        loader, card = alone(asked)
        print(
            f"an epoch / max(loader alone, card alone): {median(ours) / max(loader, card):.3f} (loader {loader:.2f} s, "
            f"card {card:.2f} s, dtrain {median(ours):.2f} s, {asked.workers} workers)"
        )


if __name__ == "__main__":
    main()
