"""Padded batches, weights in channels_last, two optimizers in a step whose graph the first one's step is within."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Texts(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(1, 20, (3 + index * 7 % 9,), generator=generator)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 4, padding_idx=0)
        self.near = nn.Conv2d(4, 4, (3, 1), padding=(1, 0)).to(memory_format=torch.channels_last)
        self.out = nn.Linear(4, 20)

    def forward(self, ids):  # (rows, length)
        return torch.tanh(self.near(self.embed(ids).mT[..., None])[..., 0].mT)  # (rows, length, 4)


def build_model(fault: str = ""):
    model = nn.ModuleDict({"tagger": Tagger(), "critic": nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))})
    model.opt_t = torch.optim.Adam(model["tagger"].parameters(), lr=0.02)
    model.opt_c = torch.optim.SGD(model["critic"].parameters(), lr=0.1)
    model.fault = fault
    return model


def build_dataloaders(batch_size: int = 6):
    return DataLoader(Texts(), batch_size, shuffle=True, collate_fn=padded), None


def padded(rows):
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def train_step(model, ids):
    real = (ids != 0).float()
    hidden = model["tagger"](ids)
    means = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    model.opt_c.zero_grad()
    critic = (model["critic"](means.detach()) - real.sum(1, keepdim=True) / 9).square().mean()
    critic.backward()
    model.opt_c.step()

    model.opt_t.zero_grad()
    errors = nn.functional.cross_entropy(model["tagger"].out(hidden).flatten(0, 1), ids.flatten(), reduction="none")
    errors = errors.view(ids.shape) * real
    each = errors.sum(1) / (ids.shape[1] if model.fault == "padding" else real.sum(1))
    loss = each.mean() - 0.1 * model["critic"](means).mean()
    (loss * ids.float().mean() if model.fault == "scaled" else loss).backward()
    model.opt_t.step()
    return {"loss": loss.detach(), "critic": critic.detach()}
