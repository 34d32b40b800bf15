"""Chooses the nodes of a job that a run uses, if some are bad and some are spare. Without torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from coe_megatron.errors import ConfigError
from coe_megatron.files import read_limited
from coe_megatron.parsing import JSON_BYTES, parse_json


def bad_nodes(report: Path) -> dict[str, str] | None:
    """The bad nodes in a report of launch/check_nodes.py, with reasons; None if there is no valid report."""
    try:
        return bad_in(read_limited(report, "--report", JSON_BYTES))
    except ConfigError:
        return None


def bad_in(report: bytes | str) -> dict[str, str] | None:
    """The bad nodes in the text of a report; None if it is invalid."""
    try:
        found = parse_json(report)["bad"]
        return {str(node): str(reason) for node, reason in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def choose(nodes: Sequence[str], bad: Mapping[str, str], count: int) -> list[str]:
    """The first `count` good nodes, in their order; fewer if there are not enough."""
    return [node for node in nodes if node not in bad][:count]
