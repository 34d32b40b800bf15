"""How loss depends on parameters, FLOPs and recurrence, over the arms of a study: a line in logarithms.

    log loss = b + b_P log parameters + b_F log FLOPs + b_C log C

by least squares. A coefficient of -0.05 means that twice as much takes 3.4 % off the loss. It describes the arms that
were run; it is no law beyond them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from coe_megatron.study.plan.cost_table import ArmPlan
from coe_megatron.study.report.comparison import Summary

_CONFIDENCE = 0.95
_VARIES = (
    0.05  # what the other quantities leave of one's logarithm must range further, for an exponent to mean anything
)


@dataclass(frozen=True)
class Coefficient:
    """Of the logarithm of one quantity, with its interval of 95 % confidence."""

    of: str
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        excluded: quantities that are nearly the same in all arms, or nearly follow from those before them.
        residual: standard deviation of the logarithms that the line leaves.
        points: arms it was fitted to.
    """

    coefficients: list[Coefficient]
    excluded: list[str]
    residual: float
    points: int


def fit(summaries: Sequence[Summary]) -> Fit | None:
    """The line through the arms that have finished runs; None where they are at too few points for one.

    An arm is one point, the mean of its seeds. Its seeds are no points of their own: what the line does not know of an
    arm, all of them have, and the interval would come out too narrow.
    """
    known = [summary for summary in summaries if summary.mean is not None]
    design, used, excluded = _design([_logarithms(summary.arm) for summary in known])
    free = len(known) - design.shape[1]
    if not used or len(np.unique(design, axis=0)) <= design.shape[1]:
        return None
    losses = np.log([summary.mean or math.nan for summary in known])
    found, *_ = np.linalg.lstsq(design, losses, rcond=None)
    variance = float(((losses - design @ found) ** 2).sum()) / free
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    reach = stats.t.ppf((1 + _CONFIDENCE) / 2, free) * errors
    coefficients = [
        Coefficient(name, float(value), (float(value - width), float(value + width)))
        for name, value, width in zip(used, found[1:], reach[1:], strict=True)
    ]
    return Fit(coefficients, excluded, math.sqrt(variance), len(known))


def _logarithms(plan: ArmPlan) -> Mapping[str, float]:
    amounts = {"parameters": plan.parameters, "FLOPs": plan.flops, "C": plan.arm.config.chain.iterations}
    return {name: math.log(amount) for name, amount in amounts.items()}


def _design(points: Sequence[Mapping[str, float]]) -> tuple[np.ndarray, list[str], list[str]]:
    """A column of ones and one of each quantity that can be told from those before it; their names, the others'."""
    design, used, excluded = np.ones((len(points), 1)), list[str](), list[str]()
    for name in points[0] if points else ():
        column = np.array([point[name] for point in points])
        explained, *_ = np.linalg.lstsq(design, column, rcond=None)
        if np.ptp(column - design @ explained) > _VARIES:
            design, used = np.column_stack([design, column]), [*used, name]
        else:
            excluded.append(name)
    return design, used, excluded
