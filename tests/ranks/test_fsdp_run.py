"""A sharded run as a user starts it, by the profile; gone on from, and evaluated, on one rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from helpers.commands import BIN, Dtrain
from helpers.sweep import some
from safetensors.torch import load_file

from dtrain.config import load_settings
from dtrain.distributed.world import bring_up
from dtrain.rundir.history import read_history
from dtrain.trainer.evaluate import evaluate_run, restore_run
from dtrain.trainer.train import train_run

# Looked at on the way; one of the two blocks is computed again in the backward.
LOOKED_AT = ("train.val_every_steps=3", "train.log_norms=2", "train.activation_checkpointing=[blocks.1]")
PROFILE = Path(__file__).resolve().parents[2] / "launch/fsdp.yaml"


def history(run: Path) -> np.ndarray:
    return read_history(run)[["epoch", "loss", "val_loss", "lr"]].to_numpy()


@pytest.mark.parametrize("by", some(["dtrain"], ["accelerate"]))
def test_a_run_by_the_profile_is_that_of_one_rank_which_goes_on_with_it(
    dtrain: Dtrain, recipes: Path, by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PROFILE.read_text().replace("num_processes: 8", "num_processes: 2")
    (dtrain.folder / "p.yaml").write_text(text)
    words = ("train", recipes / "blocks.py", "train.batch=global", *LOOKED_AT, "--cpu", "run.name=it", "epochs=2")
    if by == "dtrain":
        done = dtrain("launch", "--profile", "p.yaml", "--", *words)
    else:
        launch = ("launch", "--config_file", "p.yaml", "--main_process_port", "0", "-m", "dtrain")
        done = dtrain.run(BIN / "accelerate", *launch, *words)
    assert done.code == 0, done.text
    assert "no module is sharded separately" not in done.text

    world, runs = bring_up(cpu=True), dtrain.folder / "runs"

    def train(name: str) -> Path:
        values = [f"run.dir={runs}", f"run.name={name}", "epochs=3", "train.batch=global", "train.shard=fsdp"]
        values += LOOKED_AT
        return train_run(load_settings(str(recipes / "blocks.py"), values, environ={}), world)

    sharded, alone = history(runs / "it"), history(train("alone"))
    np.testing.assert_allclose(sharded, alone[:2], rtol=1e-9)
    np.testing.assert_allclose(history(train("it")), alone, rtol=1e-9)  # one rank, the net whole
    assert f"resuming from {runs}/it/checkpoints/epoch-2" in capsys.readouterr().out
    for name, columns in (
        ("validations.csv", ["epoch", "step", "val_loss"]),
        ("norms.csv", ["weight_norm", "grad_norm"]),
    ):
        one, two = (pandas.read_csv(runs / run / name) for run in ("it", "alone"))
        assert len(one) >= 3
        np.testing.assert_allclose(one[columns].to_numpy(), two[columns].to_numpy(), rtol=1e-8, err_msg=name)
    weights = [load_file(runs / name / "checkpoints/epoch-3/model.safetensors") for name in ("it", "alone")]
    for name, values in weights[0].items():
        torch.testing.assert_close(values, weights[1][name])
    settings = load_settings(str(recipes / "blocks.py"), ["train.batch=global"], environ={})
    result = evaluate_run(restore_run(runs / "it", settings, "last", world), world)
    assert result.means["loss"] == pytest.approx(alone[-1, 2], rel=1e-9)


def test_compiling_beside_it_is_refused_by_name_and_once(dtrain: Dtrain, recipes: Path) -> None:
    words = ("train.shard=fsdp", "train.compile=true", "-n", 2, "--cpu")
    done = dtrain("train", recipes / "blocks.py", *words)
    assert done.code == 2, done.text
    assert done.err.count("(train.shard), and torch.compile is asked for") == 1
