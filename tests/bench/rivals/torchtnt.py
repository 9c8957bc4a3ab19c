"""TorchTNT's units with torcheval's metrics, as in its examples."""

from typing import Any

from bench.loading import TORCHRUN, Reported
from bench.problems import Nine

PACKAGE = "torchtnt"
LAUNCH = TORCHRUN
ENV = {}


def _sampler(dataset: Any, shuffle: bool) -> Any:
    import torch.distributed as dist
    from torch.utils.data import DistributedSampler

    return DistributedSampler(dataset, shuffle=shuffle) if dist.is_initialized() else None


def _nine(nine: Nine) -> Reported:
    import torch
    from torcheval.metrics import Mean
    from torcheval.metrics.toolkit import sync_and_compute
    from torchtnt.framework.evaluate import evaluate
    from torchtnt.framework.unit import EvalUnit
    from torchtnt.utils import init_from_env

    device = init_from_env(device_type="cpu")

    class Unit(EvalUnit):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss, self.metric = nine.net, Mean(device=device), Mean(device=device)

        def eval_step(self, state: Any, data: Any) -> None:
            with torch.no_grad():
                predictions = self.net(data[0])
            self.loss.update(predictions.mean())
            self.metric.update(predictions)

    unit = Unit()
    evaluate(unit, nine.loader(_sampler(nine.dataset, shuffle=False)))
    told = [sync_and_compute(metric).item() for metric in (unit.loss, unit.metric)]
    return Reported(*told)


NUMBERS = {"EvalUnit; torcheval Mean": _nine}


def _train(problem: Any, epochs: int, between: Any) -> None:
    from torcheval.metrics import Mean, MulticlassAccuracy
    from torcheval.metrics.toolkit import sync_and_compute_collection
    from torchtnt.framework.auto_unit import AutoUnit
    from torchtnt.framework.fit import fit
    from torchtnt.utils import init_from_env

    device = init_from_env(device_type="cpu")

    class Unit(AutoUnit):
        def __init__(self) -> None:
            super().__init__(module=problem.net(), device=device, strategy="ddp" if problem.size > 1 else None)
            self.sums = {"loss": Mean(), "accuracy": MulticlassAccuracy(), "val_loss": Mean()}
            self.sums["val_accuracy"] = MulticlassAccuracy()

        def configure_optimizers_and_lr_scheduler(self, module: Any) -> Any:
            return problem.optimizer(module), None

        def compute_loss(self, state: Any, data: Any) -> Any:
            predictions = self.module(data[0])
            return problem.loss_func(predictions, data[1]), predictions

        def _add(self, prefix: str, data: Any, loss: Any, predictions: Any) -> None:
            self.sums[f"{prefix}loss"].update(loss.detach(), weight=float(len(data[1])))
            self.sums[f"{prefix}accuracy"].update(predictions.detach(), data[1])

        def on_train_step_end(self, state: Any, data: Any, step: int, results: Any) -> None:
            self._add("", data, results.loss, results.outputs)

        def on_eval_step_end(self, state: Any, data: Any, step: int, loss: Any, outputs: Any) -> None:
            self._add("val_", data, loss, outputs)

        def on_eval_end(self, state: Any) -> None:
            # Of one rank, sync_and_compute_collection would warn.
            several = problem.size > 1
            found = sync_and_compute_collection(self.sums) if several else None
            means = found if found is not None else {name: one.compute() for name, one in self.sums.items()}
            for one in self.sums.values():
                one.reset()
            between(**{name: float(value) for name, value in means.items()})

    dl_train = problem.train_loader(_sampler(problem.train_set, shuffle=True))
    dl_valid = problem.valid_loader(_sampler(problem.valid_set, shuffle=False))
    fit(Unit(), dl_train, dl_valid, max_epochs=epochs)


SPEED = {"AutoUnit": _train}
