"""How long a run still takes."""

import time

import pytest

from coe_megatron.training.progress import Progress


def test_the_time_left_follows_from_the_steps_since_this_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(first_step=10, steps=50, visible=True)
    now[0] = 220.0  # 20 steps in 120 seconds
    assert progress.eta_seconds(30) == pytest.approx(120.0)
    progress.step(30, {"loss": 1.5})
    assert "eta 0:02:00" in capsys.readouterr().err
    assert progress.eta_seconds(50) == 0.0
