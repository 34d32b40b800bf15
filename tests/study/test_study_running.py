"""The runs of a study on this machine, with a script that stands in for training."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from programs import Program, python
from study_made_up import leave

from coe_megatron.errors import ConfigError
from coe_megatron.launcher.torchrun_supervisor import Requests
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.study.plan.arms import Run, make_study
from coe_megatron.study.plan.study_file import read_study
from coe_megatron.study.run import runner
from coe_megatron.study.run.paths import config_of, log_of, write_config
from coe_megatron.study.run.runner import (
    Runner,
    RunResult,
    failure_reason,
    is_finished,
    run_status,
    seed_by_seed,
    usable_devices,
)

pytestmark = pytest.mark.thorough

STAND_IN = Path(__file__).with_name("study_stand_in.py")
Write = Callable[..., Path]
MOE, COE, NORM = "moe-4-8_prenorm", "coe-2-2-8_prenorm", "coe-2-2-8_iteration-norm"


class Place:
    """A study of three arms and two seeds whose runs the stand-in makes; `how` says by name what each does."""

    def __init__(self, folder: Path, file: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.file, self.said, self.how = folder, file, list[str](), dict[str, str]()
        self.requests = Requests()
        patch.setattr(runner, "_POLL_SECONDS", 0.01)
        patch.setattr(runner, "command", self._command)
        patch.setattr(runner, "without_gpu", lambda: False)  # the stand-in imports nothing

    def runs(self, *overrides: str) -> list[Run]:
        return seed_by_seed(make_study(read_study(self.file), overrides).runs)

    def go(
        self, runs: list[Run], devices: tuple[str, ...] = (), at_once: int = 1, per_device: int = 1
    ) -> dict[str, RunResult]:
        """By name, how runs ended."""
        ended = Runner(devices, at_once, self.said.append, per_device).run(runs, self.requests)
        return {name(each.run): each for each in ended}

    @property
    def events(self) -> list[str]:
        path = self.folder / "events"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, event: str) -> None:
        wait(lambda: any(event in line for line in self.events))

    def _command(self, run: Run, config: Path) -> list[str]:
        return [sys.executable, str(STAND_IN), str(config), self.how.get(name(run), "done")]


@pytest.fixture
def place(tmp_path: Path, study_file: Write, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "out").mkdir()
    return Place(tmp_path / "out", study_file(output=str(tmp_path / "out")), monkeypatch)


def name(run: Run) -> str:
    return f"{run.arm}/seed-{run.seed}"


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def most_at_once(events: list[str]) -> int:
    running_now = most = 0
    for event in events:
        running_now += 1 if " begins" in event else -1 if event.endswith("finished") else 0
        most = max(most, running_now)
    return most


def test_runs_go_seed_by_seed_one_after_another(place: Place) -> None:
    ended = place.go(place.runs())
    begun = [line.split()[0] for line in place.events if "begins" in line]
    assert begun == [f"{arm}/seed-{seed}" for seed in (1, 2) for arm in (MOE, COE, NORM)]
    assert most_at_once(place.events) == 1 and {each.status for each in ended.values()} == {ExitStatus.DONE}
    assert all(is_finished(run) for run in place.runs())
    assert place.said[0].startswith(f"{MOE}, seed 1: started, log in ") and "(1 of 6, about " in place.said[1]
    assert place.said[-1].startswith(f"{NORM}, seed 2: done, after ") and place.said[-1].endswith("(6 of 6)")


def test_no_more_than_so_many_at_once(place: Place) -> None:
    place.how = dict.fromkeys(map(name, place.runs()), "with 2")
    place.go(place.runs(), at_once=2)
    assert most_at_once(place.events) == 2 and len(place.events) == 12


def test_devices_are_given_out_and_given_back(place: Place) -> None:
    place.how = dict.fromkeys(map(name, place.runs()), "with 2")
    place.go(place.runs(), devices=("3", "5"), at_once=6)
    given = [line.split()[-1] for line in place.events if "begins" in line]
    assert set(given) == {"3", "5"} and most_at_once(place.events) == 2


def test_small_runs_share_a_device(place: Place) -> None:
    place.how = dict.fromkeys(map(name, place.runs()), "with 4")
    place.go(place.runs(), devices=("3", "5"), at_once=6, per_device=2)
    given = [line.split()[-1] for line in place.events if "begins" in line]
    assert sorted(given[:4]) == ["3", "3", "5", "5"] and most_at_once(place.events) == 4


def test_ranks_of_a_run_never_share_a_device(place: Place) -> None:
    runs = place.runs("parallel.expert=2")
    place.go(runs[:2], devices=("0", "1"), at_once=2, per_device=2)
    given = [line.split()[-1] for line in place.events if "begins" in line]
    assert [sorted(each.split(",")) for each in given] == [["0", "1"], ["0", "1"]]


def test_runs_of_several_ranks_have_as_many_devices(place: Place) -> None:
    runs = place.runs("parallel.expert=2")
    place.go(runs[:2], devices=("0", "1", "2"), at_once=2)
    assert [line.split()[-1] for line in place.events if "begins" in line] == ["0,1", "0,1"]


def test_a_run_that_needs_more_devices_than_there_are_is_refused_and_the_rest_goes_on(place: Place) -> None:
    large = place.runs("parallel.expert=4", "training.micro_batch=1")[0]
    ended = place.go([large, *place.runs()[1:3]], devices=("0",))
    assert ended[name(large)].reason == "its 4 ranks need one device each, but there are only 1"
    assert [each.status.name for each in ended.values()] == ["MISTAKE", "DONE", "DONE"]
    assert any(line.startswith(f"{MOE}, seed 1: MISTAKE: its 4 ranks ") for line in place.said)
    assert len(place.events) == 4


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("fail", "DIVERGED", "the loss is nan"),
        ("refused", "MISTAKE", "data.path is nowhere"),
        ("silent", "FAILED", "no error message; its log is "),
    ],
)
def test_a_run_that_fails_stops_no_other_and_its_error_is_shown(
    place: Place, how: str, status: str, reason: str
) -> None:
    place.how[f"{MOE}/seed-1"] = how
    ended = place.go(place.runs())
    assert len(ended) == 6 and [each.status.name for each in ended.values()] == [status] + ["DONE"] * 5
    assert ended[f"{MOE}/seed-1"].reason.startswith(reason) and f": {status}: {reason}" in place.said[1]


def test_a_run_that_cannot_be_started_stops_no_other(place: Place) -> None:
    (place.folder / MOE).write_text("a file where its folder would be")
    ended = place.go(place.runs())
    assert [each.status.name for each in ended.values()] == ["MISTAKE", "DONE", "DONE"] * 2
    assert ended[f"{MOE}/seed-1"].reason.endswith("not a directory")


def test_an_old_error_is_not_taken_for_the_new_one(place: Place) -> None:
    run = place.runs()[0]
    place.how[name(run)] = "refused"
    assert place.go([run])[name(run)].reason == "data.path is nowhere"
    place.how[name(run)] = "silent"
    assert "no error message" in place.go([run])[name(run)].reason
    assert failure_reason(run) == ""


def test_what_another_process_writes_is_waited_for(place: Place) -> None:
    runs = place.runs()[:2]
    config = write_config(runs[0])
    with Program([sys.executable, str(STAND_IN), str(config), "slow"]):
        place.wait_for("works")
        ended = place.go(runs)
    assert {each.status for each in ended.values()} == {ExitStatus.DONE}
    assert [line for line in place.events if "begins" in line] == [
        f"{MOE}/seed-1 begins on -",  # by the other process, and not again when that had finished
        f"{COE}/seed-1 begins on -",
    ]
    assert any("waits for another process, which writes " in line for line in place.said)


def test_a_run_whose_folder_another_process_took_first_waits_again(place: Place) -> None:
    run = place.runs()[0]
    place.how[name(run)] = "busy"
    assert place.go([run])[name(run)].status is ExitStatus.DONE
    assert len([line for line in place.events if "begins" in line]) == 2


@pytest.mark.parametrize(
    ("how", "words", "status"), [("obeys", ["stop"], "STOPPED"), ("stubborn", ["stop", "end"], "INTERRUPTED")]
)
def test_asked_to_stop_runs_save_and_none_is_started(place: Place, how: str, words: list[str], status: str) -> None:
    place.how = dict.fromkeys(map(name, place.runs()), how)

    def ask() -> None:
        place.wait_for(f"{MOE}/seed-1 waits")
        place.wait_for(f"{COE}/seed-1 waits")
        for word in words:
            getattr(place.requests, word).set()

    asking = threading.Thread(target=ask)
    asking.start()
    ended = place.go(place.runs(), at_once=2)
    asking.join()
    assert [each.status.name for each in ended.values()] == [status] * 2
    assert len([line for line in place.events if "begins" in line]) == 2
    assert {each.reason for each in ended.values()} == {""}


def test_an_error_of_the_study_ends_its_runs(place: Place) -> None:
    place.how = {name(place.runs()[0]): "obeys"}

    def fail(_text: str) -> None:
        place.wait_for("waits")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Runner((), 1, fail).run(place.runs(), place.requests)
    assert place.events[-1] == f"{MOE}/seed-1 running"  # what the stand-in leaves when told to end


def test_killed_the_study_leaves_no_run_behind(place: Place) -> None:
    driver = f"""
import sys
from pathlib import Path
from coe_megatron.launcher.torchrun_supervisor import Requests
from coe_megatron.study.run import runner as running
from coe_megatron.study.plan.arms import make_study
from coe_megatron.study.plan.study_file import read_study
running.command = lambda run, config: [sys.executable, {str(STAND_IN)!r}, str(config), "obeys"]
runs = make_study(read_study(Path({str(place.file)!r}))).runs
running.Runner((), 2, lambda text: None).run(runs, Requests())
"""
    with Program([sys.executable, "-c", driver]) as process:
        wait(lambda: len([line for line in place.events if line.endswith("waits")]) == 2)
        os.kill(process.pid, 9)
        process.wait()
    wait(lambda: len([line for line in place.events if line.endswith("interrupted")]) == 2)


def test_what_a_run_that_has_begun_was_run_with_must_not_change(place: Place) -> None:
    leave(place.runs()[0], outcome="interrupted")
    assert not is_finished(place.runs()[0])
    with pytest.raises(ConfigError, match=r"seed-1 was run with optimizer.lr \S+, but the study now has 0.5: give the"):
        is_finished(place.runs("optimizer.lr=0.5")[0])


def test_a_study_whose_folder_moved_is_the_same_study(place: Place, study_file: Write, tmp_path: Path) -> None:
    leave(place.runs()[0])
    place.folder.rename(tmp_path / "moved")
    study_file(output=str(tmp_path / "moved"))
    assert is_finished(place.runs()[0])


@pytest.mark.parametrize("text", ["", "{", "model: [", "\0\0\0", "[" * 100_000, "- 1", "[1e999, 2]"])
@pytest.mark.parametrize("file", ["config.yaml", "run.json"])
def test_a_run_with_damaged_records_is_started_again_and_mends_them(place: Place, file: str, text: str) -> None:
    run = place.runs()[0]
    (leave(run) / file).write_text(text)
    assert not is_finished(run)
    assert place.go([run])[name(run)].status is ExitStatus.DONE
    assert is_finished(run)


@pytest.mark.parametrize("what", ["config", "log"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_cannot_be_written_beside_a_run_is_said_and_stops_no_other(place: Place, what: str, kind: str) -> None:
    run, other = place.runs()[:2]
    path = config_of(run) if what == "config" else log_of(run)
    path.parent.mkdir(parents=True)
    {"folder": Path.mkdir, "pipe": os.mkfifo, "link": lambda path: path.symlink_to("nowhere")}[kind](path)
    ended = place.go([run, other])
    assert ended[name(run)].status is ExitStatus.MISTAKE
    assert f"the run's {what} is {path}: it is a" in ended[name(run)].reason
    assert ended[name(other)].status is ExitStatus.DONE
    assert failure_reason(run) == ""


def test_a_run_that_was_killed_as_it_began_begins_again(place: Place) -> None:
    folder = leave(place.runs()[0], outcome="running")
    (folder / "config.yaml").unlink()
    assert not is_finished(place.runs()[0])


def test_a_refused_run_has_a_row_of_its_own(place: Place) -> None:
    run, waiting = place.runs()[:2]
    place.how[name(run)] = "refused"
    place.go([run])
    row = run_status(run, time.time())
    assert (row.state, row.reason, row.log) == ("failed", "data.path is nowhere", f"{run.config.output}.log")
    Path(f"{waiting.config.output}.log").parent.mkdir(exist_ok=True)
    Path(f"{waiting.config.output}.log").write_text("study.py begins: torchrun\nloading\n")
    assert run_status(waiting, time.time()).state == "no run"  # it is only about to begin
    assert failure_reason(waiting) == ""


@pytest.mark.parametrize(
    ("asked", "environment", "found"),
    [
        (None, {"CUDA_VISIBLE_DEVICES": "2,3"}, ["2", "3"]),
        (None, {"CUDA_VISIBLE_DEVICES": ""}, []),
        (None, {"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ("0, 1", {"CUDA_VISIBLE_DEVICES": "7"}, ["0", "1"]),
        (None, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, []),
        ("", {}, []),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,3", {}, ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "3"]),
        ("MIG-GPU-8932f937/1/0", {}, ["MIG-GPU-8932f937/1/0"]),
    ],
)
def test_usable_devices(asked: str | None, environment: Mapping[str, str], found: list[str]) -> None:
    assert usable_devices(asked, environment) == found


def test_no_device_is_named_twice() -> None:
    with pytest.raises(ConfigError, match=r"^--devices is 0,0: name each device once$"):
        usable_devices("0,0", {})


@pytest.mark.parametrize("names", ["a,b", "0,-1", "00", "0;1", "cuda:0", "0 1", "²", "GPU-", "1" * 5, "x" * 10**5])
def test_what_is_no_device_is_named(names: str) -> None:
    for whose, asked, environment in (
        ("--devices", names, {}),
        ("CUDA_VISIBLE_DEVICES", None, {"CUDA_VISIBLE_DEVICES": names}),
    ):
        with pytest.raises(
            ConfigError, match=rf"^{whose} is .* is not a GPU: use its number .* GPU- or MIG-$"
        ) as error:
            usable_devices(asked, environment)
        assert len(str(error.value)) < 400


def test_the_program_runs_nothing_twice_and_names_what_changed(place: Place) -> None:
    for run in place.runs():
        leave(run)
    done = python("launch/study.py", "run", place.file)
    assert (done.returncode, done.stdout[10:]) == (0, "all 6 runs are done\n")
    done = python("launch/study.py", "run", place.file, "optimizer.lr=0.5")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"study.py: error: {place.folder}/{MOE}/seed-1 was run with optimizer.lr " in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--only", "moe"), f"--only is moe: it must be an arm, one of {MOE}, {COE}, {NORM}"),
        (("--seed", "9"), "--seed is 9: it must be one of 1, 2"),
        (("--devices", "1,1"), "--devices is 1,1: name each device once"),
        (("--devices", "a,b"), "--devices is a,b: a is not a GPU: use its number"),
        (("--at-once", "0"), "argument --at-once: 0 must be a whole number of at least 1"),
    ],
)
def test_mistakes_in_options_of_run(place: Place, options: tuple[str, ...], said: str) -> None:
    done = python("launch/study.py", "run", place.file, *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and said in done.stderr


def test_status_has_a_row_for_every_run(place: Place) -> None:
    leave(place.runs()[0])
    done = python("launch/study.py", "status", place.file, "--json")
    rows = json.loads(done.stdout)
    assert [row["state"] for row in rows] == ["finished"] + ["no run"] * 5 and rows[0]["step"] == 100


def test_the_command_is_one_that_the_launcher_takes(tmp_path: Path, study_file: Write) -> None:
    run = make_study(read_study(study_file(output=str(tmp_path / "out"), set={"parallel.expert": 2}))).runs[0]
    words = runner.command(run, write_config(run))
    assert words[1:6] == ["-m", "coe_megatron.cli.one_host", "--watch-stdin", "--", "--standalone"]
    assert words[6:8] == ["--nproc-per-node", "2"]
    planned = [sys.executable, *words[8:], "--dry-run"]
    done = subprocess.run(planned, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr
