"""The script style: a training loop of your own, right on any number of ranks by a few helpers of dtrain's.

Expected: val_accuracy of at least 0.92 after 6 epochs (measured: 0.947).

    python train.py                           one process
    dtrain launch -n 2 --cpu -- train.py      two ranks, with the same history
"""

import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import dtrain

torch.manual_seed(0)  # every rank builds the same net, and splits the data in the same way

# 1,797 scanned digits of 8x8 pixels that come with scikit-learn.
scans = load_digits()
data = TensorDataset(torch.tensor(scans.data, dtype=torch.float32) / 16, torch.tensor(scans.target))
train_data, valid_data = random_split(data, [0.8, 0.2])
dl_train, dl_valid = DataLoader(train_data, batch_size=32, shuffle=True), DataLoader(valid_data, batch_size=32)

net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(net.parameters(), lr=0.005)
loss_func = nn.CrossEntropyLoss()


def accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """The share of samples whose highest logit is the label's."""
    return (predictions.argmax(dim=1) == labels).float().mean()


# From here on the loaders deal each sample to one rank, and the net's gradients are those of the whole batch.
# batch="global": the loader's batch size is that of all ranks together, so that any number of them learns the same.
net, dl_train, dl_valid, optimizer = dtrain.prepare(net, dl_train, dl_valid, optimizer, batch="global")

folder = Path("runs", time.strftime("script-%Y%m%d-%H%M%S"))
if dtrain.is_main():
    folder.mkdir(parents=True)
history = dtrain.History(folder / "history.csv")  # rank 0 writes it, for `dtrain history`, `dtrain plot` and others

for epoch in range(1, 7):
    net.train()
    train = dtrain.Meter()  # exact means over the samples of all ranks
    for features, labels in dl_train:
        optimizer.zero_grad()
        predictions = net(features)
        loss = loss_func(predictions, labels)
        loss.backward()
        optimizer.step()
        train.add(loss=loss, accuracy=accuracy(predictions, labels))

    net.eval()
    valid = dtrain.Meter()
    for features, labels in dl_valid:
        with torch.no_grad():
            predictions = net(features)
        valid.add(loss=loss_func(predictions, labels), accuracy=accuracy(predictions, labels))

    # Every rank takes part in these three: never put them under `if dtrain.is_main()`.
    row = {"epoch": epoch, **train.means(), **valid.means("val_")}
    history.append(row)
    dtrain.save_weights(net, folder / "checkpoints", row)
    dtrain.print_main(", ".join(f"{name} = {value:.4g}" for name, value in row.items()))

dtrain.print_main(f"run: {folder}")
