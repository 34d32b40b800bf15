"""launch/pretrain_coe.py: Ctrl-C before the first step, from the first import on; ranks that cannot come together."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from programs import ROOT, Program, python, wait_for_step

from coe_megatron import scratch
from coe_megatron.data.prepare import prepare
from coe_megatron.data.prepare_settings import PrepareSettings
from coe_megatron.launcher.network import free_port
from coe_megatron.training import loop

pytestmark = pytest.mark.thorough

PROGRAM = ROOT / "launch" / "pretrain_coe.py"
SAID = "interrupted; the same command resumes from the most recent checkpoint\n"
INTERRUPTS = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    prepare(PrepareSettings(output=folder / "data", builtin=40, vocab_size=400))
    settings = (f"data.path={folder / 'data'}", f"output={folder / 'run'}", "parallel.expert=1")
    return ["configs/quickstart.yaml", *settings]


@pytest.mark.parametrize("name", ["omegaconf", "torch"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_while_a_library_is_imported(
    name: str, rank: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(INTERRUPTS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    command = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", SAID if rank == "0" else "")


def test_ctrl_c_while_the_run_is_built(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(loop, "train", interrupted)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(scratch, "enter", lambda *_: None)  # this process goes on with other tests
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAM))["main"](arguments)
    assert ended.value.code == 130
    assert capsys.readouterr().err == SAID


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "0"}, "RANK is 0, but WORLD_SIZE is not set: set both RANK and WORLD_SIZE, or neither"),
        ({"RANK": "abc", "WORLD_SIZE": "1"}, "RANK is 'abc': it must be a whole number from 0 to 1048575"),
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            "MASTER_ADDR is not set, but WORLD_SIZE is 2: set it to where rank 0 listens",
        ),
    ],
)
@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_a_launch_environment_in_part_is_one_line(
    variables: dict[str, str], says: str, dry_run: tuple[str, ...], arguments: list[str]
) -> None:
    """Also of a rank that is not the first: nobody knows whether there is a first one to say it."""
    command = [sys.executable, str(PROGRAM), *arguments, *dry_run]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, **variables}
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"pretrain_coe.py: error: {says}\n")


@pytest.mark.run
def test_a_rank_that_others_leave_alone_ends_in_one_line(arguments: list[str]) -> None:
    port = str(free_port())
    pair = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "COE_RENDEZVOUS_TIMEOUT": "2",
    }
    command = [sys.executable, str(PROGRAM), *arguments]
    environment = {**os.environ, **pair}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    place = f"MASTER_ADDR is localhost, MASTER_PORT {port}"
    said = f"pretrain_coe.py: error: {place}: nobody answers there within 2 s (Connection refused)\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.slow
@pytest.mark.run
def test_nobody_beyond_this_host_can_connect_and_a_killed_launcher_leaves_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of a launcher that was killed save and end; the next program removes their temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = tmp_path / "run"
    options = (*arguments, f"output={run}", "training.steps=5000", "training.save_every=5000")
    command = [sys.executable, "launch/one_host.py", "--", "--nproc-per-node", "2", str(PROGRAM), *options]
    with Program(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        wait_for_step(run, 1, launcher)
        started = psutil.Process(launcher.pid).children(recursive=True)
        found = [one for each in started for one in each.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        assert {one.laddr.ip for one in found} == {"127.0.0.1"} and len(started) >= 3
        launcher.kill()
        _, alive = psutil.wait_procs(started, timeout=90)
        for process in alive:
            process.kill()
        assert alive == []
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
    assert python("-c", "from coe_megatron import scratch; scratch.enter()").returncode == 0
    assert [path.name for path in tmp_path.iterdir() if path != run] == [f"coe-{os.getuid()}"]
    assert list(tmp_path.glob("coe-*/run-*")) == []
