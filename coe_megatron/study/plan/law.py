"""The scaling law of a ladder, with its floor, and what it predicts for runs that have not run:

    L = E + A (N1 + C^phi N2)^-alpha + B D^-beta

L: final validation loss in nats per token. N1: parameters that a token uses outside the iterated part, without
embeddings. N2: parameters that it uses in one iteration. C: iterations. D: tokens. phi is what an iteration is worth: 0
nothing, 1 as much as so many parameters of their own. The form in N and D is Hoffmann et al.'s (arXiv 2203.15556,
eq. 10), C^phi the iso-depth law's (2604.21106). As in the former, the fit minimises a Huber loss of the residuals of
log L, from many starting points.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from coe_megatron.errors import ConfigError

_HUBER = 1e-3  # residual of log L from which on the loss is linear, as in 2203.15556
_CONFIDENCE = 0.95
_NAMES = ("E", "A", "alpha", "B", "beta", "phi")
_EXPONENTS = (0.02, 2.0)  # bounds of alpha and beta
_PHI = (-2.0, 3.0)  # bounds of phi
_COLLINEAR = 0.95  # correlation of log N and log D above which the fit warns
_WIDE = 0.5  # width of an exponent's interval above which the fit warns

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """A run: its sizes as in the law's equation, and its loss (nan if it is only to be predicted)."""

    outside: float
    inside: float
    iterations: int
    tokens: float
    loss: float = math.nan


@dataclass(frozen=True)
class Law:
    """The law's parameters, named as in the equation."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    phi: float

    def loss(self, point: Point) -> float:
        """The loss at a point in nats per token."""
        size = point.outside + point.iterations**self.phi * point.inside
        return self.E + self.A * size**-self.alpha + self.B * point.tokens**-self.beta


@dataclass(frozen=True)
class LawFit:
    """A fitted law.

    Attributes:
        intervals: 95 % bootstrap interval of each parameter, by its name in `Law`.
        replicates: the laws of the bootstrap.
        residuals: residuals of log loss, scaled up for the degrees of freedom that the fit has used.
        points: number of runs.
        warnings: what these runs cannot tell, one line each.
    """

    law: Law
    intervals: dict[str, tuple[float, float]]
    replicates: list[Law]
    residuals: list[float]
    points: int
    warnings: list[str]

    def predict(self, point: Point) -> tuple[float, tuple[float, float]]:
        """The loss of a new run, and the 95 % interval in which it is expected: of the fit and of the run's noise."""
        noise = np.random.default_rng(0).choice(self.residuals, len(self.replicates))
        drawn = np.array([law.loss(point) for law in self.replicates]) * np.exp(noise)
        return self.law.loss(point), _interval(drawn)


def fit_law(points: Sequence[Point], replicates: int = 200, seed: int = 0) -> LawFit:
    """Fit the law; intervals are from a bootstrap that resamples the residuals of the runs.

    Raises:
        ConfigError: the runs are too few, or all of one size or of one number of tokens; one line.
    """
    data = _Data.of(points)
    found = min((data.solve(start, data.losses) for start in data.starts()), key=lambda each: each[1])[0]
    predicted = data.log_loss(found)
    residuals = (data.losses - predicted) * math.sqrt(len(points) / (len(points) - data.free))
    source = np.random.default_rng(seed)
    drawn = [
        data.law(data.solve(found, predicted + source.choice(residuals, len(points)))[0]) for _ in range(replicates)
    ]
    columns = {name: np.array([getattr(law, name) for law in drawn]) for name in _NAMES}
    intervals = {name: _interval(column) for name, column in columns.items()}
    return LawFit(data.law(found), intervals, drawn, residuals.tolist(), len(points), data.warnings(intervals))


@dataclass(frozen=True)
class _Data:
    """Runs as arrays, with sizes relative to their geometric means, so that the parameters are of similar scale.

    A solution is (log E, log A', alpha, log B', beta, phi), where A' and B' belong to the relative sizes.
    """

    outside: Numbers
    inside: Numbers
    iterations: Numbers
    tokens: Numbers
    losses: Numbers  # log
    unit_size: float
    unit_tokens: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> "_Data":
        columns = np.array([[each.outside, each.inside, each.iterations, each.tokens, each.loss] for each in points])
        outside, inside, iterations, tokens, losses = columns.T if len(points) else np.zeros((5, 0))
        free = 5 + (len(set(iterations)) > 1)
        if len(points) <= free:
            raise ConfigError(f"the ladder has {len(points)} finished runs: its law needs at least {free + 1}")
        for name, column in (("one size", outside + inside), ("one number of tokens", tokens)):
            if len(set(column)) == 1:
                raise ConfigError(f"all finished runs of the ladder have {name}: its law needs at least two")
        unit_size = float(np.exp(np.log(outside + inside).mean()))
        unit_tokens = float(np.exp(np.log(tokens).mean()))
        return cls(
            outside / unit_size, inside / unit_size, iterations, tokens / unit_tokens, np.log(losses), unit_size,
            unit_tokens,
        )  # fmt: skip

    @property
    def has_phi(self) -> bool:
        """Whether C varies, without which phi has no effect."""
        return len(set(self.iterations)) > 1

    @property
    def free(self) -> int:
        """Number of free parameters."""
        return 5 + self.has_phi

    def terms(self, solution: Numbers) -> Numbers:
        """Logarithms of the law's three terms, [3, runs]."""
        floor, size, alpha, data, beta, phi = solution
        effective = self.outside + self.iterations**phi * self.inside
        rows = [np.full_like(self.tokens, floor), size - alpha * np.log(effective), data - beta * np.log(self.tokens)]
        return np.stack(rows)

    def log_loss(self, solution: Numbers) -> Numbers:
        """Logarithm of the law, [runs]."""
        return np.asarray(np.logaddexp.reduce(self.terms(solution), axis=0))

    def gradient(self, solution: Numbers) -> Numbers:
        """Derivatives of `log_loss` by the free parameters, [runs, free]."""
        alpha, phi = solution[2], solution[5]
        of_floor, of_size, of_data = np.exp(self.terms(solution) - self.log_loss(solution))  # each term's share
        inside = self.iterations**phi * self.inside
        effective = self.outside + inside
        columns = [of_floor, of_size, -of_size * np.log(effective), of_data, -of_data * np.log(self.tokens)]
        columns.append(-of_size * alpha * np.log(self.iterations) * inside / effective)
        return np.stack(columns[: self.free], axis=1)

    def starts(self) -> list[Numbers]:
        lowest, middle = math.exp(self.losses.min()), math.exp(float(np.median(self.losses)))
        found = []
        for share, alpha, beta, phi in itertools.product(
            (0.4, 0.8), (0.15, 0.5), (0.15, 0.5), (0.0, 1.0) if self.has_phi else (0.0,)
        ):
            rest = math.log((middle - share * lowest) / 2)
            found.append(np.array([math.log(share * lowest), rest, alpha, rest, beta, phi]))
        return found

    def solve(self, start: Numbers, losses: Numbers) -> tuple[Numbers, float]:
        """The solution nearest to a start for given log losses, and its cost."""
        low = np.array([-12.0, -12.0, _EXPONENTS[0], -12.0, _EXPONENTS[0], _PHI[0]])
        high = np.array([float(losses.min()), 6.0, _EXPONENTS[1], 6.0, _EXPONENTS[1], _PHI[1]])
        used = slice(0, self.free)
        inner = np.clip(start[used], low[used] + 1e-6, high[used] - 1e-6)

        def whole(values: Numbers) -> Numbers:
            return np.concatenate([values, start[self.free :]])

        result = optimize.least_squares(
            lambda values: self.log_loss(whole(values)) - losses,
            inner,
            jac=lambda values: self.gradient(whole(values)),
            bounds=(low[used], high[used]),
            loss="huber",
            f_scale=_HUBER,
            x_scale="jac",
            max_nfev=300,
        )
        return whole(result.x), float(result.cost)

    def law(self, solution: Numbers) -> Law:
        floor, size, alpha, data, beta, phi = map(float, solution)
        return Law(
            E=math.exp(floor),
            A=math.exp(size + alpha * math.log(self.unit_size)),
            alpha=alpha,
            B=math.exp(data + beta * math.log(self.unit_tokens)),
            beta=beta,
            phi=phi,
        )

    def warnings(self, intervals: dict[str, tuple[float, float]]) -> list[str]:
        said = []
        if not self.has_phi:
            said.append(f"phi is not identified: all runs have C = {int(self.iterations[0])}")
        correlation = float(np.corrcoef(np.log(self.outside + self.inside), np.log(self.tokens))[0, 1])
        if abs(correlation) > _COLLINEAR:
            said.append(
                f"size and tokens grow together (correlation {correlation:.3f}), so alpha and beta share one effect: "
                "use several numbers of tokens per size"
            )
        for name in ("alpha", "beta", *(["phi"] if self.has_phi else [])):
            low, high = intervals[name]
            if high - low > _WIDE:
                said.append(f"{name} is poorly identified: its interval is {low:.2f} to {high:.2f}")
        low, high = intervals["E"]
        if high - low > 0.5 * math.exp(self.losses.min()):
            said.append(f"the floor E is poorly identified: its interval is {low:.2f} to {high:.2f} nats per token")
        if len(self.losses) <= 2 * self.free:
            said.append(f"{len(self.losses)} runs for {self.free} parameters: the intervals may be too narrow")
        return said


def _interval(values: Numbers) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)
