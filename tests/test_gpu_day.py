"""`make gpu` without a device: parts that fail, hang or are interrupted, the README's rows, and its step benchmark."""

import argparse
import gc
import json
import math
import re
from pathlib import Path
from typing import Any

import gpu_day
import gpu_page
import pytest
import torch
from programs import ROOT, python

from coe_megatron.config import load

MACHINE = {
    "device": "NVIDIA H200",
    "pretended": False,
    "python": "3.12.3",
    "cuda": "13.0",
    "torch": "2.13.0+cu130",
    "megatron_core": "0.19.2",
    "deepspeed": "0.19.8",
    "transformer_engine": None,
}
TABLE = """before

| verified on | CUDA | torch |
|---|---|---|
| CPU | | 2.13.0 |
| NVIDIA GPU (NCCL): `make gpu` | none yet | |
| Transformer Engine (`model.backend=transformer_engine`) | none yet | |

after
"""
SLEEPS = "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
INTERRUPTS = f"import os, signal; os.kill(os.getppid(), signal.SIGINT); {SLEEPS}"


def report(**changes: Any) -> dict[str, Any]:
    tests = {"passed": ["test_gpu_layer.py::a", "test_gpu_transformer_engine.py::b"], "failed": [], "skipped": []}
    parts = {"tier": {"status": "done", "seconds": 1.0, "error": "", "results": tests}}
    return {"date": "2027-01-02", "quick": False, "machine": MACHINE | changes, "parts": parts}


def run_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, only: list[str] | None = None, **programs: str
) -> tuple[int, dict[str, Any]]:
    """The GPU day with these programs as its parts; exit status and report."""
    program = folder / "part.py"
    program.write_text(f"import sys\nexec({programs!r}[sys.argv[2]])")
    monkeypatch.setattr(gpu_day, "PROGRAM", str(program))
    monkeypatch.setattr(gpu_day, "PARTS", dict.fromkeys(programs, 2))
    monkeypatch.setattr(gpu_day, "_SHORTEST", 0)
    monkeypatch.setattr(gpu_day, "_QUICK", 1)
    output = folder / "report"
    (output / "logs").mkdir(parents=True, exist_ok=True)
    options = argparse.Namespace(output=output, seconds=60, quick=True, only=only)
    status = gpu_day.run_all(gpu_day.Report(output), options)
    assert (output / "report.md").exists()
    return status, json.loads((output / "report.json").read_text())


def test_a_part_that_fails_or_hangs_is_reported_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fails = "print('what went\\nwrong', file=sys.stderr); sys.exit(1)"
    programs = {"tier": fails, "layers": SLEEPS, "steps": "import os; os.abort()", "kernels": ""}
    status, found = run_all(tmp_path, monkeypatch, **programs)
    assert status == 1
    expected = {"tier": "wrong", "layers": "it took more than 2 s", "steps": "exit status -6: it wrote nothing"}
    assert {part: each["error"] for part, each in found["parts"].items()} == {**expected, "kernels": ""}
    assert [each["status"] for each in found["parts"].values()] == ["failed", "failed", "failed", "done"]
    said = capsys.readouterr().out
    assert re.search(r"^tier: failed in \d+ s: wrong\nlayers: at most 2 s$", said, re.MULTILINE)
    assert "it took more than 2 s" in (tmp_path / "report" / "report.md").read_text()


def test_a_page_that_cannot_be_drawn_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    drawn, write = [], gpu_page.write

    def fails_once(*arguments: Any) -> None:
        drawn.append(arguments)
        if len(drawn) == 1:
            raise KeyError("what the page wants")
        write(*arguments)

    monkeypatch.setattr(gpu_page, "write", fails_once)
    status, found = run_all(tmp_path, monkeypatch, tier="", layers="")
    assert status == 1 and [each["status"] for each in found["parts"].values()] == ["done", "done"]
    assert "what the page wants" in capsys.readouterr().err


def test_an_interruption_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = run_all(tmp_path, monkeypatch, tier="", layers=INTERRUPTS, kernels="")
    assert status == 130
    assert {part: each["status"] for part, each in found["parts"].items()} == {"tier": "done", "layers": "interrupted"}
    status, found = run_all(tmp_path, monkeypatch, ["layers"], tier="", layers="", kernels="")
    assert status == 0
    assert {part: each["status"] for part, each in found["parts"].items()} == {"tier": "done", "layers": "done"}


def test_the_limits_of_all_parts_but_the_last_leave_time_for_it() -> None:
    *first, last = gpu_day.PARTS
    assert last == "arms" and sum(gpu_day.PARTS[part] for part in first) <= 480 - 60


def test_without_a_device_it_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = python("benchmarks/gpu_day.py")
    assert done.returncode == 2 and not (ROOT / "gpu-report").exists()
    assert done.stderr.startswith("gpu_day.py: error: no CUDA device") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--seconds", "0"), "argument --seconds: '0' is not an integer"),
        (("--only", "all"), "argument --only: invalid choice: 'all'"),
        (("--output", "Makefile"), "--output is Makefile: it is a file, where a folder is needed"),
    ],
)
def test_a_bad_argument_is_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = python("benchmarks/gpu_day.py", *arguments)
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_device_gets_its_row_once_and_another_one_its_own() -> None:
    first = gpu_day.verified_on(TABLE, report())
    row = "| NVIDIA H200, Python 3.12: [2 GPU tests](gpu-report/report.md) | 13.0 | 2.13.0+cu130 | 0.19.2 | 0.19.8 | | "
    table = ["| CPU | | 2.13.0 |", TABLE.splitlines()[6], f"{row}2027-01-02 |"]
    assert first.splitlines()[4:-2] == table and first.endswith("\n\nafter\n")
    again = gpu_day.verified_on(first, {**report(), "date": "2027-03-04"})
    assert again == first.replace("2027-01-02", "2027-03-04")
    other = gpu_day.verified_on(first, report(device="NVIDIA B200", transformer_engine="2.9"))
    assert other.count("| NVIDIA H200, Python 3.12: [2 GPU tests]") == other.count("| NVIDIA B200, Python 3.12: ") == 1
    assert "| Transformer Engine 2.9, NVIDIA B200, Python 3.12: 1 tests |" in other and "none yet" not in other
    assert gpu_day.verified_on((ROOT / "README.md").read_text(), report()).count("none yet") == 1


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"machine": MACHINE | {"pretended": True}}, {}, "no GPU ran this"),
        ({"machine": None}, {}, "no GPU ran this"),
        ({}, {"quick": True}, "that takes all parts and sizes"),
        ({}, {"only": ["tier"]}, "that takes all parts and sizes"),
        ({"parts": {"tier": {"status": "failed"}}}, {}, "the GPU tier has not passed"),
    ],
)
def test_a_row_is_not_claimed_for_less(
    changes: dict[str, Any],
    options: dict[str, Any],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    all_of_it = {"quick": False, "only": None}
    monkeypatch.setattr(gpu_day, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(TABLE)
    (tmp_path / "gpu-report").mkdir()
    place = gpu_day.Report(tmp_path / "gpu-report")
    place.update(**report())
    gpu_day.fill_readme(place, argparse.Namespace(**all_of_it))
    filled = (tmp_path / "README.md").read_text()
    assert "NVIDIA H200" in filled and "README" not in capsys.readouterr().out
    place.update(**changes)
    (tmp_path / "README.md").write_text(TABLE)
    gpu_day.fill_readme(place, argparse.Namespace(**(all_of_it | options)))
    assert (tmp_path / "README.md").read_text() == TABLE and says in capsys.readouterr().out


def test_the_page_names_arms_that_failed_and_compares_memory(tmp_path: Path) -> None:
    memory = {"memory": {"peak": 8 << 30}, "memory_predicted": {"peak": 10 << 30}}
    speed = {"seconds": {"minimum": 0.4, "median": 0.5}, "tokens_per_second": 65536.0, "tflops": 123.4, "mfu": 0.125}
    arms = {"coe-2_4-64": speed | memory, "moe_8-64": {"error": "out of | memory"}, "moe_8-8": {"left_out": "no time"}}
    found = report()
    found["parts"]["arms"] = {"status": "failed", "seconds": 9.0, "error": "1 arms failed: moe_8-64", "results": arms}
    gpu_page.write(found, tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| coe-2_4-64 | 500 ms | 65,536 | 123 | 12.5% | 10.00 GiB | 8.00 GiB | +25.0% |" in page
    assert "- `moe_8-64`: out of | memory" in page and "- `moe_8-8`: no time" in page
    for name in re.findall(r"!\[\w+\]\((\w+\.png)\)", page):
        assert (tmp_path / name).stat().st_size > 5000
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "throughput.png", "memory.png"}


@pytest.mark.run
def test_steps_with_megatrons_layers_and_ours_are_timed_and_their_memory_is_freed(
    single_rank: None, tmp_path: Path
) -> None:
    from gpu_parts import QUICK
    from step_times import time_steps

    config = load("configs/paper/moe_8-64.yaml", [*QUICK, "training.precision=fp32", "moe.num_experts=16"], 1)
    before = _alive()  # of other tests
    stock = time_steps(config, 1, "local")
    ours = time_steps(config, 1, profiled=True, weights=tmp_path / "weights")
    again = time_steps(config, 1, weights=tmp_path / "weights")
    assert ours["losses"] == again["losses"] != stock["losses"]
    for result in (stock, ours):
        assert (
            result["losses"][0] == pytest.approx(math.log(512), abs=0.3) and result["losses"][-1] < result["losses"][0]
        )
        assert result["tokens_per_second"] == pytest.approx(8 * 32 / result["seconds"]["median"])
    assert ours["memory"]["peak"] == pytest.approx(ours["memory_predicted"]["peak"], rel=0.1)
    times = [each["milliseconds"] for each in ours["kernels"]["heaviest"]]
    assert times == sorted(times, reverse=True) and 0 < sum(times) <= ours["kernels"]["milliseconds"]
    assert _alive() - before < ours["memory"]["peak"] / 4


def _alive() -> int:
    """Bytes of the tensors that are alive in this process."""
    gc.collect()
    alive = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in gc.get_objects() if _is_tensor(t)}
    return sum(alive.values())


def _is_tensor(found: object) -> bool:
    return type(found) in (torch.Tensor, torch.nn.Parameter)
