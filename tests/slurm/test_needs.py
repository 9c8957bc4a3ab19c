"""Where there can be no SLURM, tests that need one say why they are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.cluster import missing, need


def test_a_machine_without_slurm_skips_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    lack = missing(path=str(tmp_path))
    assert lack == (
        "no slurmctld on this machine (apt-get install --no-install-recommends slurmctld slurmd slurm-client munge "
        "iproute2 util-linux)"
    )
    with pytest.raises(pytest.skip.Exception, match="no slurmctld on this machine"):
        need(lack)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI has to run this test, but: no slurmctld on this machine"):
        need(lack)
    need(None)
