"""A language model over lines of unequal length, padded per batch: its loss is exact per token."""

import math
from pydoc_data.topics import topics  # Python's language reference

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import dtrain


def read_lines(samples):
    lines = [line.strip().encode() for name in sorted(topics) for line in topics[name].splitlines()]
    return [torch.tensor(list(line)) for line in [line for line in lines if 20 <= len(line) <= 80][:samples]]


def collate(lines):  # (lines, longest); 0 is padding
    return pad_sequence(lines, batch_first=True)


class Transformer(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(80, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.logits = nn.Linear(width, 256)

    def forward(self, tokens):  # padding comes last, so causal attention never sees it
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.tokens(tokens) + self.places.weight[:length]
        return self.logits(self.layers(hidden, mask=mask, is_causal=True))


def build_model(width: int = 64, layers: int = 2):
    return Transformer(width, layers)


def build_dataloaders(samples: int = 1600, batch_size: int = 32):
    lines = read_lines(samples)
    cut = len(lines) * 9 // 10
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(lines[:cut], batch_size, shuffle=True, collate_fn=collate, generator=generator)
    return train, DataLoader(lines[cut:], 100, collate_fn=collate)


def build_optimizer(model, lr: float = 3e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def train_step(model, tokens):
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum")
    correct, count = (logits.argmax(-1) == targets)[targets != 0].sum(), (targets != 0).sum()
    return {"loss": dtrain.Mean(loss, count), "accuracy": dtrain.Mean(correct, count)}


valid_step = train_step


def after_epoch(row):
    return {"val_perplexity": math.exp(row["val_loss"])}


def predict_step(model, tokens):  # how well each line is predicted: nats per character
    targets = tokens[:, 1:]
    log_p = model(tokens[:, :-1]).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return -(log_p * (targets != 0)).sum(1) / (targets != 0).sum(1)
