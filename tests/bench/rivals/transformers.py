"""Hugging Face's Trainer."""

from typing import Any

from bench.loading import TORCHRUN, Reported
from bench.problems import Nine

PACKAGE = "transformers"
LAUNCH = TORCHRUN
ENV = {}


def _rows(rows: list[Any]) -> dict[str, Any]:
    import torch

    return {"features": torch.stack([row[0] for row in rows]), "labels": torch.stack([row[1] for row in rows])}


def _nine(nine: Nine) -> Reported:
    from torch import nn
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nine.net

        def forward(self, features: Any, labels: Any) -> dict[str, Any]:
            predictions = self.net(features)
            return {"loss": nine.loss(predictions, labels), "logits": predictions}

    arguments = TrainingArguments(
        output_dir="out", use_cpu=True, per_device_eval_batch_size=2, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(
        Model(),
        arguments,
        data_collator=_rows,
        eval_dataset=nine.dataset,
        compute_metrics=lambda found: {"metric": float(found.predictions.mean())},
    )
    told = trainer.evaluate()
    return Reported(told["eval_loss"], told["eval_metric"])


NUMBERS = {"eval_loss; compute_metrics": _nine}


def _train(problem: Any, epochs: int, between: Any) -> None:
    import torch
    from torch import nn
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Model(nn.Module):
        """It logs the mean train loss of an epoch; the train accuracy is summed up here."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss_func = problem.net(), problem.loss_func
            self.hits, self.count = torch.zeros((), dtype=torch.int64), 0

        def forward(self, features: Any, labels: Any) -> dict[str, Any]:
            predictions = self.net(features)
            if self.training:
                self.hits += (predictions.argmax(dim=1) == labels).sum()
                self.count += len(labels)
            return {"loss": self.loss_func(predictions, labels), "logits": predictions}

    class Bell(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
            sums = torch.stack([model.hits, torch.tensor(model.count)])
            if problem.size > 1:
                torch.distributed.all_reduce(sums)
            model.hits.zero_()
            model.count = 0
            loss = next(entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
            accuracy = float(sums[0] / sums[1])
            between(loss=loss, accuracy=accuracy, val_loss=metrics["eval_loss"], val_accuracy=metrics["eval_accuracy"])

    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(axis=1) == found.label_ids).mean())}

    model = Model()
    optimizer = problem.optimizer(model.net)
    arguments = TrainingArguments(
        output_dir="out",
        use_cpu=True,
        num_train_epochs=epochs,
        per_device_train_batch_size=problem.batch_size,
        per_device_eval_batch_size=problem.batch_size,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        max_grad_norm=0.0,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    Trainer(
        model,
        arguments,
        data_collator=_rows,
        train_dataset=problem.train_set,
        eval_dataset=problem.valid_set,
        compute_metrics=accuracy,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        callbacks=[Bell()],
    ).train()


SPEED = {"Trainer": _train}
