"""A net's layers, shapes and parameters, by torchinfo."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dtrain.data.batches import BatchReader
from dtrain.data.loader_group import train_by_name
from dtrain.engine.predict import features_of
from dtrain.engine.train_step import Task
from dtrain.errors import DataError, nothing_yielded

# As torchinfo names its units where Python formats an enum's member by its name.
_UNIT = re.compile(r"Units\.([A-Z]+)")
_LETTERS = {"TERABYTES": "T", "GIGABYTES": "G", "MEGABYTES": "M", "KILOBYTES": "k"}
_COLUMNS = ("input_size", "output_size", "num_params")


def batch_summary(task: Task) -> str:
    """Returns the summary of a task's net for the first batch of its (first) training loader.

    Raises:
        DataError: the loader yields nothing.
        Exception: whatever the net raises for this batch.
    """
    batch = next(iter(next(iter(train_by_name(task.dl_train).values()))), None)
    if batch is None:
        raise DataError(nothing_yielded("train"))
    return _text(task.module, input_data=[features_of(batch)])


def shape_summary(net: nn.Module, input_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> str:
    """Returns the summary of a net for one sample.

    Args:
        net: the net.
        input_shape: a sample's, without the batch dimension, such as (1, 28, 28).
        dtype: the sample's type.
    """
    return _text(net, input_size=(1, *input_shape), dtypes=[dtype])


def data_summary(net: nn.Module, batch: Any) -> str:
    """Returns the summary of a net for the features of a batch, cut to one sample."""
    return _text(net, input_data=[BatchReader().cut(features_of(batch), 0, 1)])


def _text(net: nn.Module, **what: Any) -> str:
    """Runs the net once, in eval mode and where it lies, and leaves it in the mode that it had."""
    from torchinfo import summary

    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    training = net.training
    try:
        text = str(summary(net, device=device, verbose=0, col_names=_COLUMNS, mode="eval", **what))
        return _UNIT.sub(lambda unit: _LETTERS.get(unit[1], unit[1].lower()), text)
    finally:
        net.train(training)
