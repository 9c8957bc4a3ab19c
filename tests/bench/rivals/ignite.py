"""PyTorch-Ignite: engines with metrics attached, idist.auto_dataloader and auto_model for several ranks."""

from typing import Any

from bench.loading import TORCHRUN, Reported
from bench.problems import Nine

PACKAGE = "pytorch-ignite"
LAUNCH = TORCHRUN
ENV = {}


def _nine(nine: Nine) -> Reported:
    import ignite.distributed as idist
    from ignite.engine import create_supervised_evaluator
    from ignite.metrics import Average, Loss

    def validate(_: int) -> Reported:
        model = idist.auto_model(nine.net)
        loader = idist.auto_dataloader(nine.dataset, batch_size=2 * idist.get_world_size(), shuffle=False)
        metric = Average(output_transform=lambda output: output[0].mean())
        evaluator = create_supervised_evaluator(model, {"loss": Loss(nine.loss), "metric": metric})
        means = evaluator.run(loader).metrics
        return Reported(float(means["loss"]), float(means["metric"]))

    results: list[Reported] = []
    with idist.Parallel(backend="gloo") as parallel:
        parallel.run(lambda rank: results.append(validate(rank)))
    return results[0]


NUMBERS = {"auto_dataloader; Loss, Average": _nine}


def _train(problem: Any, epochs: int, between: Any) -> None:
    import ignite.distributed as idist
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.metrics import Accuracy, Loss

    if problem.size > 1:
        idist.initialize("gloo")
    net = problem.net()
    optimizer = idist.auto_optim(problem.optimizer(net))
    model = idist.auto_model(net)
    batch = problem.batch_size * problem.size
    dl_train = idist.auto_dataloader(problem.train_set, batch_size=batch, shuffle=True)
    dl_valid = idist.auto_dataloader(problem.valid_set, batch_size=batch, shuffle=False)
    trainer = create_supervised_trainer(
        model, optimizer, problem.loss_func, output_transform=lambda x, y, predictions, loss: (predictions.detach(), y)
    )
    for name, metric in (("loss", Loss(problem.loss_func)), ("accuracy", Accuracy())):
        metric.attach(trainer, name)
    evaluator = create_supervised_evaluator(model, {"loss": Loss(problem.loss_func), "accuracy": Accuracy()})

    @trainer.on(Events.EPOCH_COMPLETED)
    def _(engine: Any) -> None:
        seen = evaluator.run(dl_valid).metrics
        means = engine.state.metrics
        between(loss=means["loss"], accuracy=means["accuracy"], val_loss=seen["loss"], val_accuracy=seen["accuracy"])

    trainer.run(dl_train, max_epochs=epochs)


SPEED = {"Engine": _train}
