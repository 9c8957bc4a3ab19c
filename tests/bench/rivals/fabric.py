"""Lightning Fabric: a loop of one's own."""

from typing import Any

from bench.loading import PYTHON, Reported
from bench.problems import Nine

PACKAGE = "lightning"
LAUNCH = PYTHON  # it starts the second rank itself
ENV = {}


def _nine(nine: Nine) -> Reported:
    import torch
    from lightning.fabric import Fabric
    from torchmetrics import MeanMetric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    net = fabric.setup(nine.net)
    loader = fabric.setup_dataloaders(nine.loader())
    net.eval()
    losses, metric = [], MeanMetric()
    with torch.no_grad():
        for values, _ in loader:
            predictions = net(values)
            losses.append(predictions.mean())
            metric.update(predictions)
    return Reported(fabric.all_reduce(torch.stack(losses).mean(), reduce_op="mean").item(), metric.compute().item())


NUMBERS = {"all_reduce(mean); torchmetrics": _nine}


def _train(problem: Any, epochs: int, between: Any) -> None:
    """Sums on each rank, one all_reduce a pass. What its sampler pads counts twice."""
    import torch
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=problem.size, strategy="ddp" if problem.size > 1 else "auto")
    fabric.launch()
    net = problem.net()
    net, optimizer = fabric.setup(net, problem.optimizer(net))
    dl_train, dl_valid = fabric.setup_dataloaders(problem.train_loader(), problem.valid_loader())
    loss_func = problem.loss_func

    def add(sums: Any, loss: Any, predictions: Any, labels: Any) -> None:
        sums[0] += loss.detach() * len(labels)
        sums[1] += (predictions.argmax(dim=1) == labels).sum()
        sums[2] += len(labels)

    for _ in range(epochs):
        net.train()
        train = torch.zeros(3, dtype=torch.float64)
        for features, labels in dl_train:
            optimizer.zero_grad()
            predictions = net(features)
            loss = loss_func(predictions, labels)
            fabric.backward(loss)
            optimizer.step()
            add(train, loss, predictions, labels)
        net.eval()
        valid = torch.zeros(3, dtype=torch.float64)
        with torch.no_grad():
            for features, labels in dl_valid:
                predictions = net(features)
                add(valid, loss_func(predictions, labels), predictions, labels)
        t = fabric.all_reduce(train, reduce_op="sum").tolist()
        v = fabric.all_reduce(valid, reduce_op="sum").tolist()
        between(loss=t[0] / t[2], accuracy=t[1] / t[2], val_loss=v[0] / v[2], val_accuracy=v[1] / v[2])


SPEED = {"one reduce an epoch": _train}
