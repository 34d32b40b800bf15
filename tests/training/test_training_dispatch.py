"""A run on two ranks whose dispatch is `auto`: it takes what the dry run has said."""

import json
from pathlib import Path
from typing import Any

import pytest
from programs import losses, python, torchrun

from coe_megatron.config import load

pytestmark = [pytest.mark.run, pytest.mark.timeout(600)]
AUTO = ("moe.dispatcher=auto", "moe.overlap_chunks=auto", "parallel.ranks_per_node=1", "training.micro_batch=8")


def write_report(path: Path, gigabytes_per_second: float) -> None:
    """That of a node check of two nodes without latency."""
    nodes = {name: {"devices": ["cpu, 2 cores"]} for name in ("a", "b")}
    path.write_text(
        json.dumps({"nodes": nodes, "bad": {}, "all_nodes": {"all_to_all": gigabytes_per_second, "latency": 0}})
    )


def dry_run(*arguments: object) -> tuple[Any, Any]:
    done = python("launch/pretrain_coe.py", *arguments, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)["dispatch"]["taken"]
    return taken["dispatcher"], taken["chunks"]


def test_ranks_take_what_the_dry_run_says_and_go_on_with_another_report(
    config: Path, prepared: Path, tmp_path: Path
) -> None:
    report, folder = tmp_path / "check.json", tmp_path / "run"
    arguments = (config, f"data.path={prepared}", f"output={folder}", f"parallel.network={report}", *AUTO)
    for steps, speed, expected in ((2, 0.01, ("deduplicated", 2)), (4, 1.0, ("alltoall", 1))):
        write_report(report, speed)
        assert dry_run(*arguments) == expected
        done = torchrun("launch/pretrain_coe.py", *arguments, f"training.steps={steps}")
        assert done.returncode == 0, done.stderr
        recorded = load(folder / "config.yaml").moe
        assert (recorded.dispatcher, recorded.overlap_chunks) == expected
    plain = torchrun(
        "launch/pretrain_coe.py", *arguments[:2], *AUTO[2:], "training.steps=4", f"output={tmp_path / 'p'}"
    )
    assert plain.returncode == 0, plain.stderr
    assert losses(folder) == pytest.approx(losses(tmp_path / "p"), abs=1e-4)
