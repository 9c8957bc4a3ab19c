"""What `num_processes` refuses, checks and raises around the ranks, which are not started here."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dtrain
from dtrain.api.spawn import call
from dtrain.api.spawn.call import call_on_ranks, starts_ranks
from dtrain.api.spawn.parcel import read_parcel
from dtrain.api.spawn.results import write_results
from dtrain.errors import RankError, UsageError
from dtrain.launch.supervisor import JobEnd

# --- what a call may be -------------------------------------------------------------------------------


def test_none_and_one_train_here() -> None:
    assert not starts_ranks(None, None)
    assert not starts_ranks(1, None)
    assert starts_ranks(2, None)
    assert not starts_ranks(None, SimpleNamespace(rank=0, size=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, -1, True, 2.0, "2"])
def test_what_is_no_number_of_processes_is_refused(number: Any) -> None:
    with pytest.raises(UsageError, match=f"num_processes = {number!r}: should be a whole number of at least 1."):
        starts_ranks(number, None)


@pytest.mark.parametrize("number", [1, 2])
def test_a_rank_and_a_given_world_are_refused(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"world= is a rank of a running world \(1 of 3\)"):
        starts_ranks(number, SimpleNamespace(rank=1, size=3))  # type: ignore[arg-type]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=rf"num_processes = {number}: this process is rank 1 of 4 already \(RANK,"):
        starts_ranks(number, None)


# --- around the ranks ---------------------------------------------------------------------------------


class Ranks:
    """Stands in for the ranks: notes that they were started, and ends as told."""

    def __init__(self, ending: JobEnd) -> None:
        self.ending = ending
        self.folder: Path | None = None
        self.mode = 0

    def __call__(self, argv: list[str], size: int, *, relayed: bool, hang_seconds: float) -> JobEnd:
        assert relayed and hang_seconds > 0
        self.folder = Path(argv[1])
        self.mode = self.folder.stat().st_mode & 0o777
        _, _, changing = read_parcel(self.folder)
        write_results(self.folder, [{"epoch": 1, "size": size}], changing)
        return self.ending


def started(monkeypatch: pytest.MonkeyPatch, ending: JobEnd) -> Ranks:
    ranks = Ranks(ending)
    monkeypatch.setattr(call, "run_local_ranks", ranks)
    return ranks


def test_the_folder_is_private_and_goes_with_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = started(monkeypatch, JobEnd(0))
    assert call_on_ranks(dict, {"net": nn.Linear(1, 1)}, 3, cpu=True).to_dict("list") == {"epoch": [1], "size": [3]}
    assert ranks.mode == 0o700
    assert ranks.folder is not None
    assert not ranks.folder.exists()


def test_a_failure_and_signals_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = started(monkeypatch, JobEnd(3, "dtrain: error: too bad\n  at rank 1"))
    with pytest.raises(RankError, match=r"training on 2 ranks failed; .*\n\ntoo bad\n  at rank 1$"):
        call_on_ranks(dict, {}, 2, cpu=True)
    assert ranks.folder is not None
    assert not ranks.folder.exists()
    started(monkeypatch, JobEnd(130, "stopped", signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="all 2 ranks were terminated"):
        call_on_ranks(dict, {}, 2, cpu=True)
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        started(monkeypatch, JobEnd(143, "stopped by SIGTERM", signal.SIGTERM))
        with pytest.raises(RankError, match="stopped by SIGTERM"):
            call_on_ranks(dict, {}, 2, cpu=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


class Odd(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {"what": object()}


def test_what_could_not_come_back_and_too_few_devices_are_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = started(monkeypatch, JobEnd(0))
    with pytest.raises(UsageError, match=r"Odd\.state_dict\(\)\['what'\] is a object"):
        call_on_ranks(dict, {"optimizer": Odd(nn.Linear(1, 1).parameters())}, 2, cpu=True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: "cuda")
    with pytest.raises(UsageError, match=r"num_processes = 2: this machine has 1 cuda devices, .* cpu=True"):
        call_on_ranks(dict, {}, 2, cpu=False)
    assert ranks.folder is None
    call_on_ranks(dict, {}, 2, cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    call_on_ranks(dict, {}, 2, cpu=False)


def test_fit_tells_what_is_missing_and_makes_the_default_optimizer_here(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, JobEnd(0))
    model = dtrain.KerasModel(nn.Linear(1, 1))
    with pytest.raises(UsageError, match="no loss: pass"):
        model.fit(1, [], num_processes=2, cpu=True)
    model.compile(loss_func=nn.MSELoss())
    model.fit(1, [], num_processes=2, cpu=True)
    assert model.optimizer is not None
    assert model.optimizer.param_groups[0]["params"][0] is model.net.weight
    with pytest.raises(UsageError, match="num_processes = 0"):
        model.fit(1, [], num_processes=0)


def test_train_model_tells_what_is_missing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = started(monkeypatch, JobEnd(0))
    with pytest.raises(UsageError, match="no train_step was given"):
        dtrain.train_model(nn.Linear(1, 1), 1, [], num_processes=2, cpu=True)
    with pytest.raises(UsageError, match="epochs = 0"):
        dtrain.train_model(nn.Linear(1, 1), 0, [], train_step=print, num_processes=2)
    assert ranks.folder is None
