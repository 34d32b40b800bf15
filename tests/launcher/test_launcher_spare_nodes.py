"""Which nodes a run takes when some of the job's are bad."""

import json
from pathlib import Path

import pytest
from programs import python

from coe_megatron.slurm.spare_nodes import bad_nodes, choose

NODES = ["n1", "n2", "n3", "n4"]


def test_bad_nodes_give_way_to_spare_ones() -> None:
    assert choose(NODES, {}, 3) == ["n1", "n2", "n3"]
    assert choose(NODES, {"n2": "slow"}, 3) == ["n1", "n3", "n4"]
    assert choose(NODES, {"n1": "slow", "n4": "full"}, 3) == ["n2", "n3"]


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"bad": []}'])
def test_without_a_report_no_node_is_bad(text: str | None, tmp_path: Path) -> None:
    report = tmp_path / "nodes.json"
    if text is not None:
        report.write_text(text)
    assert bad_nodes(report) is None
    done = python("-m", "coe_megatron.cli.slurm_job", "nodes", "--report", report, "--count", 1, *NODES)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"the node check wrote no report; its output is in {tmp_path / 'nodes.log'}\n"


@pytest.mark.parametrize(
    ("count", "status", "chosen", "last"),
    [(2, 0, "n1\nn4\n", "excluded"), (3, 1, "n2\nn3\n", "2 of 4 nodes are good, but 3 are needed")],
)
def test_the_program_names_bad_nodes(count: int, status: int, chosen: str, last: str, tmp_path: Path) -> None:
    """It prints the nodes to take, or, where there are too few, the nodes to avoid."""
    report = tmp_path / "it's a report.json"
    report.write_text(json.dumps({"bad": {"n2": "disk is full", "n3": "talks\nslowly"}}))
    done = python("-m", "coe_megatron.cli.slurm_job", "nodes", "--report", report, "--count", count, *NODES)
    assert (done.returncode, done.stdout) == (status, chosen)
    assert done.stderr.startswith("node n2 is bad: disk is full\nnode n3 is bad: talks\\nslowly\n")
    assert last in done.stderr.splitlines()[-1]
