"""Nine samples with the values 0 to 8, in batches of 2: their mean is 4, on any number of ranks.

    dtrain launch -n 2 --cpu -- zero_to_eight.py

Each style prints the loss and metric of its training and validation pass, and how often it validated on each value.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain

VALUES = torch.arange(9.0)[:, None]


class Still(nn.Module):
    """A net that returns what it gets, whatever it learns, and counts what it validates on."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.validated = [0] * 9

    def forward(self, x):
        if not self.training:
            for value in x.flatten().tolist():
                self.validated[round(value)] += 1
        return x + 0 * self.unused


def loader():
    return DataLoader(TensorDataset(VALUES, VALUES), batch_size=2)


def step(model, x, y):
    return model(x).mean(), y.mean()


def mean_loss(predictions, labels):
    return predictions.mean()


def mean_label(predictions, labels):
    return labels.mean()


def function(net):
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return dtrain.train_model(
        net, 1, loader(), loader(), train_step=step, valid_step=step, verbose=False, cpu=True
    ).to_dict("records")[0]


def keras(net):
    model = dtrain.KerasModel(net)
    model.compile(loss_func=mean_loss, metrics_dict={"metric": mean_label})
    return model.fit(1, loader(), loader(), verbose=False, cpu=True).to_dict("records")[0]


def script(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net, dl_train, dl_valid, optimizer = dtrain.prepare(net, loader(), loader(), optimizer, cpu=True)
    train, valid = dtrain.Meter(), dtrain.Meter()
    net.train()
    for x, y in dl_train:
        optimizer.zero_grad()
        loss, metric = step(net, x, y)
        loss.backward()
        optimizer.step()
        train.add(loss=loss, metric=metric)
    net.eval()
    for x, y in dl_valid:
        loss, metric = step(net, x, y)
        valid.add(loss=loss, metric=metric)
    return train.means() | valid.means("val_")


def on_all_ranks(counts):
    counts = torch.tensor(counts)
    if dtrain.world_size() > 1:
        torch.distributed.all_reduce(counts)
    return counts.tolist()


if __name__ == "__main__":
    for style in (function, keras, script):
        net = Still()
        row = style(net)
        told = ", ".join(f"{name} = {row[name]}" for name in ("loss", "metric", "val_loss", "val_metric"))
        seen = on_all_ranks(net.validated)
        dtrain.print_main(f"{style.__name__}: {told}; validated on n = {sum(seen)}, each value {seen}")
