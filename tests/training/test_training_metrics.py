"""metrics.jsonl and the picture drawn from it."""

import sys
from pathlib import Path

import pytest
from matplotlib import image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coe_megatron.config import RunConfig, parse
from coe_megatron.errors import ConfigError
from coe_megatron.training.logged import read_metrics
from coe_megatron.training.metrics import Several, open_metrics
from coe_megatron.training.picture import draw_loss


def test_what_is_written_is_read_and_shown_in_tensorboard(tmp_path: Path) -> None:
    writer = open_metrics(tmp_path, RunConfig())
    router = {"layer": 1, "iteration": 2, "losses": {"z_loss": 3.0}, "load": [0.75, 0.25]}
    router |= {"load_max_over_mean": 1.5, "dead_experts": 0, "overlap": None}
    for step in (1, 2):
        writer.write({"step": step, "train_loss": 1.0 / step, "memory": {"parameters": 7}, "routing": [router]})
    writer.close()
    assert [line["train_loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 0.5]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss/train_loss")] == [(1, 1.0), (2, 0.5)]
    assert board.Scalars("memory/parameters")[0].value == 7
    tags = board.Tags()
    place = "routing_layer1/iteration2/"
    of_router = {
        f"{place}{name}": value for name, value in (("load_max_over_mean", 1.5), ("dead_experts", 0), ("z_loss", 3.0))
    }
    assert set(tags["scalars"]) == {"loss/train_loss", "memory/parameters", *of_router}
    assert {tag: board.Scalars(tag)[0].value for tag in of_router} == of_router
    assert tags["histograms"] == [f"{place}load"]
    load = board.Histograms(f"{place}load")[0].histogram_value
    assert (load.num, load.min, load.max, load.sum) == (2, 0.25, 0.75, 1.0)


def test_resuming_drops_the_lines_beyond_the_checkpoint(tmp_path: Path) -> None:
    writer = open_metrics(tmp_path, RunConfig())
    for step in (1, 2, 3):
        writer.write({"step": step})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "train_l')  # killed while writing
    writer = open_metrics(tmp_path, RunConfig(), first_step=2)
    writer.write({"step": 3, "again": True})
    writer.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_numbers_that_are_not_finite_are_null_and_the_file_stays_json(tmp_path: Path) -> None:
    writer = open_metrics(tmp_path, RunConfig())
    writer.write({"step": 1, "train_loss": float("nan"), "valid": {"a": {"loss": float("inf")}}, "load": [0.5, 1.0]})
    writer.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line == {"step": 1, "train_loss": None, "valid": {"a": {"loss": None}}, "load": [0.5, 1.0]}


def test_going_back_forgets_what_lies_beyond(tmp_path: Path) -> None:
    writer = open_metrics(tmp_path, RunConfig())
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        writer.write({"step": step, "train_loss": loss})
    writer.go_back(1)
    writer.write({"step": 2, "train_loss": 9.0})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train_loss": 1.0},
        {"step": 2, "train_loss": 9.0},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss/train_loss")] == [(1, 1.0), (2, 9.0)]


def test_what_cannot_be_written_waits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, away = tmp_path / "run", tmp_path / "away"
    run.mkdir()
    writer = open_metrics(run, RunConfig())
    writer.write({"step": 1, "train_loss": 1.0})
    run.rename(away)
    for step in (2, 3):
        writer.write({"step": step, "train_loss": 1.0})
    away.rename(run)
    writer.write({"step": 4, "train_loss": 1.0})
    writer.close()
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss/train_loss")] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("metrics wait in memory until they can be written: [Errno 2]")


def test_beginning_anew_keeps_the_old_file_aside(tmp_path: Path) -> None:
    for text in ("old", "new"):
        writer = open_metrics(tmp_path, RunConfig())
        writer.write({"step": 0, "note": text})
        writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "note": "new"}]
    assert read_metrics(tmp_path / "metrics.previous.jsonl") == [{"step": 0, "note": "old"}]


def test_metrics_that_go_nowhere_may_be_written() -> None:
    nowhere = Several()
    nowhere.write({"step": 1})
    nowhere.close()


def test_tensorboard_can_be_left_out(tmp_path: Path) -> None:
    open_metrics(tmp_path, parse({"logging": {"tensorboard": False}})).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_weights_and_biases_offline_goes_on_as_the_same_run(tmp_path: Path) -> None:
    config = parse({"logging": {"wandb": {"mode": "offline"}}})
    for step in (1, 2):
        writer = open_metrics(tmp_path, config, first_step=step - 1)
        writer.write({"step": step, "train_loss": 1.0 / step, "memory": {"parameters": 7}})
        writer.close()
    written = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.stem.removeprefix("run-") for path in written} == {(tmp_path / "wandb-id").read_text()}
    assert any(b"train_loss" in path.read_bytes() and b"memory/parameters" in path.read_bytes() for path in written)


def test_weights_and_biases_without_the_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"^logging.wandb is set: install the package wandb"):
        open_metrics(tmp_path, parse({"logging": {"wandb": {}}}))


def test_weights_and_biases_without_an_account_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^logging.wandb is set: .*API key.* \(mode: offline needs no account\)$"):
        open_metrics(tmp_path, parse({"logging": {"wandb": {}}}))


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    lines = [{"step": s, "tokens": 4096 * s, "train_loss": 6 - s / 10, "valid_loss": 6.1 - s / 10} for s in range(1, 9)]
    path = draw_loss(lines, 5.2, "CoE-2(4/64)+1", tmp_path / "loss.png")
    pixels = image.imread(path)
    assert pixels.shape[0] > 400
    assert pixels[..., :3].min() < 0.2  # something is on the paper


def test_the_picture_shows_every_validation_set(tmp_path: Path) -> None:
    def line(step: int, sets: tuple[str, ...]) -> dict:
        losses = {name: {"loss": 5 - step / 10 + place} for place, name in enumerate(sets)}
        return {"step": step, "tokens": 4096 * step, "train_loss": 6 - step / 10, "valid_loss": 5.4, "valid": losses}

    sizes = [
        draw_loss([line(step, sets) for step in range(8)], 5.2, "a run", tmp_path / "loss.png").stat().st_size
        for sets in ((), ("math", "wiki"))
    ]
    assert sizes[1] > sizes[0] + 1000
