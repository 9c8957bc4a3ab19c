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

    from bench.hand import Sums, means_of

    fabric = Fabric(accelerator="cpu", devices=problem.size, strategy="ddp" if problem.size > 1 else "auto")
    fabric.launch()
    net = problem.net()
    net, optimizer = fabric.setup(net, problem.optimizer(net))
    dl_train, dl_valid = fabric.setup_dataloaders(problem.train_loader(), problem.valid_loader())
    loss_func = problem.loss_func

    for _ in range(epochs):
        net.train()
        train = Sums()
        for features, labels in dl_train:
            optimizer.zero_grad()
            predictions = net(features)
            loss = loss_func(predictions, labels)
            fabric.backward(loss)
            optimizer.step()
            train.add(loss, predictions, labels)
        net.eval()
        valid = Sums()
        with torch.no_grad():
            for features, labels in dl_valid:
                predictions = net(features)
                valid.add(loss_func(predictions, labels), predictions, labels)
        between(
            **means_of(
                fabric.all_reduce(train.packed(), reduce_op="sum"), fabric.all_reduce(valid.packed(), reduce_op="sum")
            )
        )


SPEED = {"one reduce an epoch": _train}
