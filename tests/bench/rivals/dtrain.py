"""dtrain, in its three styles."""

import sys
from functools import partial
from typing import Any

import dtrain
from bench.loading import Reported
from bench.problems import Nine

PACKAGE = "dtrain"
LAUNCH = (sys.executable, "-m", "dtrain", "launch", "-n", "2", "--cpu", "--")
ENV = {}


def _means_of(history: Any) -> Reported:
    return Reported(*history[["val_loss", "val_metric"]].iloc[-1])


def _function_nine(nine: Nine) -> Reported:
    def step(model: Any, values: Any, _: Any) -> Any:
        mean = model(values).mean()
        return mean, mean.detach()

    loaders = nine.loader(), nine.loader()
    steps = {"train_step": step, "valid_step": step}
    return _means_of(dtrain.train_model(nine.net, 1, *loaders, **steps, optimizer=nine.optimizer()))


def _keras_nine(nine: Nine, evaluates: bool) -> Reported:
    model = dtrain.KerasModel(nine.net)
    model.compile(loss_func=nine.loss, optimizer=nine.optimizer(), metrics_dict={"metric": nine.loss})
    if evaluates:
        return Reported(*model.evaluate(nine.loader()).values())
    return _means_of(model.fit(1, nine.loader(), nine.loader()))


def _script_nine(nine: Nine) -> Reported:
    import torch

    net, loader = dtrain.prepare(nine.net, nine.loader())
    net.eval()
    meter = dtrain.Meter()
    with torch.no_grad():
        for values, _ in loader:
            mean = net(values).mean()
            meter.add(loss=mean, metric=mean)
    return Reported(*meter.means().values())


NUMBERS = {
    "train_model": _function_nine,
    "KerasModel.fit": partial(_keras_nine, evaluates=False),
    "KerasModel.evaluate": partial(_keras_nine, evaluates=True),
    "script: prepare, Meter": _script_nine,
}

_MEANS = ("loss", "accuracy", "val_loss", "val_accuracy")


def _fit(problem: Any, epochs: int, between: Any, net: Any, train_step: Any, valid_step: Any) -> None:
    """As `dtrain train` does it, without its checkpoints: exact means, history file, plain lines every ten steps, an
    ear for requests to stop."""
    from dtrain.callbacks.progress import choose_progress
    from dtrain.callbacks.stop import StopOnRequest
    from dtrain.distributed.stopping import Stopping
    from dtrain.distributed.world import bring_up
    from dtrain.engine.callback import Callbacks, EngineCallback
    from dtrain.engine.loop import Engine
    from dtrain.engine.train_step import Task
    from dtrain.launch.signals.stop_request import StopRequest
    from dtrain.rundir.history import History

    world = bring_up(cpu=True)
    task = Task(net, train_step, problem.train_loader(), valid_step, problem.valid_loader())

    class Between(EngineCallback):
        def on_epoch_end(self, row: Any) -> None:
            between(**{name: row[name] for name in _MEANS})

    callbacks = Callbacks(choose_progress(is_main=world.is_main, log_step_freq=10), Between())
    engine = Engine(task, world, epochs=epochs, history=History("history.csv"), callbacks=callbacks)
    with Stopping(world, StopRequest()) as stopping:
        engine.callbacks.add(StopOnRequest(stopping))
        engine.fit()


def _net(problem: Any) -> Any:
    net = problem.net()
    net.optimizer, net.metric_name = problem.optimizer(net), "accuracy"
    return net


def _imperative(problem: Any, epochs: int, between: Any) -> None:
    def train_step(model: Any, features: Any, labels: Any) -> Any:
        model.optimizer.zero_grad()
        predictions = model(features)
        loss = problem.loss_func(predictions, labels)
        loss.backward()
        model.optimizer.step()
        return loss.detach(), problem.accuracy(predictions, labels)

    _fit(problem, epochs, between, _net(problem), train_step, _returning(problem))


def _returning(problem: Any) -> Any:
    def step(model: Any, features: Any, labels: Any) -> Any:
        predictions = model(features)
        return problem.loss_func(predictions, labels), problem.accuracy(predictions.detach(), labels)

    return step


def _declarative(problem: Any, epochs: int, between: Any) -> None:
    _fit(problem, epochs, between, _net(problem), *[_returning(problem)] * 2)


def _script(problem: Any, epochs: int, between: Any) -> None:
    import torch

    net = problem.net()
    mine = problem.train_loader(), problem.valid_loader(), problem.optimizer(net)
    net, dl_train, dl_valid, optimizer = dtrain.prepare(net, *mine, cpu=True)
    history = dtrain.History("history.csv")
    for epoch in range(1, epochs + 1):
        net.train()
        train = dtrain.Meter()
        for step, (features, labels) in enumerate(dl_train, 1):
            optimizer.zero_grad()
            predictions = net(features)
            loss = problem.loss_func(predictions, labels)
            loss.backward()
            optimizer.step()
            train.add(loss=loss, accuracy=problem.accuracy(predictions, labels))
            if step % 10 == 0:
                dtrain.print_main(f"[step = {step}] {train}")
        net.eval()
        valid = dtrain.Meter()
        with torch.no_grad():
            for features, labels in dl_valid:
                predictions = net(features)
                valid.add(loss=problem.loss_func(predictions, labels), accuracy=problem.accuracy(predictions, labels))
        row = {"epoch": epoch, **train.means(), **valid.means("val_")}
        history.append(row)
        dtrain.print_main(row)
        between(**{name: row[name] for name in _MEANS})


def _tutorial(*asked: Any) -> None:
    from bench.hand import tutorial_model

    _fit(*asked, *tutorial_model(asked[0]))


SPEED = {
    "steps that step (imperative)": _imperative,
    "steps that return the loss": _declarative,
    "script: prepare, Meter": _script,
    "the tutorial's steps": _tutorial,
}
