"""How loss depends on parameters, FLOPs and recurrence, over the arms of a study: a line in logarithms.

    log loss = b + b_P log parameters + b_F log FLOPs + b_C log C

by least squares. A coefficient of -0.05 means that twice as much takes 3.4 % off the loss. It describes the arms that
were run; it is no law beyond them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from coe_megatron.study.results import Result, done

_CONFIDENCE = 0.95


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
        left_out: quantities that are the same in all arms, or follow from the others.
        residual: standard deviation of the logarithms that the line leaves.
        points: runs it was fitted to.
    """

    coefficients: list[Coefficient]
    left_out: list[str]
    residual: float
    points: int


def fit(results: Sequence[Result]) -> Fit | None:
    """The line through all finished runs; None where they are of no more arms than it has coefficients.

    The interval takes runs as independent, which seeds of one arm are and repeated arms are not.
    """
    finished = done(results)
    columns = {
        "parameters": [math.log(result.arm.parameters) for result in finished],
        "FLOPs": [math.log(result.arm.flops) for result in finished],
        "C": [math.log(result.run.config.chain.iterations) for result in finished],
    }
    design, used, left_out = np.ones((len(finished), 1)), list[str](), list[str]()
    for name, column in columns.items():
        wider = np.column_stack([design, column])
        if finished and np.linalg.matrix_rank(wider, tol=1e-6) > design.shape[1]:
            design, used = wider, [*used, name]
        else:
            left_out.append(name)
    free = len(finished) - design.shape[1]
    if not used or len(np.unique(design, axis=0)) <= design.shape[1]:  # seeds alone are no points of a line
        return None
    losses = np.log([result.loss for result in finished])
    found, *_ = np.linalg.lstsq(design, losses, rcond=None)
    variance = float(((losses - design @ found) ** 2).sum()) / free
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    reach = stats.t.ppf((1 + _CONFIDENCE) / 2, free) * errors
    coefficients = [
        Coefficient(name, float(value), (float(value - width), float(value + width)))
        for name, value, width in zip(used, found[1:], reach[1:], strict=True)
    ]
    return Fit(coefficients, left_out, math.sqrt(variance), len(finished))
