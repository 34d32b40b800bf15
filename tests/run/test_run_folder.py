"""The folder of a run: its attempts, and what may differ between them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from coe_megatron.config import RunConfig, dump, parse
from coe_megatron.errors import ConfigError
from coe_megatron.run import folder as run_folder


def outcomes(folder: Path) -> list[str]:
    return [attempt["outcome"] for attempt in json.loads((folder / "run.json").read_text())["attempts"]]


def begin(folder: Path, logs: Path | None = None) -> run_folder.RunFolder:
    return run_folder.begin(RunConfig(output=str(folder)), logs)


def test_an_attempt_that_said_nothing_has_died(tmp_path: Path) -> None:
    begin(tmp_path).close()
    with begin(tmp_path) as output:
        output.end("finished")
    assert outcomes(tmp_path) == ["died", "finished"]


def test_what_is_refused_leaves_no_trace(tmp_path: Path) -> None:
    with begin(tmp_path / "new") as output:
        output.withdraw()
    assert not list(tmp_path.iterdir())
    with begin(tmp_path) as output:
        output.end("finished")
    with begin(tmp_path) as output:
        output.withdraw()
    assert outcomes(tmp_path) == ["finished"]


def test_a_record_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with begin(tmp_path) as output, pytest.raises(ValueError, match="not JSON compliant"):
        output.record({"unigram_entropy": float("nan")})
    assert outcomes(tmp_path) == ["running"]


def finished(folder: Path, **facts: object) -> RunConfig:
    """A run of ten steps whose records are of this text; returns its config."""
    config = parse({"output": str(folder), "training": {"steps": 10}})
    (folder / "checkpoints" / "step-00000010").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config))
    record = {"attempts": [{"outcome": "finished"}], "parameters": {"total": 2000, "active": 1000}, "ranks": 1}
    record |= {"model": "CoE-2", "unigram_entropy": 5.0, **facts}
    (folder / "run.json").write_text(json.dumps(record))
    lines = [{"step": 0, "valid_loss": 1e308}, {"step": 10, "tokens": 9, "valid_loss": 4.0, "tokens_per_second": 1e308}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config


def test_what_a_finished_run_says_can_be_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    config = finished(tmp_path, model="\x1b[31mred\n\u202e")
    with run_folder.begin(config) as output:
        said = output.finish().summary().splitlines()
    assert all(line.isprintable() and len(line) < 400 for line in said), said
    assert said[0] == r"model            \x1b[31mred\n\u202e"
    assert said[2] == (
        "validation loss  1e+308 at first, 4.000 at step 10, best 4.000 at step 10 (token frequencies alone: 5.000)"
    )
    assert (tmp_path / "loss.png").exists() and not recwarn and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"unigram_entropy": 1e308}, "unigram_entropy: "),
        ({"unigram_entropy": -1.0}, "unigram_entropy: "),
        ({"parameters": {"total": 10**400, "active": 1}}, "parameters.total: "),
        ({"ranks": 10**400}, "ranks: "),
        ({"model": "m" * 10_000}, "model: "),
    ],
)
def test_what_no_run_has_written_is_set_aside(
    facts: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder.begin(finished(tmp_path, **facts)).close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'run.json'} cannot be used ({said}") and line.isprintable()
    assert outcomes(tmp_path) == ["running"]


def test_the_log_is_where_stderr_goes_through_a_pipe_too(tmp_path: Path, stderr_is_a_pipe: None) -> None:
    """As SLURM's job has it for rank 0: `tee` writes the log that lies beside the rank's error file."""
    logs = tmp_path / "logs"
    logs.mkdir()
    for expected in (None, str(logs / "stderr.log")):
        begin(tmp_path / "run", logs=logs).close()
        assert json.loads((tmp_path / "run" / "run.json").read_text())["attempts"][-1]["log"] == expected
        (logs / "stderr.log").touch()


@pytest.fixture
def stderr_is_a_pipe() -> Iterator[None]:
    own, (reading, writing) = os.dup(2), os.pipe()
    os.dup2(writing, 2)
    yield
    os.dup2(own, 2)
    for each in (own, reading, writing):
        os.close(each)


@pytest.mark.parametrize(("decay", "warns"), [("constant", False), ("linear", True)])
def test_other_steps_change_a_schedule_that_falls(decay: str, warns: bool, tmp_path: Path) -> None:
    then, now = (parse({"optimizer": {"decay": decay}, "training": {"steps": steps}}) for steps in (60, 12))
    (tmp_path / "config.yaml").write_text(dump(then))
    remark = run_folder.check_same_run(tmp_path, now, 2000)
    assert ("training.steps was 60 and is now 12" in remark) == warns
    assert run_folder.check_same_run(tmp_path, then, 2000) == ""


def test_other_settings_are_refused_and_where_things_lie_is_free(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(RunConfig()))
    free = {"data": {"path": "moved", "validation": {"far": "away"}}, "logging": {"tensorboard": False}, "output": "x"}
    assert run_folder.check_same_run(tmp_path, parse(free), 2000) == ""
    with pytest.raises(ConfigError, match=r"^moe.topk is 2: the checkpoints in .* were made with 4"):
        run_folder.check_same_run(tmp_path, parse({"moe": {"topk": 2}}), 2000)


def test_a_vocabulary_is_another_only_if_the_embedding_has_other_rows(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(RunConfig()))
    assert run_folder.check_same_run(tmp_path, parse({"model": {"vocab_size": 2048}}), 2000) == ""
    with pytest.raises(ConfigError, match=r"^model.vocab_size is 1024: the checkpoints in .* made with null; choose"):
        run_folder.check_same_run(tmp_path, parse({"model": {"vocab_size": 1024}}), 2000)
    (tmp_path / "config.yaml").write_text(dump(parse({"model": {"vocab_size": 2048}})))
    assert run_folder.check_same_run(tmp_path, RunConfig(), 2048) == ""
    with pytest.raises(ConfigError, match=r"^model.vocab_size is null: the checkpoints in .* made with 2048; choose"):
        run_folder.check_same_run(tmp_path, RunConfig(), 2049)
