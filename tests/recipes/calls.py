"""A run of each style that keeps a folder; killed on request: python calls.py STYLE RUN [EPOCHS].

DIE=N kills the last rank by SIGKILL in its Nth step, TERM_IN=N asks to stop; RANKS=N starts ranks for the call; the other variables change the call.
"""

import os
import signal
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dtrain

SCALE = float(os.environ.get("SCALE", "1"))
steps = [0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, p = int(os.environ.get("HIDDEN", "6")), float(os.environ.get("DROP", "0.2"))
        norm = getattr(nn, os.environ.get("NORM", "BatchNorm1d"))
        self.layers = nn.Sequential(nn.Linear(3, hidden), norm(hidden), nn.Dropout(p), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, features):
        return self.layers(features)


def die():
    steps[0] += 1
    if os.environ.get("DIE") == str(steps[0]) and dtrain.rank() == dtrain.world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("TERM_IN") == str(steps[0]):
        os.kill(os.getpid(), signal.SIGTERM)


def loss_of(predictions, labels):
    return ((predictions - labels) ** 2).mean() * SCALE


def train_step(model, features, labels):
    die()
    return {"loss": loss_of(model(features), labels)}


def valid_step(model, features, labels):
    return {"loss": loss_of(model(features), labels)}


def error(predictions, labels):
    if torch.is_grad_enabled() or predictions.shape:
        die()
    return (predictions - labels).abs().mean()


def data():
    torch.manual_seed(int(os.environ.get("DATA", "0")))
    x = torch.randn(60, 3)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(60, 1)
    shuffle = "ORDERED" not in os.environ
    return DataLoader(TensorDataset(x[:48], y[:48]), 8, shuffle=shuffle), DataLoader(TensorDataset(x[48:], y[48:]), 8)


def script(run, epochs):
    """The same in a loop of its own."""
    dl_train, dl_valid = data()
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=float(os.environ.get("LR", "0.01")))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    net, dl_train, dl_valid = dtrain.prepare(net, dl_train, dl_valid, batch="global", cpu=True)
    run = dtrain.run(run, net, optimizer, scheduler, config={"checkpoint.every_steps": 1})
    for epoch in run.epochs(epochs):
        net.train()
        train, valid = dtrain.Meter(), dtrain.Meter()
        for features, labels in dl_train:
            die()
            optimizer.zero_grad()
            loss = loss_of(net(features), labels)
            loss.backward()
            optimizer.step()
            train.add(loss=loss)
        net.eval()
        for features, labels in dl_valid:
            die()
            with torch.no_grad():
                valid.add(loss=loss_of(net(features), labels))
        scheduler.step()
        run.history.append({"epoch": epoch, **train.means(), **valid.means("val_"), "lr": scheduler.get_last_lr()[0]})
    tell(run.history.dataframe(), net)


def main(style, run, epochs):
    if style == "script":
        return script(run, epochs)
    dl_train, dl_valid = data()
    net = Net()
    kind = getattr(torch.optim, os.environ.get("OPTIMIZER", "Adam"))
    optimizer = kind(net.parameters(), lr=float(os.environ.get("LR", "0.01")))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=float(os.environ.get("GAMMA", "0.9")))
    how = {"run": run, "config": {"checkpoint.every_steps": 1}, "cpu": True, "seed": int(os.environ.get("SEED", "1"))}
    how["batch"], how["verbose"] = os.environ.get("BATCH", "global"), False
    how["num_processes"] = int(os.environ["RANKS"]) if "RANKS" in os.environ else None
    if style == "train_model":
        steps_of = {"train_step": train_step, "valid_step": valid_step}
        frame = dtrain.train_model(
            net, epochs, dl_train, dl_valid, optimizer=optimizer, scheduler=scheduler, **steps_of, **how
        )
    else:
        model = dtrain.KerasModel(net, loss_of, {"error": error}, optimizer, scheduler)
        frame = model.fit(dl_train, dl_valid, epochs=epochs, ckpt_path=f"{run}.best.safetensors", patience=9, **how)
    return tell(frame.drop(columns=["seconds", "samples_per_second"]), net)


def tell(frame, net):
    """Prints all numbers to the last bit, and nothing else, on rank 0."""
    if dtrain.is_main():
        weights = b"".join(value.numpy().tobytes() for value in net.state_dict().values()).hex()
        print(f"<<<{frame.to_csv(index=False)}{weights}>>>")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 3)
