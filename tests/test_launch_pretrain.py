"""launch/pretrain_coe.py: Ctrl-C before the first step, from the first import on."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT

from coe_megatron.data.prepare import PrepareSettings, prepare
from coe_megatron.training import loop

PROGRAM = ROOT / "launch" / "pretrain_coe.py"
SAID = "interrupted; the same command goes on from the newest checkpoint\n"
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
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAM))["main"](arguments)
    assert ended.value.code == 130
    assert capsys.readouterr().err == SAID
