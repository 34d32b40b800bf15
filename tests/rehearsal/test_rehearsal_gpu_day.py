"""`make gpu` on a pretended CUDA device: every part has numbers, the page is there, and the README is left alone."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT
from rehearse import SKIP, rehearse

pytestmark = [pytest.mark.rehearsal, pytest.mark.run, pytest.mark.slow, pytest.mark.timeout(900), SKIP]
WITHOUT_TE = {"layers_te", "steps_te"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output, readme = tmp_path_factory.mktemp("gpu") / "report", (ROOT / "README.md").read_text()
    arguments = ("--quick", "--output", output, "--seconds", 850)
    status, out = rehearse("benchmarks/gpu_day.py", *arguments, seconds=880)
    assert status == 0, out
    assert "README.md gets no row: no GPU ran this" in out and (ROOT / "README.md").read_text() == readme
    return output


@pytest.fixture(scope="module")
def parts(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "report.json").read_text())
    assert report["quick"] and report["machine"]["pretended"]
    return report["parts"]


def numbers(found: Any) -> list[float]:
    """All numbers in a part's results."""
    if isinstance(found, dict | list):
        return [number for each in (found.values() if isinstance(found, dict) else found) for number in numbers(each)]
    return [found] if isinstance(found, int | float) else []


def test_every_part_is_done_with_numbers(parts: dict[str, Any]) -> None:
    assert {part for part, each in parts.items() if each["status"] == "skipped"} == WITHOUT_TE
    for part in parts.keys() - WITHOUT_TE - {"tier"}:
        found = numbers(parts[part]["results"])
        assert parts[part]["status"] == "done" and found and all(map(math.isfinite, found)), part
    skipped = parts["tier"]["results"]["skipped"]
    assert len(parts["tier"]["results"]["passed"]) > 50
    assert skipped and all("transformer_engine" in name for name in skipped)


def test_layers_and_steps_have_ratios(parts: dict[str, Any]) -> None:
    for each in parts["layers"]["results"]:
        assert each["speed_up"]["median"] > 0 and each["outputs_difference"] < 0.03
    found = parts["steps"]["results"]
    assert list(found) == ["stock", "ours", "coe"]
    assert len({each["seconds"]["median"] for each in found.values()}) == 3


def test_arms_are_all_of_the_papers(parts: dict[str, Any]) -> None:
    found = parts["arms"]["results"]
    assert {*found, "base"} == {path.stem for path in (ROOT / "configs" / "paper").glob("*.yaml")}
    for each in found.values():
        assert each["tokens_per_second"] > 0 and each["mfu"] > 0
        assert each["memory"]["weights"] == each["memory_predicted"]["weights"]


def test_losses_are_the_cpus(parts: dict[str, Any]) -> None:
    found = parts["parity"]["results"]
    assert found["fp32"]["worst"] < 1e-5 and found["bf16"]["worst"] < 1e-3
    for each in found.values():
        assert each["cpu"][-1] < each["cpu"][0] - 0.5


def test_kernels_are_in_order(parts: dict[str, Any]) -> None:
    times = [each["milliseconds"] for each in parts["kernels"]["results"]["heaviest"]]
    assert len(times) > 10 and times == sorted(times, reverse=True)


def test_the_page_says_that_the_device_is_pretended_and_has_its_figures(folder: Path, parts: dict[str, Any]) -> None:
    page = (folder / "report.md").read_text()
    assert "The CUDA device is pretended" in page and "Small sizes" in page
    assert len(re.findall("^## ", page, re.MULTILINE)) == len(parts.keys() - WITHOUT_TE)
    figures = re.findall(r"!\[\w+\]\((\w+\.png)\)", page)
    assert figures == ["kernels.png", "throughput.png", "memory.png"]
    for name in figures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
