"""One problem in all three styles: `dtrain launch -n 2 --cpu -- styles.py script|function|keras HISTORY.csv`.

It is a recipe too: `dtrain train styles.py`. Of 229 scanned digits on 2 ranks and batches of 16 no batch divides.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 3
loss_func = nn.CrossEntropyLoss()


def build_model():
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 10))


def build_dataloaders():
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, valid = TensorDataset(x[:229], y[:229]), TensorDataset(x[229:300], y[229:300])
    return DataLoader(train, batch_size=16, shuffle=True), DataLoader(valid, batch_size=16)


def build_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.3)


def accuracy(predictions, labels):
    return (predictions.argmax(dim=1) == labels).float().mean()


def train_step(model, features, labels):
    model.optimizer.zero_grad()
    predictions = model(features)
    loss = loss_func(predictions, labels)
    loss.backward()
    model.optimizer.step()
    return {"loss": loss.item(), "accuracy": accuracy(predictions, labels).item()}


def valid_step(model, features, labels):
    predictions = model(features)
    return {"loss": loss_func(predictions, labels), "accuracy": accuracy(predictions, labels)}


def script(net, dl_train, dl_valid, optimizer):
    import dtrain

    net, dl_train, dl_valid, optimizer = dtrain.prepare(net, dl_train, dl_valid, optimizer, cpu=True)
    history = dtrain.History()
    for epoch in range(1, EPOCHS + 1):
        net.train()
        train = dtrain.Meter()
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
        history.append({"epoch": epoch, **train.means(), **valid.means("val_"), "lr": 0.3})
    return history.dataframe()


def function(net, dl_train, dl_valid, optimizer):
    import dtrain

    net.optimizer = optimizer
    return dtrain.train_model(
        net, EPOCHS, dl_train, dl_valid, 10, train_step=train_step, valid_step=valid_step, cpu=True
    )


def keras(net, dl_train, dl_valid, optimizer):
    import dtrain

    model = dtrain.KerasModel(net)
    model.compile(loss_func=loss_func, optimizer=optimizer, metrics_dict={"accuracy": accuracy})
    return model.fit(EPOCHS, dl_train, dl_valid, log_step_freq=10, cpu=True)


if __name__ == "__main__":
    import dtrain

    torch.manual_seed(42)
    net = build_model()
    frame = {"script": script, "function": function, "keras": keras}[sys.argv[1]](
        net, *build_dataloaders(), build_optimizer(net)
    )
    columns = ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "lr"]
    if dtrain.is_main():
        frame[columns].to_csv(sys.argv[2], index=False)
