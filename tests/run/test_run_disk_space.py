"""A disk that is full, nearly so, or cannot be written: said before it costs a checkpoint; nothing is lost by it."""

import json
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attempts import attempt, small
from programs import TORCHRUN, Program, python

from coe_megatron.checkpoint import save_load as store
from coe_megatron.checkpoint.names import name_of
from coe_megatron.config import RunConfig, parse
from coe_megatron.config.settings import MLASettings, ModelSettings, MoESettings, TrainingSettings
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.checkpoint_size import checkpoint_bytes
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.model.build import build_model
from coe_megatron.run import disk_space as room
from coe_megatron.run.metrics_log import read_metrics
from coe_megatron.training.loop import Pretraining
from coe_megatron.training.progress import Progress
from coe_megatron.zero import engine as zero

Usage = namedtuple("Usage", "total used free")
MB = 2**20


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    heard: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda _, text: heard.extend(text.split("\n")))
    return heard


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MiB: a tmpfs, which takes root to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "none", place], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path, left: int = 0) -> None:
    with (disk / "ballast").open("wb") as file:
        file.write(b"\1" * (shutil.disk_usage(disk).free - left))


def at(**actions: Callable[[], Any]) -> Callable[[Pretraining, int], None]:
    """Do something before some steps, `at(step_5=...)`, and not beside a checkpoint that is being written."""

    def act(run: Pretraining, step: int) -> None:
        while (background := run.checkpoints._background) is not None and not background.is_done():
            time.sleep(0.01)
        actions.get(f"step_{step}", lambda: None)()

    return act


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("step-0000") for path in (folder / "checkpoints").iterdir())


def metrics(folder: Path) -> list[tuple]:
    names = ("step", "tokens", "train_loss", "grad_norm", "valid_loss")
    return [tuple(line.get(name) for name in names) for line in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(megatron_groups: None, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    attempt(small(prepared, folder))
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_a_disk_that_is_full_for_a_while_costs_nothing(
    single_rank: None, background: bool, undisturbed: Path, prepared: Path, disk: Path, said: list[str]
) -> None:
    """From step 5, before the checkpoint of step 8, to step 10: neither lines of metrics nor the state are lost."""
    run = disk / "run"

    def make_room() -> None:
        assert checkpoints(run) == ["0004"], "the old one is kept, of the new one nothing is left"
        (disk / "ballast").unlink()

    config = small(prepared, run, background_saving=background, keep_checkpoints=1)
    attempt(config, at(step_5=lambda: fill(disk), step_10=make_room))
    assert metrics(run) == metrics(undisturbed)
    assert checkpoints(run) == ["0012"]
    ahead, failed, mended = said[-3:]
    assert ahead == (
        f"the next checkpoint cannot be saved unless this is fixed: {run / 'checkpoints'} cannot be written: "
        "No space left on device"
    )
    assert failed == (
        f"the checkpoint of step 8 is not saved: {run / 'checkpoints'} cannot be written: No space left on device; "
        "training continues and retries, the most recent checkpoint is step-00000004"
    )
    assert mended == "the checkpoint of step 10 is saved; earlier ones could not be"
    assert json.loads((run / "run.json").read_text())["attempts"][-1]["outcome"] == "finished"


@pytest.mark.thorough
@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_a_disk_that_fills_while_a_checkpoint_is_written_loses_no_step(
    single_rank: None, background: bool, undisturbed: Path, prepared: Path, disk: Path, said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As where a quota is met: what is seen beforehand says that there is room."""
    run = disk / "run"
    monkeypatch.setattr(room, "problem", lambda *_: "")
    config = small(prepared, run, background_saving=background, keep_checkpoints=1)
    half = checkpoint_bytes(RunShape.of(config, 512, 1)) // 2
    attempt(config, at(step_6=lambda: fill(disk, left=half), step_11=(disk / "ballast").unlink))
    failed = [line for line in said if "could not be saved: [Errno 28] No space left on device" in line]
    assert failed and failed[0].startswith(f"checkpoint {run / 'checkpoints' / 'step-00000008'} could not")
    assert metrics(run) == metrics(undisturbed) and checkpoints(run) == ["0012"]


@pytest.mark.thorough
def test_at_the_end_there_is_no_later_try(single_rank: None, prepared: Path, disk: Path, said: list[str]) -> None:
    """It goes on from the old checkpoint once there is room."""
    run = disk / "run"
    config = small(prepared, run, keep_checkpoints=1)
    with pytest.raises(store.CheckpointNotSaved, match=r"step-00000012 could not be saved: .*No space left on device"):
        attempt(config, at(step_10=lambda: fill(disk)))
    assert checkpoints(run) == ["0008"]
    (disk / "ballast").unlink()
    attempt(config)
    assert checkpoints(run) == ["0012"]


@pytest.mark.thorough
def test_a_run_that_is_stopped_on_a_full_disk_says_that_it_is_not_saved(
    single_rank: None, prepared: Path, disk: Path
) -> None:
    def stop(run: Pretraining, step: int) -> None:
        if step == 6:
            fill(disk)
            run.stop_request._handle(15, None)

    with pytest.raises(store.CheckpointNotSaved, match="step-00000006 could not be saved"):
        attempt(small(prepared, disk / "run"), stop)
    assert checkpoints(disk / "run") == ["0004"]


@pytest.mark.parametrize(
    ("free", "refused", "warned"),
    [(0.9, True, False), (1.2, False, True), (2.9, False, True), (3.3, False, False)],
)
def test_what_is_free_is_held_against_what_checkpoints_take(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, refused: bool, warned: bool
) -> None:
    """Two are kept, and a third is there while it is written."""
    config = small(prepared, tmp_path)
    one = checkpoint_bytes(RunShape.of(config, 512, 1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, int(free * one)))
    if refused:
        line = f"output is {tmp_path}: a checkpoint takes {one:,} bytes (.*), and {int(free * one):,} .* are free; free"
        with pytest.raises(ConfigError, match=line):
            room.require(RunShape.of(config, 512, 1))
        return
    said = room.require(RunShape.of(config, 512, 1))
    assert ("3 more at the same time" in said) == warned and bool(said) == warned


def test_what_is_there_already_and_unfinished_saves_count(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(prepared, tmp_path, milestones=[9])
    one = checkpoint_bytes(RunShape.of(config, 512, 1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    unfinished = tmp_path / "checkpoints" / "step-00000006.tmp" / "tensors"
    unfinished.mkdir(parents=True)
    (unfinished / "part").write_bytes(b"\1" * int(1.2 * one))
    for step in (4, 8):
        (tmp_path / "checkpoints" / name_of(step)).mkdir()
    assert "2 more at the same time" in room.require(RunShape.of(config, 512, 1)), "one in progress, and the milestone"
    (tmp_path / "checkpoints" / name_of(12)).mkdir()
    shutil.rmtree(unfinished)
    assert room.require(RunShape.of(config, 512, 1)) == "", "it is finished, and will save nothing"


def test_a_folder_that_cannot_be_written_is_refused(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to("/proc")  # where nobody can make a file, root neither
    with pytest.raises(ConfigError, match=f"^output is {tmp_path}: {tmp_path}/checkpoints cannot be written: "):
        room.require(RunShape.of(small(prepared, tmp_path), 512, 1))


SIZES = {
    "small": RunConfig(model=ModelSettings(num_layers=1, hidden_size=32, num_attention_heads=2)),
    "bf16": RunConfig(training=TrainingSettings(precision="bf16")),
    "mla": RunConfig(model=ModelSettings(mla=MLASettings(), num_layers=2), moe=MoESettings(num_experts=8)),
    "dense too": RunConfig(moe=MoESettings(layer_freq=[0, 1, 0, 1], num_experts=16, num_shared_experts=0)),
    "gelu, tied": parse({"model": {"activation": "gelu", "untied_embeddings": False}, "moe": {"num_experts": 8}}),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", SIZES)
def test_a_checkpoint_takes_what_was_predicted(single_rank: None, name: str, tmp_path: Path) -> None:
    config = SIZES[name]
    engine = zero.build_engine(build_model(config, 512), config.optimizer, config.training, config.zero, 1)
    saved = store.save(tmp_path, 1, engine, {}, keep=1)
    found = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    assert checkpoint_bytes(RunShape.of(config, 512, 1)) == pytest.approx(found, rel=0.02)


@pytest.mark.slow
@pytest.mark.run
def test_a_whole_run_on_two_ranks_outlives_a_full_disk(config: Path, prepared: Path, disk: Path) -> None:
    """Full from its first checkpoint until it has said that one was not saved; and no run begins there meanwhile."""
    run, log = disk / "run", disk.parent / "log"
    program = ("launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={run}")
    long = ("training.steps=3000", "training.save_every=20", "training.keep_checkpoints=1", "training.log_every=20")
    command = [*TORCHRUN, "2", *program, *long, "training.evaluate_every=3000"]
    with (
        log.open("w") as out,
        Program(list(map(str, command)), stdout=out, stderr=out, start_new_session=True) as process,
    ):
        wait_for(lambda: next((run / "checkpoints").glob("step-*[0-9]"), None), process)
        fill(disk)
        wait_for(lambda: "is not saved: " in log.read_text() or "could not be saved: " in log.read_text(), process)
        other = python(*program[:3], f"output={disk / 'other'}", "parallel.expert=1")
        (disk / "ballast").unlink()
        wait_for(lambda: "; earlier ones could not be" in log.read_text(), process)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    assert other.returncode == 2 and other.stderr.count("\n") == 1, other.stderr
    assert "No space left on device" in other.stderr or "are free; free some space, or" in other.stderr
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(0, steps[-1] + 1, 20)) and len(checkpoints(run)) == 1
    assert "Traceback" not in log.read_text().partition("stopped after step")[0]


def wait_for(condition: Callable[[], Any], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.run
def test_a_disk_without_room_for_one_checkpoint_is_refused_in_one_line(
    config: Path, prepared: Path, disk: Path
) -> None:
    fill(disk, left=MB // 4)
    done = python(
        "launch/pretrain_coe.py", config, f"data.path={prepared}", f"output={disk / 'run'}", "parallel.expert=1"
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        f"output is {disk / 'run'}: a checkpoint takes " in done.stderr
        and "are free; free some space, or" in done.stderr
    )
    assert not (disk / "run").exists(), "nothing is left of an attempt that was refused"
