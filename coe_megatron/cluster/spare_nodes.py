"""Which of a job's nodes a run takes, when some are bad and some are spare. Without torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def bad_nodes(report: Path) -> dict[str, str] | None:
    """What launch/check_nodes.py has found: the reason by node; None where it has left no report."""
    try:
        found = json.loads(report.read_text())["bad"]
        return {str(node): str(reason) for node, reason in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def choose(nodes: Sequence[str], bad: Mapping[str, str], count: int) -> list[str]:
    """The first `count` good nodes, in their order; fewer where there are not as many."""
    return [node for node in nodes if node not in bad][:count]
