"""A recipe of which the parameters say what has a state that a resumed run must have: a part of the data, or of the net."""

import os
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

N, B = 12, 4
SEEN = []  # the samples' numbers, in this process


class OfNumpy(Sampler):
    """Draws each order from one stream, which its state has."""

    def __init__(self):
        self.rng = np.random.default_rng(7)

    def __len__(self):
        return N

    def __iter__(self):
        return iter(self.rng.permutation(N).tolist())

    def state_dict(self):
        return {"rng": self.rng, "of": np.int64(N), "as": (torch.arange(2), None)}

    def load_state_dict(self, saved):
        assert saved["of"] == N and saved["as"][0].tolist() == [0, 1]
        self.rng = saved["rng"]


class Streams(OfNumpy):
    """The same without a state of its own: the stream is an attribute."""

    state_dict = load_state_dict = None


class Positions(Sampler):
    """Counts its epochs, and goes on within a pass where its state was taken, as samplers for this purpose do."""

    def __init__(self):
        self.epoch = self.position = 0
        self.resumed = None

    def __len__(self):
        return N

    def __iter__(self):
        self.position = self.resumed or 0
        if self.resumed is None:
            self.epoch += 1
        self.resumed = None
        order = np.random.default_rng(self.epoch).permutation(N).tolist()
        for index in order[self.position :]:
            self.position += 1
            yield index

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, saved):
        self.epoch, self.resumed = saved["epoch"], saved["position"]


class Batches:
    """A batch sampler without a state, around a sampler with one."""

    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return N // B

    def __iter__(self):
        return iter(BatchSampler(self.inner, B, drop_last=False))


class Iterable:
    """Batches of the user's own."""

    def __init__(self, data):
        self.data, self.order = data, OfNumpy()

    def __iter__(self):
        for indices in BatchSampler(self.order, B, drop_last=False):
            yield tuple(torch.stack(part) for part in zip(*(self.data[index] for index in indices), strict=True))

    def state_dict(self):
        return self.order.state_dict()

    def load_state_dict(self, saved):
        self.order.load_state_dict(saved)


class Loader(DataLoader):
    """A DataLoader that iterates in a way of its own, and knows where it is."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        for batch in super().__iter__():
            yield [part + 100 * self.passes if part.dtype == torch.int64 else part for part in batch]

    def state_dict(self):
        return {"passes": self.passes}

    def load_state_dict(self, saved):
        self.passes = saved["passes"]


class Reading(Dataset):
    """Augments from a stream that goes on with each sample; the step may change it, too."""

    def __init__(self, data):
        self.data, self.reads, self.weight = data, 0, 1.0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.reads += 1
        x, y, number = self.data[index]
        return x * self.weight + 0.1 * self.reads, y, number

    def state_dict(self):
        return {"reads": self.reads, "weight": self.weight}

    def load_state_dict(self, saved):
        self.reads, self.weight = saved["reads"], saved["weight"]


class Drawing(Dataset):
    """Augments from a generator of its own."""

    def __init__(self, data):
        self.data, self.rng = data, np.random.default_rng(2)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y, number = self.data[index]
        return x + self.rng.random(), y, number


class Flow(IterableDataset):
    def __init__(self, data):
        self.data, self.rng = data, random.Random(3)

    def __iter__(self):
        return (self.data[index] for index in self.rng.sample(range(N), N))


class Cooling(nn.Module):
    """Divides by a temperature, which is extra state: in a nested dict, or the last of a tensor that grows."""

    def __init__(self, form):
        super().__init__()
        self.form, self.temperature, self.history = form, 1.0, torch.ones(1)

    def get_extra_state(self):
        if self.form == "tensor":
            return self.history
        nested = {"is": [self.temperature, np.float64(2.0)], "history": (self.history, b"\x00\xff")}
        return {"broken": object()} if self.form == "broken" else nested

    def set_extra_state(self, state):
        if self.form == "tensor":
            self.history = state
        else:
            self.temperature, self.history = state["is"][0], state["history"][0]
            assert state["history"][1] == b"\x00\xff" and type(state["is"][1]) is np.float64
        self.temperature = float(self.history[-1])

    def forward(self, x):
        if self.training:
            self.temperature *= 0.9
            self.history = torch.cat([self.history, torch.tensor([self.temperature], dtype=torch.float32)])
            self.temperature = float(self.history[-1])
        return x / self.temperature


class NoSetter(nn.Module):
    def get_extra_state(self):
        return {}


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, dtype=torch.complex128))
        self.register_buffer("phase", torch.exp(1j * torch.arange(2, dtype=torch.float64)))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight * self.phase, n=2)


class Cache(nn.Module):
    """Buffers outside of the net's state that grow, and that come to be in training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64), persistent=False)
        self.register_buffer("late", None, persistent=False)

    def forward(self, x):
        if self.training:
            self.seen = torch.cat([self.seen, self.seen[-1:] + 0.1])
            self.late = self.seen[-1:].clone()
        return x * (1 + self.seen.mean()) + (0 if self.late is None else self.late)


class Counter:
    """An object with a state that is no module."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, saved):
        self.count = saved["count"]


class Holder(nn.Module):
    """Objects with states as attributes of a part of the net: in a list, in a dict, a random stream; a sparse buffer."""

    def __init__(self):
        super().__init__()
        self.counters, self.by_name, self.rng = [Counter(), Counter()], {"a": Counter()}, np.random.default_rng(1)
        self.register_buffer("mixing", torch.tensor([[1, 0.5], [0, 1]]).to_sparse(), persistent=False)

    def forward(self, x):
        x = torch.sparse.mm(self.mixing, x.T).T
        if not self.training:
            return x
        for counter in (*self.counters, self.by_name["a"]):
            counter.count += 1
        return x * (1 + 0.1 * self.counters[1].count + 0.1 * self.by_name["a"].count) + self.rng.random()


class Counting(nn.Tanh):
    """Counts in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Net(nn.Module):
    def __init__(self, net):
        super().__init__()
        torch.manual_seed(3)
        parts = {"spectral": Spectral, "cache": Cache, "holder": Holder, "no-setter": NoSetter, "calls": Counting}
        self.first = nn.Linear(2, 2)
        self.part = parts[net]() if net in parts else Cooling(net) if net in ("dict", "tensor", "broken") else nn.Tanh()
        self.head, self.net = nn.Linear(2, 1), net
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        if net.startswith("unfreeze"):
            self.first.requires_grad_(False)

    def forward(self, x):
        return self.head(self.part(self.first(x)))


def build_model(net: str = ""):
    torch.set_default_dtype(torch.float64)
    try:
        return Net(net)
    finally:
        torch.set_default_dtype(torch.float32)


def build_dataloaders(data: str = "", workers: int = 0, persistent: bool = False):
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = TensorDataset(x, x[:, :1] * x[:, 1:], torch.arange(N))
    more = {"num_workers": workers, "persistent_workers": persistent}
    samplers = {"numpy": OfNumpy, "streams": Streams, "positions": Positions}
    valid = DataLoader(plain, B, sampler=OfNumpy() if data == "valid" else None)
    if data in samplers:
        return DataLoader(plain, B, sampler=samplers[data](), **more), valid
    if data in ("batches", "unknown"):
        inner = OfNumpy()
        if data == "unknown":
            inner.rng = os
        return DataLoader(plain, batch_sampler=Batches(inner), **more), valid
    made = {
        "iterable": lambda: Iterable(plain),
        "loader": lambda: Loader(plain, B, sampler=Streams(), **more),
        "reading": lambda: DataLoader(Reading(plain), B, shuffle=True, **more),
        "drawing": lambda: DataLoader(ConcatDataset([Drawing(plain)]), B, shuffle=True, **more),
        "flow": lambda: DataLoader(Flow(plain), B, **more),
    }
    return made.get(data, lambda: DataLoader(plain, B, sampler=SequentialSampler(plain)))(), valid


def build_optimizer(model):
    held = model.head.parameters() if model.net == "unfreeze-group" else model.parameters()
    return torch.optim.SGD(held, lr=0.05, momentum=0.9)


def train_step(model, x, y, number):
    model.count += 1
    if os.environ.get("DIE_AT") == str(int(model.count)):
        raise ValueError("killed for the test")
    SEEN.append(number.tolist())
    if model.net.startswith("unfreeze") and int(model.count) == 4:
        model.first.requires_grad_(True)
        if model.net == "unfreeze-group":
            model.optimizer.add_param_group({"params": list(model.first.parameters()), "lr": 0.02})
    return (model(x) - y).square().mean()


def valid_step(model, x, y, number):
    weight = 1 + torch.arange(len(number))  # so that the order counts
    return {"loss": (model(x) - y).square().mean(), "first": (weight * number).double().mean()}
