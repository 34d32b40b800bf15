"""How runs stand, from their folders alone: every state, files that are half there, and the program that shows it."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from programs import Program, python

from coe_megatron.config import dump, parse
from coe_megatron.run import lock
from coe_megatron.run.status import Status, find_runs, status, statuses, table

pytestmark = pytest.mark.thorough

NOW = 1_800_000_000.0
STEPS: list[dict[str, Any]] = [
    {"step": 0, "tokens": 0, "valid_loss": 6.25},
    {"step": 10, "train_loss": 5.5, "valid_loss": 5.75, "tokens_per_second": 900.0, "step_seconds": 2.0},
    {"step": 20, "train_loss": 5.0, "tokens_per_second": 1000.0, "step_seconds": 2.0, "eta_seconds": 160.0},
]


def make_run(folder: Path, outcome: str, host: str = "elsewhere", age: float = 0, **more: Any) -> Path:
    """The folder of a run that was begun an hour before NOW and last wrote `age` seconds before it."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(NOW - 3600))
    attempts = [{"outcome": "died", "began": began}, {"outcome": outcome, "began": began, "host": host, **more}]
    (folder / "run.json").write_text(json.dumps({"attempts": attempts}))
    (folder / "config.yaml").write_text(dump(parse({"training": {"steps": 100, "log_every": 10}})))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in STEPS))
    for name in ("run.json", "metrics.jsonl"):
        os.utime(folder / name, (NOW - age, NOW - age))
    return folder


def test_a_run_says_where_it_stands(tmp_path: Path) -> None:
    found = status(make_run(tmp_path, "running", age=60, log="/logs/7.err"), NOW)
    assert (found.state, found.reason, found.attempts, found.log) == ("running", None, 2, "/logs/7.err")
    assert (found.step, found.steps, found.train_loss, found.valid_loss) == (20, 100, 5.0, 5.75)
    assert (found.tokens_per_second, found.eta_seconds, found.written) == (1000.0, 100.0, NOW - 60)
    assert found.as_dict()["written"] == "2027-01-15T07:59:00+00:00"
    head, row = (re.split("  +", line) for line in table([found], NOW).splitlines())
    assert head[:5] == ["run", "state", "step", "train loss", "valid loss"]
    assert head[5:] == ["tokens/s", "ETA", "attempts", "written", "log"]
    values = "running", "20 of 100", "5.000", "5.750", "1,000", "1.7 min", "2", "1.0 min ago", "/logs/7.err"
    assert row == [str(tmp_path), *values]


def test_roll_backs_have_a_column_where_there_were_any(tmp_path: Path) -> None:
    quiet, rolled = (make_run(tmp_path / name, "running") for name in ("quiet", "rolled"))
    assert "rollbacks" not in table(statuses([tmp_path]), NOW)
    record = json.loads((rolled / "run.json").read_text())
    (rolled / "run.json").write_text(json.dumps({**record, "rollbacks": [{"from_step": 7, "to_step": 4}] * 2}))
    rows = statuses([tmp_path])
    assert [(row.folder, row.rollbacks) for row in rows] == [(str(quiet), 0), (str(rolled), 2)]
    head, *lines = table(rows, NOW).splitlines()
    end = head.index("rollbacks") + len("rollbacks")
    assert [line[:end].split()[-1] for line in lines] == ["0", "2"]


@pytest.mark.parametrize(
    ("outcome", "state", "reason"),
    [
        ("finished", "finished", None),
        ("interrupted", "interrupted", None),
        ("failed: FloatingPointError('a: b')", "failed", "FloatingPointError('a: b')"),
    ],
)
def test_a_run_that_ended_says_how(outcome: str, state: str, reason: str | None, tmp_path: Path) -> None:
    found = status(make_run(tmp_path, outcome), NOW)
    assert (found.state, found.reason, found.eta_seconds) == (state, reason, None)
    assert (f"{tmp_path} failed: {reason}" in table([found], NOW)) == (reason is not None)


def test_on_this_machine_the_lock_tells_a_live_run_from_a_dead_one(tmp_path: Path) -> None:
    make_run(tmp_path, "running", host=platform.node(), age=3000)
    with lock.take(tmp_path):
        assert status(tmp_path, NOW).state == "running"
    os.utime(tmp_path / "metrics.jsonl", (NOW, NOW))
    assert status(tmp_path, NOW).state == "died"


@pytest.mark.parametrize("locks", [True, False])
def test_a_run_elsewhere_has_died_when_it_was_silent_for_long(locks: bool, tmp_path: Path) -> None:
    """Ten times 20 seconds from one logged step to the next are less than the ten minutes that any run is given."""
    if locks:  # free as seen from here, as where a file system keeps locks to one machine
        (tmp_path / lock.NAME).touch()
    assert status(make_run(tmp_path, "running", age=590), NOW).state == "running"
    assert status(make_run(tmp_path, "running", age=610), NOW).state == "died"
    (tmp_path / "config.yaml").write_text(dump(parse({"training": {"log_every": 50}})))
    assert status(tmp_path, NOW).state == "running"


def test_a_run_waits_for_its_first_step(tmp_path: Path) -> None:
    make_run(tmp_path, "running", age=10)
    os.utime(tmp_path / "metrics.jsonl", (NOW - 4000, NOW - 4000))  # of the attempt before
    assert status(tmp_path, NOW).state == "waiting"
    (tmp_path / "metrics.jsonl").unlink()
    found = status(tmp_path, NOW)
    assert (found.state, found.step, found.train_loss) == ("waiting", None, None)
    assert "-  " in table([found], NOW)


def test_a_half_written_line_is_left_out_and_the_beginning_of_a_long_file_not_read(tmp_path: Path) -> None:
    make_run(tmp_path, "running")
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(1 << 40)  # a hole: no memory could hold it
        file.seek(0, os.SEEK_END)
        lines = [
            STEPS[1] | {"routing": [{"load": [0.5] * 100_000}]},
            STEPS[2],
            STEPS[2] | {"step": 30, "train_loss": None},
        ]
        file.write(b"\n" + "".join(json.dumps(line) + "\n" for line in lines).encode() + b'{"step": 40, "valid_loss"')
    found = status(tmp_path, NOW)
    assert (found.step, found.train_loss, found.valid_loss) == (30, None, 5.75)


VALUES = [
    "null",
    "true",
    "-1",
    "9" * 5000,
    "1e999",
    "1e300",
    '"\\u001b[2J\\ud800"',
    "[]",
    "[1]",
    "{}",
    "[" * 50 + "]" * 50,
]


def of_any_value(written: str) -> list[str]:
    """A file's JSON with each of its values replaced by each of VALUES, at every depth."""

    def places(value: Any) -> list[Any]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [[], *([key, *below] for key, part in inner for below in places(part))]

    made = []
    for place in places(json.loads(written)):
        content = {"": json.loads(written)}
        *above, last = ["", *place]
        holder: Any = content
        for key in above:
            holder = holder[key]
        holder[last] = "HERE"
        made += [json.dumps(content[""]).replace('"HERE"', value) for value in VALUES]
    return made


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl", "config.yaml"])
def test_any_value_anywhere_in_a_record_gives_a_row(file: str, tmp_path: Path) -> None:
    make_run(tmp_path, "running", log="/logs/7.err")
    path = tmp_path / file
    record = json.dumps({**json.loads((tmp_path / "run.json").read_text()), "rollbacks": [{}], "model": "x"})
    written = {"run.json": record, "metrics.jsonl": json.dumps(STEPS[2]), "config.yaml": '{"training": {"steps": 9}}'}
    for content in of_any_value(written[file]):
        path.write_text(f"{content}\n")
        row = status(tmp_path, NOW)
        as_table, as_json = table([row], NOW), json.dumps(row.as_dict(), allow_nan=False)
        assert row.state in ("running", "waiting", "unreadable") and len(as_table.splitlines()) == 2, content
        assert len(as_table) < 1000 and as_json.isascii() and as_table.replace("\n", "").isprintable(), content


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "config.yaml", lock.NAME])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_file_is_not_waited_for(name: str, kind: str, tmp_path: Path) -> None:
    path = make_run(tmp_path, "finished") / name
    path.unlink(missing_ok=True)
    {"folder": Path.mkdir, "pipe": os.mkfifo, "link": lambda path: path.symlink_to(path)}[kind](path)
    assert status(tmp_path, NOW).state == ("unreadable" if name == "run.json" else "finished")


def test_a_file_of_nuls_is_read_from_its_end_within_bounds(tmp_path: Path) -> None:
    path = make_run(tmp_path, "finished") / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    began = time.process_time()
    assert status(tmp_path, NOW).step is None
    assert time.process_time() - began < 2


def test_a_file_of_another_age_has_a_time_all_the_same() -> None:
    row = Status("run", "finished", written=1e18)
    assert row.as_dict()["written"] == "9999-12-31T23:59:59+00:00" and "0 s ago" in table([row], NOW)


@pytest.mark.parametrize("content", ["", "\n", '{"step": 1', "\0\0\n", "{]\n", "[" * 100_000 + "\n"])
def test_files_that_cannot_be_used_are_dashes(content: str, tmp_path: Path) -> None:
    make_run(tmp_path, "finished")
    (tmp_path / "metrics.jsonl").write_text(content)
    (tmp_path / "config.yaml").write_text("training: [")
    found = status(tmp_path, NOW)
    assert (found.state, found.step, found.steps, found.valid_loss) == ("finished", None, None, None)
    (tmp_path / "run.json").write_text(content)
    assert status(tmp_path, NOW).state == "unreadable"
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.json").mkdir()
    assert status(tmp_path, NOW).state == "unreadable"
    assert len(table([status(tmp_path, NOW)], NOW).splitlines()) == 2


def test_runs_are_found_at_any_depth_but_not_inside_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, "finished") for name in ("a/deep/one", "b", "b/of-b", "index/two")]
    make_run(tmp_path / "b" / "checkpoints" / "no", "finished")
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == runs
    rows = statuses([tmp_path / "b", tmp_path / "empty", tmp_path])
    assert [row.folder for row in rows] == [str(path) for path in (*runs[1:3], tmp_path / "empty", runs[0], runs[3])]
    assert rows[2].state == "no run"


def test_the_program_shows_a_table_or_json(tmp_path: Path) -> None:
    make_run(tmp_path / "one", "finished")
    shown, as_json = python("launch/status.py", tmp_path), python("launch/status.py", tmp_path, "--json")
    assert (shown.returncode, shown.stderr) == (as_json.returncode, as_json.stderr) == (0, "")
    assert re.search("one +finished +20 of 100 ", shown.stdout)
    (row,) = json.loads(as_json.stdout)
    assert (row["folder"], row["state"], row["valid_loss"]) == (str(tmp_path / "one"), "finished", 5.75)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "DIR is nowhere: there is no such folder"),
        (("Makefile",), "DIR is Makefile: it is a file, where a folder is needed"),
        (("n" * 256,), f"DIR is {'n' * 149}…{'n' * 50}: it cannot be used: file name too long"),
        ((".", "--watch", "0"), "argument --watch: 0 must be a number above 0"),
        ((".", "--watch", "nan"), "argument --watch: nan must be a number above 0"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = python("launch/status.py", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"status.py: error: {said}\n")


def test_watching_goes_on_until_ctrl_c_or_until_nobody_reads(tmp_path: Path) -> None:
    command = [sys.executable, "launch/status.py", str(tmp_path), "--watch", "0.05"]
    for ended_by, code in (("Ctrl-C", 130), ("reader", 0)):
        with Program(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            for _ in range(2):
                assert process.stdout.readline().startswith("run ")
                assert process.stdout.readline().startswith(f"{tmp_path}  no run ")
            if ended_by == "Ctrl-C":
                process.send_signal(signal.SIGINT)
            else:
                process.stdout.close()
            assert (process.wait(timeout=60), process.stderr.read()) == (code, "")


def test_torch_is_not_imported() -> None:
    code = "import sys, coe_megatron.run.status; sys.exit('torch' in sys.modules)"
    assert python("-c", code).returncode == 0
