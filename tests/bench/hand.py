"""The loops that trainers are compared with: a tuned hand-written one, and the tutorial's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from bench.problems import Problem


class Sums:
    """Sums of one pass, which stay tensors: nothing is read back before its end."""

    def __init__(self) -> None:
        self.loss, self.hits = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        self.count = 0

    def add(self, loss: torch.Tensor, predictions: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a batch; neither tensor's graph is kept."""
        self.loss += loss.detach() * len(labels)
        self.hits += (predictions.detach().argmax(dim=1) == labels).sum()
        self.count += len(labels)

    def packed(self) -> torch.Tensor:
        """Loss, hits and count, to be added up over ranks."""
        return torch.tensor([self.loss.item(), self.hits.item(), self.count], dtype=torch.float64)


def means_of(train: torch.Tensor, valid: torch.Tensor) -> dict[str, float]:
    """The epoch's means from the packed sums of all ranks."""
    loss, hits, count, val_loss, val_hits, val_count = (*train.tolist(), *valid.tolist())
    return {
        "loss": loss / count,
        "accuracy": hits / count,
        "val_loss": val_loss / val_count,
        "val_accuracy": val_hits / val_count,
    }


class TunedLoop:
    """What an expert writes: sums stay tensors, nothing is read back within a pass, one all-reduce an epoch.

    Means are exact: of the samples that were trained on, and of each validation sample once.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.net = problem.net()
        self.optimizer = problem.optimizer(self.net)
        self.model, self.sampler = self.net, None
        if problem.size > 1:
            self.model = DistributedDataParallel(self.net)
            self.sampler = DistributedSampler(problem.train_set)
        self.dl_train = problem.train_loader(self.sampler)
        self.dl_valid = problem.own_valid_loader() if problem.size > 1 else problem.valid_loader()
        self.epochs = 0

    def epoch(self) -> dict[str, float]:
        """Trains and validates once."""
        if self.sampler is not None:
            self.sampler.set_epoch(self.epochs)
        self.epochs += 1
        sums = torch.stack([self._train().packed(), self._valid().packed()])
        if self.problem.size > 1:
            dist.all_reduce(sums)
        return means_of(*sums)

    def _train(self) -> Sums:
        model, optimizer, loss_func, sums = self.model, self.optimizer, self.problem.loss_func, Sums()
        model.train()
        for features, labels in self.dl_train:
            optimizer.zero_grad()
            predictions = model(features)
            loss = loss_func(predictions, labels)
            loss.backward()
            optimizer.step()
            sums.add(loss, predictions, labels)
        return sums

    @torch.no_grad()
    def _valid(self) -> Sums:
        net, loss_func, sums = self.net, self.problem.loss_func, Sums()
        net.eval()
        for features, labels in self.dl_valid:
            predictions = net(features)
            sums.add(loss_func(predictions, labels), predictions, labels)
        return sums


class TutorialNet(nn.Module):
    """A net that carries what the tutorial's steps look for; a Sequential would run the loss as a layer."""

    def __init__(self, problem: Problem) -> None:
        from recipes.tutorial_cells import accuracy

        super().__init__()
        self.layers = problem.net()
        self.optimizer = problem.optimizer(self.layers)
        self.loss_func, self.metric_func, self.metric_name = problem.loss_func, accuracy, "accuracy"

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


def tutorial_model(problem: Problem) -> tuple[Any, Any, Any]:
    """The problem's net, and the tutorial's two steps."""
    from recipes.tutorial_cells import train_step, valid_step

    return TutorialNet(problem), train_step, valid_step


class TutorialLoop:
    """The tutorial's `train_model`, one epoch at a time."""

    def __init__(self, problem: Problem) -> None:
        import pandas as pd

        self.model, self.train_step, self.valid_step = tutorial_model(problem)
        self.dl_train, self.dl_valid = problem.train_loader(), problem.valid_loader()
        self.dfhistory = pd.DataFrame(columns=["epoch", "loss", "accuracy", "val_loss", "val_accuracy"])
        self.log_step_freq = 10

    def epoch(self) -> dict[str, float]:
        """Trains and validates once."""
        loss_sum, metric_sum, step = 0.0, 0.0, 1
        for step, (features, labels) in enumerate(self.dl_train, 1):
            loss, metric = self.train_step(self.model, features, labels)
            loss_sum += loss
            metric_sum += metric
            if step % self.log_step_freq == 0:
                print(f"[step = {step}] loss: {loss_sum / step:.3f}, accuracy: {metric_sum / step:.3f}")
        val_loss_sum, val_metric_sum, val_step = 0.0, 0.0, 1
        for val_step, (features, labels) in enumerate(self.dl_valid, 1):  # noqa: B007 - as tutorials write it
            val_loss, val_metric = self.valid_step(self.model, features, labels)
            val_loss_sum += val_loss
            val_metric_sum += val_metric
        epoch = len(self.dfhistory) + 1
        means = (loss_sum / step, metric_sum / step, val_loss_sum / val_step, val_metric_sum / val_step)
        self.dfhistory.loc[epoch - 1] = (epoch, *means)
        print(
            "EPOCH = {}, loss = {:.3f}, accuracy = {:.3f}, val_loss = {:.3f}, val_accuracy = {:.3f}".format(
                epoch, *means
            )
        )
        return dict(zip(("loss", "accuracy", "val_loss", "val_accuracy"), means, strict=True))
