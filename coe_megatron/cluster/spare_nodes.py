"""Which of a job's nodes a run takes, when some are bad and some are spare. Without torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def bad_nodes(report: Path, nodes: Sequence[str]) -> dict[str, str]:
    """What launch/check_nodes.py has found, by node; without a report the first node is bad, which writes it."""
    try:
        found = json.loads(report.read_text())["bad"]
    except (OSError, ValueError, TypeError, KeyError):
        return {nodes[0]: f"it has written no report of the check, whose own words are in {report.with_suffix('.log')}"}
    return {str(node): str(reason) for node, reason in found.items()}


def choose(nodes: Sequence[str], bad: Mapping[str, str], count: int) -> list[str]:
    """The first `count` good nodes, in their order; fewer where there are not as many."""
    return [node for node in nodes if node not in bad][:count]
