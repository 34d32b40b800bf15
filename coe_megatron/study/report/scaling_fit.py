"""Fit how loss depends on parameters, FLOPs and recurrence over the arms of a study, by least squares:

    log loss = b + b_P log parameters + b_F log FLOPs + b_C log C

An exponent of -0.05 means that doubling the quantity reduces the loss by 3.4 %. The fit describes the arms of the study
and does not extrapolate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from coe_megatron.study.plan.cost_table import ArmPlan
from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.statistics import LEVEL

_MIN_RANGE = 0.05  # of a quantity's logarithm, after regression on the other quantities, for a meaningful exponent


@dataclass(frozen=True)
class Coefficient:
    """The exponent of one quantity, with its 95 % confidence interval."""

    of: str
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """The result of the fit.

    Attributes:
        excluded: quantities that are nearly constant, or nearly a function of those before them.
        residual: standard deviation of the residuals of log loss.
        points: number of arms.
    """

    coefficients: list[Coefficient]
    excluded: list[str]
    residual: float
    points: int


def fit(summaries: Sequence[Summary]) -> Fit | None:
    """Fit the arms that have finished runs; None if there are too few different points.

    Each arm is one point, the mean over its seeds. Seeds are not separate points: what the fit does not model is
    the same for all seeds of an arm, so the interval would be too narrow.
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
    reach = stats.t.ppf(1 - LEVEL / 2, free) * errors
    coefficients = [
        Coefficient(name, float(value), (float(value - width), float(value + width)))
        for name, value, width in zip(used, found[1:], reach[1:], strict=True)
    ]
    return Fit(coefficients, excluded, math.sqrt(variance), len(known))


def _logarithms(plan: ArmPlan) -> Mapping[str, float]:
    amounts = {"parameters": plan.parameters, "FLOPs": plan.flops, "C": plan.arm.config.chain.iterations}
    return {name: math.log(amount) for name, amount in amounts.items()}


def _design(points: Sequence[Mapping[str, float]]) -> tuple[np.ndarray, list[str], list[str]]:
    """The design matrix: ones, and each quantity that those before do not explain; names of used and excluded ones."""
    design, used, excluded = np.ones((len(points), 1)), list[str](), list[str]()
    for name in points[0] if points else ():
        column = np.array([point[name] for point in points])
        explained, *_ = np.linalg.lstsq(design, column, rcond=None)
        if np.ptp(column - design @ explained) > _MIN_RANGE:
            design, used = np.column_stack([design, column]), [*used, name]
        else:
            excluded.append(name)
    return design, used, excluded
