"""metrics.jsonl and the picture drawn from it."""

import errno
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from matplotlib import image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coe_megatron.config import RunConfig, parse
from coe_megatron.errors import ConfigError
from coe_megatron.run.loss_plot import draw_loss, is_complete_png
from coe_megatron.run.metrics_log import read_metrics
from coe_megatron.training.metrics import CompositeMetrics, open_metrics

pytestmark = pytest.mark.thorough


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
    writer.rewind(1)
    writer.write({"step": 2, "train_loss": 9.0})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train_loss": 1.0},
        {"step": 2, "train_loss": 9.0},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss/train_loss")] == [(1, 1.0), (2, 9.0)]


def test_what_cannot_be_written_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk, which takes half of what is given first: neither file has half a record."""
    writer = open_metrics(tmp_path, RunConfig())
    writer.write({"step": 1, "train_loss": 1.0})

    def half(file: io.FileIO, content: bytes) -> int:
        io.FileIO.write(file, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(io.FileIO):
        write = half  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: Full(path, mode))
        for step in (2, 3):
            writer.write({"step": step, "train_loss": 1.0})
    writer.write({"step": 4, "train_loss": 1.0})
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss/train_loss")] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said == "metrics wait in memory until they can be written: [Errno 28] No space left on device\n"


def test_a_line_is_on_the_disk_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_metrics(tmp_path, RunConfig())
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    writer.write({"step": 1, "train_loss": 1.0})
    assert str(tmp_path / "metrics.jsonl") in synced


DAMAGED = {
    "NULs": b"\0" * 4096,
    "NULs and a line break": b"\0\0\n",
    "a blank line": b"\n",
    "no JSON": b"garb\n",
    "no object": b"[1]\n",
    "no step": b'{"train_loss": 1.0}\n',
    "a step that is none": b'{"step": "3"}\n',
    "a huge step": b'{"step": 1' + b"0" * 400 + b"}\n",
    "a number of many digits": b'{"step": 3, "train_loss": ' + b"9" * 5000 + b"}\n",
    "an infinite loss": b'{"step": 3, "train_loss": 1e999}\n',
    "a loss as text": b'{"step": 3, "train_loss": "low"}\n',
    "sets of another shape": b'{"step": 3, "valid": {"a": 1}}\n',
    "deep nesting": b"[" * 100_000 + b"\n",
    "no UTF-8": b'{"step": 3, "\xff": 1}\n',
    "an earlier step": b'{"step": 1, "train_loss": 7.0}\n',
}


@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_good_lines_of_a_damaged_file_are_kept_and_the_file_set_aside(
    what: str, place: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = [json.dumps({"step": step, "train_loss": 1.0}).encode() + b"\n" for step in (0, 1, 2, 3)]
    damaged = b"".join([*lines[:place], DAMAGED[what], *lines[place:]])
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.damaged"
    path.write_bytes(damaged)
    writer = open_metrics(tmp_path, parse({"logging": {"tensorboard": False}}), first_step=2)
    writer.write({"step": 3, "again": True})
    steps = [line["step"] for line in read_metrics(path)]
    assert steps == [0, 1, 2, 3] or (what == "NULs" and set(steps) < {0, 1, 2, 3}), (
        "they take the line behind with them"
    )
    said = capsys.readouterr().err
    assert aside.read_bytes() == damaged
    assert said.count("\n") == 1 and said[:-1].isprintable() and said.startswith(f"{path} is damaged (line ")


def test_a_damaged_file_gets_a_name_that_is_free(tmp_path: Path) -> None:
    for _ in range(3):
        (tmp_path / "metrics.jsonl").write_text("garb\n")
        open_metrics(tmp_path, parse({"logging": {"tensorboard": False}}), first_step=2).close()
    names = ["metrics.jsonl", *(f"metrics.jsonl.damaged{number}" for number in ("", "-2", "-3"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_file_without_damage_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    before = path.stat()
    open_metrics(tmp_path, parse({"logging": {"tensorboard": False}}), first_step=1).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_file_that_was_removed_meanwhile_begins_anew_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    writer = open_metrics(tmp_path, parse({"logging": {"tensorboard": False}}))
    writer.write({"step": 1})
    (tmp_path / "metrics.jsonl").unlink()
    writer.write({"step": 2})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 2}]
    assert capsys.readouterr().err == f"{tmp_path / 'metrics.jsonl'} was removed: it starts again with step 2\n"


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, b"garbage"])
def test_a_torn_event_file_costs_nothing_but_itself(damage: bytes, tmp_path: Path) -> None:
    for step in (1, 2):
        writer = open_metrics(tmp_path, RunConfig(), first_step=step - 1)
        writer.write({"step": step, "train_loss": 1.0})
        writer.close()
        if step == 1:
            (torn,) = (tmp_path / "tensorboard").iterdir()
            torn.write_bytes(torn.read_bytes()[:-20] + damage)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss/train_loss")] == [2]


def test_beginning_anew_keeps_the_old_file_aside(tmp_path: Path) -> None:
    for text in ("old", "new"):
        writer = open_metrics(tmp_path, RunConfig())
        writer.write({"step": 0, "note": text})
        writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "note": "new"}]
    assert read_metrics(tmp_path / "metrics.previous.jsonl") == [{"step": 0, "note": "old"}]


def test_metrics_that_go_nowhere_may_be_written() -> None:
    nowhere = CompositeMetrics()
    nowhere.write({"step": 1})
    nowhere.close()


def test_tensorboard_can_be_left_out(tmp_path: Path) -> None:
    open_metrics(tmp_path, parse({"logging": {"tensorboard": False}})).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a user's shell has it: the package reads its variables once a process."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_NAME", "a name of the user's")
    wandb.teardown()
    yield
    monkeypatch.undo()
    wandb.teardown()


def test_weights_and_biases_offline_goes_on_as_the_same_run(wandb_offline: None, tmp_path: Path) -> None:
    config = parse({"logging": {"wandb": True}})
    for step in (1, 2):
        writer = open_metrics(tmp_path, config, first_step=step - 1)
        writer.write({"step": step, "train_loss": 1.0 / step, "memory": {"parameters": 7}})
        writer.close()
    wandb.teardown()  # ends its service, which may still be writing
    written = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.stem.removeprefix("run-") for path in written} == {(tmp_path / "wandb-id").read_text()}
    assert any(b"train_loss" in path.read_bytes() and b"memory/parameters" in path.read_bytes() for path in written)
    assert all(b"a name of the user's" in path.read_bytes() for path in written)


@pytest.mark.parametrize("damage", ["", "\0\0", "a b/c", "x" * 1000])
def test_a_damaged_name_at_weights_and_biases_is_set_aside(wandb_offline: None, damage: str, tmp_path: Path) -> None:
    (tmp_path / "wandb-id").write_text(damage)
    open_metrics(tmp_path, parse({"logging": {"wandb": True}})).close()
    assert re.fullmatch("[0-9a-f]{16}", (tmp_path / "wandb-id").read_text())
    assert (tmp_path / "wandb-id.damaged").read_text() == damage


def test_weights_and_biases_without_the_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"^logging.wandb is true: install the package wandb"):
        open_metrics(tmp_path, parse({"logging": {"wandb": True}}))


def test_weights_and_biases_without_an_account_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^logging.wandb is true: .*API key.* \(WANDB_MODE=offline needs no acc"):
        open_metrics(tmp_path, parse({"logging": {"wandb": True}}))


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


def test_a_picture_is_told_from_a_torn_one(tmp_path: Path) -> None:
    path = draw_loss([{"step": 1, "tokens": 9, "train_loss": 2.0}], 5.2, "a run", tmp_path / "loss.png")
    content = path.read_bytes()
    assert is_complete_png(path) and [each.name for each in tmp_path.iterdir()] == ["loss.png"]
    nuls = bytearray(content)
    nuls[2000:2100] = bytes(100)
    for damaged in (b"", content[:-1], content + b"x", content[:3000], bytes(3000), b"GIF89a", bytes(nuls)):
        path.write_bytes(damaged)
        assert not is_complete_png(path)


def test_names_that_are_no_formulas_and_numbers_that_are_no_losses_are_drawn_all_the_same(tmp_path: Path) -> None:
    sets = {r"$\\frac{": {"loss": 2.0}}
    lines: list[dict] = [
        {"step": 0}, {"step": 1, "tokens": 9, "train_loss": 1e300, "valid_loss": 2.0, "valid": sets},
        {"step": 2, "tokens": 18, "train_loss": 2.0, "valid": {"another": {"loss": None}, "third": {}}},
    ]  # fmt: skip
    assert is_complete_png(draw_loss(lines, 5.2, r"$\\frac{", tmp_path / "loss.png"))


@pytest.mark.parametrize("name", ["\x1b[31m\n\ud800", "\N{SNOWMAN WITHOUT SNOW}\U000f0000", "long " * 100_000])
def test_nothing_is_said_of_names_that_cannot_be_drawn(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    line = {"step": 1, "tokens": 9, "train_loss": 2.0, "valid_loss": 2.0, "valid": {name: {"loss": 2.0}}}
    assert is_complete_png(draw_loss([line], 5.2, name, tmp_path / "loss.png"))
    assert not [each for each in recwarn if each.category is UserWarning] and not caplog.records
