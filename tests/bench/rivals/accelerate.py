"""Hugging Face Accelerate alone, in the three ways that people gather their values in."""

from collections.abc import Callable
from typing import Any

from bench.loading import TORCHRUN, Reported
from bench.problems import Nine

PACKAGE = "accelerate"
LAUNCH = TORCHRUN
ENV = {}


def _nine(nine: Nine, gather: Callable[[Any, Any], Any]) -> Reported:
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net, loader = accelerator.prepare(nine.net, nine.loader())
    net.eval()
    gathered = []
    with torch.no_grad():
        for values, _ in loader:
            gathered.append(gather(accelerator, net(values)))
    mean = torch.cat(gathered).mean().item()
    return Reported(mean, mean)


NUMBERS = {
    "gather_for_metrics of batch means": lambda nine: _nine(nine, lambda acc, p: acc.gather_for_metrics(p.mean())),
    "gather of per-sample values": lambda nine: _nine(nine, lambda acc, p: acc.gather(p)),
    "gather_for_metrics of per-sample values": lambda nine: _nine(nine, lambda acc, p: acc.gather_for_metrics(p)),
}


def _prepared(problem: Any) -> tuple[Any, ...]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = problem.net()
    prepared = accelerator.prepare(net, problem.optimizer(net), problem.train_loader(), problem.valid_loader())
    return (accelerator, *prepared)


def _reducing(problem: Any, epochs: int, between: Any) -> None:
    """Sums on each rank, one reduce a pass. What Accelerate pads counts twice."""
    import torch

    from bench.hand import Sums, means_of

    accelerator, net, optimizer, dl_train, dl_valid = _prepared(problem)
    loss_func = problem.loss_func

    for _ in range(epochs):
        net.train()
        train = Sums()
        for features, labels in dl_train:
            optimizer.zero_grad()
            predictions = net(features)
            loss = loss_func(predictions, labels)
            accelerator.backward(loss)
            optimizer.step()
            train.add(loss, predictions, labels)
        net.eval()
        valid = Sums()
        with torch.no_grad():
            for features, labels in dl_valid:
                predictions = net(features)
                valid.add(loss_func(predictions, labels), predictions, labels)
        between(**means_of(accelerator.reduce(train.packed()), accelerator.reduce(valid.packed())))


def _gathering(problem: Any, epochs: int, between: Any) -> None:
    """Gathers predictions and labels at each step, as Accelerate's own guide does, so that means are exact."""
    import torch

    accelerator, net, optimizer, dl_train, dl_valid = _prepared(problem)
    loss_func = problem.loss_func

    def means(gathered: list[Any]) -> tuple[float, float]:
        predictions, labels = (torch.cat(part) for part in zip(*gathered, strict=True))
        return loss_func(predictions, labels).item(), problem.accuracy(predictions, labels).item()

    for _ in range(epochs):
        net.train()
        train, valid = [], []
        for features, labels in dl_train:
            optimizer.zero_grad()
            predictions = net(features)
            accelerator.backward(loss_func(predictions, labels))
            optimizer.step()
            train.append(accelerator.gather_for_metrics((predictions.detach(), labels)))
        net.eval()
        with torch.no_grad():
            for features, labels in dl_valid:
                valid.append(accelerator.gather_for_metrics((net(features), labels)))
        loss, accuracy = means(train)
        val_loss, val_accuracy = means(valid)
        between(loss=loss, accuracy=accuracy, val_loss=val_loss, val_accuracy=val_accuracy)


SPEED = {"one reduce an epoch": _reducing, "gathering each step": _gathering}
