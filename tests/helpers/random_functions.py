"""What draws random numbers: with a row for each sample, or the same for all."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES, BATCH = 15, 7  # 7 on 3 ranks are 3, 2 and 2; the last batch has one sample, and the other ranks fillers
LENGTH, WIDTH = 6, 4


def images(x: Tensor) -> Tensor:
    """(batch, LENGTH, WIDTH) to images with their channels last in memory."""
    return x.reshape(len(x), 3, 2, WIDTH).contiguous(memory_format=torch.channels_last)


def attended(x: Tensor, dtype: torch.dtype) -> Tensor:
    heads = x.to(dtype).reshape(len(x), LENGTH, 2, WIDTH // 2).transpose(1, 2)
    return nn.functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3)


@functools.cache
def layer(name: str) -> nn.Module:
    torch.manual_seed(5)
    made = {
        "lstm": lambda: nn.LSTM(WIDTH, 3, 3, dropout=0.4, batch_first=True),
        "gru, time first": lambda: nn.GRU(WIDTH, 3, 2, dropout=0.4),
        "attention": lambda: nn.MultiheadAttention(WIDTH, 2, dropout=0.4, batch_first=True),
        "encoder, time first": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.3),
        "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.3, batch_first=True),
    }
    return made[name]().double()


def called(name: str, x: Tensor) -> Tensor:
    first = layer(name)(x, x, x) if name == "attention" else layer(name)(x)
    return first[0] if isinstance(first, tuple) else first


def turned(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same with time first inside."""
    return lambda x: function(x.transpose(0, 1)).transpose(0, 1)


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return nn.functional.dropout(x.float() @ torch.eye(WIDTH), 0.3).double()


# name -> (batch, LENGTH, WIDTH) to something with a row for each sample
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: nn.functional.dropout(x, 0.3),
    "dropout in place": lambda x: nn.functional.dropout(x.clone(), 0.3, inplace=True),
    "dropout of bfloat16": lambda x: nn.functional.dropout(x.bfloat16(), 0.3).double(),
    "dropout of a view": lambda x: nn.functional.dropout(x[:, ::2, 1:], 0.3),
    "dropout of what is turned": lambda x: nn.functional.dropout(x.transpose(1, 2), 0.3),
    "dropout, time first": turned(lambda x: nn.functional.dropout(x.contiguous(), 0.3)),
    "dropout, time first, a view": turned(lambda x: nn.functional.dropout(x, 0.3)),
    "dropout, channels last": lambda x: nn.functional.dropout(images(x), 0.3),
    "dropout of tokens": lambda x: nn.functional.dropout(x.reshape(-1, WIDTH), 0.3).reshape(x.shape),
    "dropout1d": lambda x: nn.functional.dropout1d(x, 0.3),
    "dropout2d": lambda x: nn.functional.dropout2d(images(x), 0.3),
    "dropout3d": lambda x: nn.functional.dropout3d(images(x)[..., None], 0.3),
    "alpha dropout": lambda x: nn.functional.alpha_dropout(x, 0.3, training=True),
    "feature alpha dropout": lambda x: nn.functional.feature_alpha_dropout(images(x), 0.3, training=True),
    "native dropout": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "a path dropped": lambda x: x * x.new_empty(len(x), 1, 1).bernoulli_(0.5),
    "rand": lambda x: torch.rand(len(x), 3),
    "randn": lambda x: torch.randn(len(x), 40, dtype=torch.float64),
    "randn of a scalar each": lambda x: torch.randn(len(x)),
    "randint": lambda x: torch.randint(3, 1000, (len(x),)),
    "randint for tokens": lambda x: torch.randint(1000, (len(x), LENGTH)),
    "rand_like": torch.rand_like,
    "randn_like": lambda x: torch.randn_like(images(x)),
    "randn_like of a view": lambda x: torch.randn_like(x[:, 1:]),
    "in place in a view": lambda x: torch.zeros(len(x), 9)[:, 1:5].normal_(),
    "randint_like": lambda x: torch.randint_like(x, 100),
    "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
    "bernoulli, one probability": lambda x: torch.bernoulli(x, 0.3),
    "bernoulli_ of probabilities": lambda x: torch.empty_like(x).bernoulli_(torch.full((WIDTH,), 0.4)),
    "normal, tensors": lambda x: torch.normal(x, x.abs()),
    "normal, mean": lambda x: torch.normal(x, 0.5),
    "normal, std": lambda x: torch.normal(0.5, x.abs()),
    "normal, shape": lambda x: torch.normal(0.5, 2.0, (len(x), 20)),
    "multinomial": lambda x: torch.multinomial(x[:, 0].softmax(1), 2),
    "multinomial with replacement": lambda x: torch.multinomial(x[:, 0].softmax(1), 3, replacement=True),
    "multinomial, one": lambda x: torch.multinomial(x[:, 0].softmax(1), 1, replacement=True),
    "multinomial of one distribution": lambda x: torch.multinomial(torch.arange(1.0, 9), 2 * len(x), True).view(-1, 2),
    "gumbel": nn.functional.gumbel_softmax,
    "categorical": lambda x: torch.distributions.Categorical(logits=x).sample(),
    "a distribution": lambda x: torch.distributions.Normal(x, 1.0).rsample(),
    "beta of equal parameters": lambda x: torch.distributions.Beta(0.4, 0.4).sample((len(x),)),
    "gamma of equal parameters": lambda x: torch.distributions.Gamma(0.4, 1.0).sample((len(x), 3)),
    "poisson of equal rates": lambda x: torch.poisson(torch.full((len(x), 3), 2.5)),
    "exponential": lambda x: torch.empty(len(x), 2).exponential_(),
    "cauchy": lambda x: torch.empty(len(x), 2).cauchy_(),
    "geometric": lambda x: torch.empty(len(x), 2).geometric_(0.3),
    "log normal": lambda x: torch.empty(len(x), 2).log_normal_(),
    "random": lambda x: torch.empty(len(x), 2).random_(),
    "uniform": lambda x: torch.empty(len(x), 2).uniform_(1, 3),
    "a generator of one's own": lambda x: torch.rand(len(x), 3, generator=torch.Generator().manual_seed(1)),
    "attention": lambda x: called("attention", x),
    "attention, scaled dot product": lambda x: attended(x, torch.float64),
    "attention of bfloat16": lambda x: attended(x, torch.bfloat16).double(),
    "encoder": lambda x: called("encoder", x),
    "encoder, time first": turned(lambda x: called("encoder, time first", x)),
    "lstm": lambda x: called("lstm", x),
    "gru, time first": turned(lambda x: called("gru, time first", x)),
    # as long as a rank's part of a batch
    "lstm of 3": lambda x: called("lstm", x[:, :3]),
    "lstm of 2": lambda x: called("lstm", x[:, :2]),
    "lstm of 4": lambda x: called("lstm", x[:, :4]),
    "attention of 3": lambda x: called("attention", x[:, :3]),
    "attention of 2": lambda x: called("attention", x[:, :2]),
    "encoder of 3, time first": turned(lambda x: called("encoder, time first", x[:3])),
    "encoder of 2, time first": turned(lambda x: called("encoder, time first", x[:2])),
    "autocast": autocast,
    "vmap": torch.vmap(lambda row: nn.functional.dropout(row, 0.4), randomness="different"),
}
ALIKE: dict[str, Callable[[Tensor], Any]] = {  # not shaped after the batch: the same on every rank
    "a scalar": lambda x: torch.rand(()).tolist(),
    "a number": lambda x: torch.rand(1).tolist(),
    "a whole number": lambda x: torch.randint(100, (1,)).tolist(),
    "a channel's": lambda x: torch.rand(1, 7).tolist(),
    "of eleven": lambda x: torch.randn(11).tolist(),
    "an order of a few": lambda x: torch.randperm(7).tolist(),
    "a weight's": lambda x: torch.randn(12, 1).tolist(),
    "beta": lambda x: torch.distributions.Beta(0.4, 0.4).sample().tolist(),
    "python": lambda x: random.random(),
    "numpy": lambda x: float(np.random.beta(0.4, 0.4)),
}
