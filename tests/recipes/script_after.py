import sys

import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain

torch.manual_seed(0)
digits = load_digits()
features = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
targets = torch.tensor(digits.target)
dl_train = DataLoader(TensorDataset(features[:405], targets[:405]), batch_size=32, shuffle=True)
dl_valid = DataLoader(TensorDataset(features[405:462], targets[405:462]), batch_size=32)

net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 32), nn.ReLU(), nn.Linear(32, 10))
loss_func = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(net.parameters(), lr=0.3)


def accuracy(predictions, labels):
    return (predictions.argmax(dim=1) == labels).float().mean()


print = dtrain.print_main
net, dl_train, dl_valid, optimizer = dtrain.prepare(net, dl_train, dl_valid, optimizer, batch="global")
epochs, log_step_freq = int(sys.argv[1]), 5
rows = dtrain.History("history.csv")
for epoch in range(1, epochs + 1):
    net.train()
    train = dtrain.Meter()
    for step, (features, labels) in enumerate(dl_train, 1):
        optimizer.zero_grad()
        predictions = net(features)
        loss, metric = loss_func(predictions, labels), accuracy(predictions, labels)
        loss.backward()
        optimizer.step()
        train.add(loss=loss, accuracy=metric)
        if step % log_step_freq == 0:
            print(f"[step = {step}] {train}")

    net.eval()
    valid = dtrain.Meter()
    for val_step, (features, labels) in enumerate(dl_valid, 1):
        with torch.no_grad():
            predictions = net(features)
            loss, metric = loss_func(predictions, labels), accuracy(predictions, labels)
        valid.add(loss=loss, accuracy=metric)

    row = {"epoch": epoch, **train.means(), **valid.means("val_")}
    rows.append(row)
    print(f"EPOCH = {epoch}, " + ", ".join(f"{name} = {row[name]:.3f}" for name in list(row)[1:]))

dfhistory = pd.DataFrame(rows)
