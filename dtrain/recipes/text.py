"""A small transformer that predicts the next character of a text.

`data.file=PATH` takes a text of yours. Without it, Python's language reference, as in help(). A character is a byte.
"""

from pathlib import Path
from pydoc_data.topics import topics  # texts by name: "if", "operator-summary", ...
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain import ConfigError


class Transformer(nn.Module):
    """Characters (batch, length) to logits (batch, length, 256) of the character that follows each of them."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(256, width)
        self.places = nn.Parameter(torch.randn(context, width) / 10)
        self.nearest = nn.Conv1d(width, width, kernel_size=4, padding=3)  # learns syllables long before attention does
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.logits = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        """No place sees what comes after it: the convolution's last outputs are cut off, the mask hides the rest."""
        length = text.shape[1]
        hidden = self.characters(text)
        hidden = hidden + self.nearest(hidden.transpose(1, 2))[:, :, :length].transpose(1, 2) + self.places[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        return self.logits(self.layers(hidden, mask=mask, is_causal=True))  # type: ignore[no-any-return]


def build_model(width: int = 64, layers: int = 2, heads: int = 4, context: int = 64) -> nn.Module:
    """A fresh net; `context` is the longest text it can read at once, in characters."""
    return Transformer(width, layers, heads, context)


def read_text(file: str, least: int) -> bytes:
    """Your file's bytes, or the language reference's."""
    if not file:
        return "\n".join(topics[name] for name in sorted(topics)).encode()
    content = Path(file).read_bytes() if Path(file).is_file() else b""
    if len(content) < least:
        raise ConfigError(f"data.file = {file}: should be a file of {least} bytes or more, and has {len(content)}.")
    return content


def build_dataloaders(
    file: str = "", characters: int = 150_000, length: int = 64, batch_size: int = 16
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Pieces of the first so many characters, of one length: at most the net's context. Labels: the next characters."""
    text = torch.tensor(bytearray(read_text(file, 10 * length + 1)[: characters + 1]), dtype=torch.long)
    pieces = (len(text) - 1) // length
    features, labels = (part[: pieces * length].view(pieces, length) for part in (text[:-1], text[1:]))
    train = pieces * 9 // 10
    return (
        DataLoader(TensorDataset(features[:train], labels[:train]), batch_size, shuffle=True),
        DataLoader(TensorDataset(features[train:], labels[train:]), batch_size),
    )


def build_optimizer(model: nn.Module, lr: float = 0.004) -> torch.optim.Optimizer:
    """AdamW over all weights."""
    return torch.optim.AdamW(model.parameters(), lr=lr)


def train_step(model: Any, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Loss and accuracy over a batch's characters. The loss keeps its graph: dtrain does the rest."""
    logits = model(features).transpose(1, 2)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return {"loss": nn.functional.cross_entropy(logits, labels), "accuracy": accuracy}


valid_step = train_step
