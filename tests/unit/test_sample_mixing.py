"""A loss that mixes the samples of the batch before they are reduced is seen; one that is a mean of theirs never is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dtrain.data.partition import RankBatch
from dtrain.engine.loss_form import LossForm
from dtrain.engine.metrics import Mean
from dtrain.engine.sample_mixing import SampleMixing

ROWS, COLUMNS = 6, 3
LABELS = torch.tensor([0, 1, 2, 1, 1, 0])
ONES = torch.ones(ROWS, COLUMNS)
Loss = Callable[[Tensor, Any], Tensor]  # (outputs (6, 3), the net) -> a loss


def standardized(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


def normalized(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=1)


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum()


MIXED: dict[str, Loss] = {
    "less the mean": lambda x, m: (x - x.mean(0)).square().mean(),
    "less the mean, absolute": lambda x, m: (x - x.mean(0)).abs().mean(),
    "standardized": lambda x, m: standardized(x).pow(3).mean(),
    "softmax over the samples": lambda x, m: (x.softmax(0) * ONES.cumsum(0)).sum(1).mean(),
    "partial likelihood": lambda x, m: -(x[:, 0] - torch.logcumsumexp(x[:, 0], 0)).mean(),
    "running sum": lambda x, m: x.cumsum(0).square().mean(),
    "neighbours": lambda x, m: (x[1:] - x[:-1]).square().mean(),
    "distances": lambda x, m: torch.cdist(x, x).mean(),
    "kernels": lambda x, m: torch.exp(-(torch.cdist(x, x) ** 2)).mean(),
    "products": lambda x, m: (x @ x.T).mean(),
    "covariance": lambda x, m: (x.T @ x / len(x) - torch.eye(COLUMNS)).square().sum(),
    "pairs in two views": lambda x, m: functional.cross_entropy(normalized(x) @ normalized(2 * x + 1).T, LABELS),
    "margins of pairs": lambda x, m: functional.relu(1 + x[:, None] - x[None]).mean(),
    "ranks of pairs": lambda x, m: functional.softplus(x[:, 0, None] - x[None, :, 0]).mean(),
    "sorted": lambda x, m: (x.sort(0).values - ONES.cumsum(0)).square().mean(),
    "the largest": lambda x, m: x.max(0).values.mean(),
    "the hardest": lambda x, m: functional.cross_entropy(x, LABELS, reduction="none").topk(3).values.mean(),
    "the mean's entropy": lambda x, m: functional.cross_entropy(x, LABELS) - entropy(x.softmax(1).mean(0)),
    "the mean's distance": lambda x, m: (x.mean(0) - 1).abs().sum(),
    "balance of experts": lambda x, m: x.square().mean() + x.softmax(1).mean(0).square().sum(),
}
MEANS: dict[str, Loss] = {
    "squares": lambda x, m: functional.mse_loss(x, ONES),
    "absolute": lambda x, m: functional.l1_loss(x, ONES),
    "huber": lambda x, m: functional.huber_loss(x, ONES),
    "smooth": lambda x, m: functional.smooth_l1_loss(x, ONES),
    "classes": lambda x, m: functional.cross_entropy(x, LABELS, label_smoothing=0.1),
    "yes or no": lambda x, m: functional.binary_cross_entropy_with_logits(x, ONES),
    "divergence": lambda x, m: functional.kl_div(x.log_softmax(1), ONES / 3, reduction="batchmean"),
    "triplets": lambda x, m: functional.triplet_margin_loss(x, 0 * ONES, ONES),
    "the largest of a sample": lambda x, m: x.max(1).values.mean(),
    "a sample's order": lambda x, m: x.sort(1).values[:, 0].square().mean(),
    "distances from what is learnt": lambda x, m: torch.cdist(x, m.weight.T).mean(),
    "linear in the mean": lambda x, m: (x.mean(0) * torch.arange(3.0)).sum(),
    "outer products": lambda x, m: (x.T @ x / len(x)).mean(),
    "sample by sample": lambda x, m: sum(functional.mse_loss(one, ONES[0]) for one in x) / len(x),  # type: ignore[return-value]
    "another order": lambda x, m: x[torch.tensor([3, 2, 1, 0, 5, 4])].square().mean(),
    "learnt weights": lambda x, m: torch.exp(-m.bias[0]) * x.square().mean() + m.bias[0],
    "weights' covariance": lambda x, m: x.abs().mean() + (m.weight.T @ m.weight).square().sum(),
    "limited": lambda x, m: x.square().mean().clamp(max=10),
    "in two functions": lambda x, m: (x * (x * 2 + 1).tanh()).mean(),
    "sequences": lambda x, m: functional.ctc_loss(
        x[:, None].expand(ROWS, 4, COLUMNS).transpose(0, 1).log_softmax(2),
        torch.ones(ROWS, 2, dtype=torch.long),
        torch.full((ROWS,), 4),
        torch.full((ROWS,), 2),
    ),
}


def features(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def outputs(net: nn.Module, loss: Callable[..., Tensor], rows: int = ROWS, given: Any = None) -> tuple[bool, Tensor]:
    """Whether a loss of a net's outputs is found to be mixed, and the loss."""
    mixing = SampleMixing(net)
    x = features(rows)
    with mixing.noting((x,) if given is None else given, rows):
        found = loss(net(x), net)
    return mixing.found(found, rows), found


def test_losses_that_mix_samples_are_found_and_means_are_not() -> None:
    for losses, is_mixed in ((MIXED, True), (MEANS, False)):
        for name, loss in losses.items():
            torch.manual_seed(2)
            net, plain = (nn.Linear(4, COLUMNS) for _ in range(2))
            plain.load_state_dict(net.state_dict())
            mixed, found = outputs(net, loss)
            assert mixed == is_mixed, name
            assert all(parameter.grad is None for parameter in net.parameters()), name
            found.backward()
            loss(plain(features()), plain).backward()
            for one, other in zip(net.parameters(), plain.parameters(), strict=True):
                assert torch.equal(one.grad, other.grad), name  # type: ignore[arg-type]


class Losing(nn.Module):
    """Its forward returns a loss alone."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, COLUMNS), nn.BatchNorm1d(COLUMNS) if norm else nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean() if isinstance(self.layers[1], nn.BatchNorm1d) else standardized(x).pow(4).mean()


def test_parts_are_looked_at_where_the_net_gives_no_rows_and_batchnorm_is_not_told() -> None:
    assert outputs(Losing(), lambda loss, net: loss)[0]
    assert not outputs(Losing(norm=True), lambda loss, net: loss)[0]
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    mixing, x = SampleMixing(net), features()
    for mixes in (False, True):
        with mixing.noting((x,), ROWS):
            out = net[2](net[1](net[0](x)))
        assert mixing.found((out - out.mean(0) if mixes else out).square().mean(), ROWS) == mixes


class Within(nn.Module):
    """A net whose forward does something between two parts."""

    def __init__(self, between: Callable[[Tensor], Tensor], *parts: nn.Module, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.parts = first or nn.Linear(4, 4), nn.Sequential(*parts)
        self.last, self.between = nn.Linear(4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.parts(self.between(self.first(x))))


class Sequences(nn.Module):
    """Recurrent and attending layers over each sample's 6 values, as many as there are samples."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.spread, self.batch_first = nn.Linear(1, 4), batch_first
        self.recurrent = nn.LSTM(4, 4, batch_first=batch_first)
        self.attending = nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.spread(x.repeat(1, 2)[:, :ROWS, None])
        steps = steps if self.batch_first else steps.transpose(0, 1)
        steps = self.attending(self.recurrent(steps)[0])
        return self.last(steps[:, -1] if self.batch_first else steps[-1])


def folded(x: Tensor) -> Tensor:
    return x.view(-1, 2, 2)


WITHIN: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "less the mean": (lambda: Within(lambda x: x - x.mean(0)), True),
    "attention over the batch": (lambda: Within(lambda x: functional.scaled_dot_product_attention(x, x, x)), True),
    "own standardizing": (lambda: Within(standardized, nn.Tanh(), nn.Linear(4, 4)), True),
    "after BatchNorm": (
        lambda: Within(lambda x: x - x.mean(0), first=nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))),
        True,
    ),
    "recomputed": (lambda: Within(lambda x: checkpoint(lambda y: y - y.mean(0), x, use_reentrant=False)), False),
    "BatchNorm": (lambda: Within(lambda x: x, nn.BatchNorm1d(4), nn.Linear(4, 4)), False),
    "InstanceNorm": (lambda: Within(folded, nn.InstanceNorm1d(2), nn.Flatten()), False),
    "GroupNorm": (lambda: Within(folded, nn.GroupNorm(2, 2), nn.Conv1d(2, 2, 1), nn.Flatten()), False),
    "windows": (
        lambda: Within(lambda x: x.view(-1, 2), nn.Linear(2, 2), nn.Unflatten(0, (-1, 2)), nn.Flatten()),
        False,
    ),
    "columns": (lambda: Within(lambda x: x.T, nn.Tanh(), Transposed()), False),
    "batch first": (lambda: Sequences(batch_first=True), False),
    "time first": (lambda: Sequences(batch_first=False), False),
}


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.T


def test_samples_that_the_net_mixes_are_found() -> None:
    for name, (made, is_mixed) in WITHIN.items():
        torch.manual_seed(3)
        net = made().eval() if name.endswith("first") else made()
        mixed, loss = outputs(net, lambda x, net: (x - 1).square().mean())
        assert mixed == is_mixed, name
        assert all(parameter.grad is None for parameter in net.parameters()), name
        loss.backward()


@pytest.mark.parametrize("views", [1, 2])
def test_rows_that_are_as_many_by_chance_need_another_size(views: int) -> None:
    """Prototypes, or two views of each sample in one call: no tensor of the batch, so that a second size decides."""
    net = nn.Linear(4, COLUMNS)

    def look(mixing: SampleMixing, rows: int, given: Tensor) -> bool:
        with mixing.noting((features(rows),), rows):
            out = net(given)
        return mixing.found(out.softmax(0).square().mean(), rows)

    mixing = SampleMixing(net)
    assert not any(look(mixing, rows, features(ROWS) + 1) for rows in (6, 6, 3, 2, 5))
    mixing = SampleMixing(net)
    assert [look(mixing, rows, features(rows).repeat(views, 1) + 0) for rows in (7, 7, 8)] == [False, False, True]
    assert outputs(net, MIXED["softmax over the samples"], given=())[0] is False


def test_a_loop_over_samples_has_no_rows_of_samples() -> None:
    """As many steps of a sequence as there are samples, and a loss for each sequence that is not linear in its mean."""
    net = nn.Linear(4, COLUMNS)
    mixing = SampleMixing(net)
    calls: list[Callable[[Tensor], Tensor]] = [net, lambda one: net(one * 1.0)]
    for rows in (6, 5):
        x = torch.randn(rows, rows, 4, generator=torch.Generator().manual_seed(1))
        for each in calls:
            with mixing.noting((x,), rows):
                loss: Any = sum(each(one).mean(0).square().sum() for one in x) / rows
            assert not mixing.found(loss, rows)


class Foreign(torch.autograd.Function):
    """A function whose backward pass counts."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        Foreign.calls += 1
        return grad * 2


def test_nothing_of_the_users_own_runs_once_more() -> None:
    """Functions and hooks of the step, gradients that it keeps: they are called in the backward pass alone."""
    called: list[int] = []
    kept: list[Tensor] = []

    def foreign(x: Tensor, m: Any) -> Tensor:
        return Foreign.apply(x).softmax(0).square().mean()

    def hooked(x: Tensor, m: Any) -> Tensor:
        x.register_hook(lambda grad: called.append(1))
        return x.softmax(0).square().mean()

    def retained(x: Tensor, m: Any) -> Tensor:
        y = x * 2
        y.retain_grad()
        kept.append(y)
        return y.softmax(0).square().mean()

    own = Tensor.register_hook, Tensor.retain_grad, saved_tensors_hooks.__enter__
    for loss in (foreign, hooked, retained):
        net = nn.Linear(4, COLUMNS)
        mixed, found = outputs(net, loss)
        assert not mixed
        assert (Foreign.calls, len(called)) == (0, 0)
        assert not kept or kept[0].grad is None
        found.backward()
        Foreign.calls = 0
        called.clear()
        assert not net._forward_hooks
    assert (Tensor.register_hook, Tensor.retain_grad, saved_tensors_hooks.__enter__) == own
    assert "retain_grad" not in vars(Tensor)
    assert kept[0].grad is not None


def test_a_copy_of_the_net_that_a_step_makes_is_noted_no_longer() -> None:
    net = nn.Linear(4, COLUMNS)
    mixing = SampleMixing(net)
    with mixing.noting((features(),), ROWS):
        twin = copy.deepcopy(net)
    twin(features())
    assert not mixing._of_net


def batch(x: Tensor) -> RankBatch:
    return RankBatch((x,), len(x), 2 * len(x), 1.0, rows=len(x))


@pytest.mark.parametrize("kind", ["returned", "backward", "total"])
def test_it_is_one_warning_of_the_main_rank_where_losses_are_averaged(caplog: Any, kind: str) -> None:
    caplog.set_level(logging.WARNING, logger="dtrain")
    for averaged, warns, eager in ((True, True, True), (True, False, True), (False, True, True), (True, True, False)):
        net = nn.Linear(4, COLUMNS)
        form = LossForm(net, averaged=averaged, warns=warns, eager=eager)
        caplog.clear()
        for x in (features(6), features(5)):
            with form.of_step(batch(x)):
                out = net(x)
                loss = (out - out.mean(0)).square().mean()
                if kind == "backward":
                    loss.backward()
            if kind != "backward":
                form.look_at(Mean(loss * len(x), len(x)) if kind == "total" else loss, batch(x))
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == (averaged and warns and eager)
        assert all("depends on other samples of the batch, as in x - x.mean(0)" in text for text in told)
        assert all("One rank without accumulation" in text for text in told)
        assert form._mixing is None or not form._mixing._of_net
