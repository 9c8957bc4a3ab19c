"""What a step costs on a GPU with dtrain, as a multiple of a loop written by hand; bf16 on both sides.

    python tests/bench/gpu.py [--model cnn|transformer] [--pairs 5] [--steps 50] [--device cuda]

`cnn` is the digits recipe's net, `transformer` one of 100 million parameters (12 layers, 768 wide, 256 tokens a row).
An epoch of either side trains a number of steps and reads its mean loss once, at the end; the two take turns in one
process. `--device cpu --width 32 --batch 1 --steps 2` tries the bench itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from helpers.callbacks import on
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

_WARM_UP = 2  # epochs of each side that are not counted
_TOKENS, _WORDS = 256, 32_000


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


def problem(model: str, steps: int, width: int, batch: int | None) -> tuple[nn.Module, DataLoader[Any]]:
    """The net, the same at each call, and its training batches in pinned memory."""
    torch.manual_seed(0)
    if model == "cnn":
        from dtrain.recipes.digits import DigitsNet

        batch, net = batch or 128, DigitsNet(dropout=0.0)
        data = TensorDataset(torch.randn(steps * batch, 1, 32, 32), torch.randint(10, (steps * batch,)))
    else:
        batch, net = batch or 16, Transformer(width)
        words = torch.randint(_WORDS, (steps * batch, _TOKENS))
        data = TensorDataset(words, words.roll(-1, dims=1))
    return net, DataLoader(data, batch, shuffle=True, pin_memory=torch.cuda.is_available())


def hand_written(net: nn.Module, loader: DataLoader[Any], device: torch.device) -> Callable[[], float]:
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
    hand = hand_written(*problem(asked.model, asked.steps, asked.width, asked.batch), world.device)
    net, loader = problem(asked.model, asked.steps, asked.width, asked.batch)
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


def main() -> None:
    """Runs and prints."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", choices=("cnn", "transformer"), default="cnn")
    words.add_argument("--pairs", type=int, default=5)
    words.add_argument("--steps", type=int, default=50, help="of an epoch")
    words.add_argument("--batch", type=int, help="rows; by default 128, for the transformer 16")
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


if __name__ == "__main__":
    main()
