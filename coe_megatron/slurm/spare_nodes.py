"""Which of a job's nodes a run takes, when some are bad and some are spare. Without torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from coe_megatron.errors import ConfigError
from coe_megatron.files import read_limited
from coe_megatron.parsing import JSON_BYTES, parse_json


def bad_nodes(report: Path) -> dict[str, str] | None:
    """What launch/check_nodes.py has found: the reason by node; None where it has left no report."""
    try:
        return bad_in(read_limited(report, "--report", JSON_BYTES))
    except ConfigError:
        return None


def bad_in(report: bytes | str) -> dict[str, str] | None:
    """The same of a report's own text; None where it is none."""
    try:
        found = parse_json(report)["bad"]
        return {str(node): str(reason) for node, reason in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def choose(nodes: Sequence[str], bad: Mapping[str, str], count: int) -> list[str]:
    """The first `count` good nodes, in their order; fewer where there are not as many."""
    return [node for node in nodes if node not in bad][:count]
