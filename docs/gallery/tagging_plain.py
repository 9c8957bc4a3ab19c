"""A plain loop: tagging words, and the F1 of whole entities over the whole validation set."""

import torch
from tagging_data import TAGS, VOCABULARY, f1, sentences
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader


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


def main(epochs=6, samples=400, batch_size=16, lr=3e-3):
    torch.manual_seed(42)
    model = Tagger(width=32)
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(sentences(samples, 0), batch_size, shuffle=True, collate_fn=collate, generator=generator)
    valid = DataLoader(sentences(samples // 2, 1), 100, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history = []
    for epoch in range(1, epochs + 1):
        row, true, predicted = {"epoch": epoch}, [], []
        for name, loader in (("", train), ("val_", valid)):
            loss_sum = count = 0
            for words, tags in loader:
                with torch.set_grad_enabled(loader is train):
                    out, mask = model(words), tags >= 0
                    loss = cross_entropy(out[mask], tags[mask])
                if loader is train:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                else:
                    true += names(tags, mask)
                    predicted += names(out.argmax(-1), mask)
                loss_sum, count = loss_sum + loss.item() * mask.sum().item(), count + mask.sum().item()
            row[f"{name}loss"] = loss_sum / count
        row["val_f1"] = f1(true, predicted)
        history.append(row)
        print(row)
    return history


if __name__ == "__main__":
    main()
