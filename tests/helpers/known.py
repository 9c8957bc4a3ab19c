"""Independent answers: the digits net and its loss in NumPy, float64, from saved weights alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def _convolved(images: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(images, weight.shape[2:], axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight, optimize=True) + bias[None, :, None, None]


def _pooled(images: np.ndarray) -> np.ndarray:
    n, c, h, w = images.shape
    return images[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))


def digits_valid_set(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (samples, 1, 28, 28) and labels (samples,) of the recipe's validation split."""
    scans = load_digits()
    _, rows = train_test_split(range(1797), test_size=359, stratify=scans.target, random_state=0)
    nearest = np.arange(28) * 8 // 28
    images = (scans.images / 8 - 1)[rows[:samples]][:, nearest][:, :, nearest]
    return images[:, None], scans.target[rows[:samples]]


def digits_loss_and_accuracy(weights: Path, samples: int) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over the first `samples` validation scans."""
    w = {name: value.astype(np.float64) for name, value in load_file(weights).items()}
    images, labels = digits_valid_set(samples)
    hidden = _pooled(_convolved(images, w["layers.0.weight"], w["layers.0.bias"]))
    hidden = _pooled(_convolved(hidden, w["layers.2.weight"], w["layers.2.bias"])).max(axis=(2, 3))
    hidden = np.maximum(hidden @ w["layers.7.weight"].T + w["layers.7.bias"], 0)
    logits = hidden @ w["layers.9.weight"].T + w["layers.9.bias"]
    return cross_entropy(logits, labels), float((logits.argmax(axis=1) == labels).mean())


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the rows."""
    top = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return float((log_sum - logits[np.arange(len(labels)), labels]).mean())
