"""A plain loop: a language model over lines of unequal length, padded per batch."""

import math
from pydoc_data.topics import topics  # Python's language reference

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader


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
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.tokens(tokens) + self.places.weight[:length]
        return self.logits(self.layers(hidden, mask=mask, is_causal=True))


def sums(model, tokens):  # over the tokens: loss, correct predictions, their number
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum")
    return loss, (logits.argmax(-1) == targets)[targets != 0].sum(), (targets != 0).sum()


def main(epochs=5, samples=1600, batch_size=32, lr=3e-3):
    torch.manual_seed(42)
    model = Transformer(width=64, layers=2)
    lines = read_lines(samples)
    cut = len(lines) * 9 // 10
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(lines[:cut], batch_size, shuffle=True, collate_fn=collate, generator=generator)
    valid = DataLoader(lines[cut:], 100, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch}
        for name, loader in (("", train), ("val_", valid)):
            model.train(loader is train)
            total = correct = count = 0
            for tokens in loader:
                with torch.set_grad_enabled(loader is train):
                    loss, right, number = sums(model, tokens)
                if loader is train:
                    optimizer.zero_grad()
                    (loss / number).backward()
                    optimizer.step()
                total, correct, count = total + loss.item(), correct + right.item(), count + number.item()
            row |= {f"{name}loss": total / count, f"{name}accuracy": correct / count}
        row["val_perplexity"] = math.exp(row["val_loss"])
        history.append(row)
        print(row)
    return history


if __name__ == "__main__":
    main()
