"""benchmarks/bench_dispatch.py: two hosts, few steps."""

import json
from pathlib import Path

import pytest
from programs import python

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(600)]
MICRO_BATCHES, LAYERS, ITERATIONS = 2, 2, 2


def test_variants_take_turns_over_slow_cables_and_their_collectives_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    variants = ("--variant", "moe.dispatcher=alltoall", "--variant", "moe.dispatcher=allgather zero.stage=1")
    short = ("--rounds", 2, "--steps", 2, "--delay-ms", 5, "--json", file)
    done = python("benchmarks/bench_dispatch.py", *variants, *short, seconds=300, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stderr and "Traceback" not in done.stderr
    first, second = json.loads(file.read_text())["variants"]
    assert first["ratio"] == {"minimum": 1, "median": 1} and first["loss_difference"] == 0
    assert second["ratio"]["minimum"] == second["minimum"] / first["minimum"]
    assert second["loss_difference"] < 1e-5  # another order of sums
    forward = [call for call in first["step"] if call["purpose"] in ("rows per rank", "dispatch", "combine")]
    assert len(forward) == 4 * MICRO_BATCHES * LAYERS * ITERATIONS
    for variant in (first, second):
        assert variant["minimum"] > 0.005 * sum(call["waits"] for call in variant["step"])  # each is one way at least
        assert variant["sent_by_host"] > 0.5 * sum(call["sent"] for call in variant["step"])
        assert {call["kind"] for call in variant["step"]} <= {
            "all-reduce",
            "all-gather",
            "all-to-all",
            "reduce-scatter",
        }
    assert "when logged: routing statistics" in done.stdout


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    folder = ("--config", tmp_path / "small.yaml", f"data.path={tmp_path / 'none'}")
    (tmp_path / "small.yaml").write_text("training: {global_batch: 16, micro_batch: 4}\n")
    done = python("benchmarks/bench_dispatch.py", *folder, seconds=120, fresh=True)
    assert done.returncode == 1
    assert "is not prepared data" in done.stderr and done.stderr.endswith("error: a rank failed\n")
