"""Tagging words: a loss per word, the F1 of whole entities as a plain function, predictions that are lists."""

import torch
from tagging_data import TAGS, VOCABULARY, f1, sentences
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

import dtrain


def collate(items):
    words, tags = zip(*items, strict=True)
    return pad_sequence(words, batch_first=True), pad_sequence(tags, batch_first=True, padding_value=-100)


class Tagger(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed, self.out = nn.Embedding(len(VOCABULARY), width), nn.Linear(2 * width, len(TAGS))
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)

    def forward(self, words):
        lengths = (words > 0).sum(1).cpu()
        packed = pack_padded_sequence(self.embed(words), lengths, batch_first=True, enforce_sorted=False)
        return self.out(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


def names(tags, mask):  # a list of tags for each sentence
    return [[TAGS[t] for t in row[kept].tolist()] for row, kept in zip(tags, mask)]


def build_model(width: int = 32):
    return Tagger(width)


def build_dataloaders(samples: int = 400, batch_size: int = 16):
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(sentences(samples, 0), batch_size, shuffle=True, collate_fn=collate, generator=generator)
    return train, DataLoader(sentences(samples // 2, 1), 100, collate_fn=collate)


def build_optimizer(model, lr: float = 3e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def train_step(model, words, tags):
    out, mask = model(words), tags >= 0
    return dtrain.Mean(cross_entropy(out[mask], tags[mask], reduction="sum"), mask.sum())


def valid_step(model, words, tags):
    out, mask = model(words), tags >= 0
    loss = dtrain.Mean(cross_entropy(out[mask], tags[mask], reduction="sum"), mask.sum())
    return {"loss": loss, "f1": (names(tags, mask), names(out.argmax(-1), mask))}


def build_metrics():
    return {"f1": f1}


def predict_step(model, words):
    return names(model(words).argmax(-1), words > 0)
