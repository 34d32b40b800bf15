"""The ladder in the report: the law, and the registered prediction beside what was measured. All plain text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from coe_megatron.errors import ConfigError
from coe_megatron.study.plan.cost_table import Plan
from coe_megatron.study.plan.law import Law
from coe_megatron.study.plan.registration import Registration, ladder_runs, prediction_errors, read_registration
from coe_megatron.study.report.comparison import Summary

Table = tuple[list[str], list[list[str]]]

LAW = (
    "L = E + A (N1 + C^phi N2)^-alpha + B D^-beta, with N1 the parameters that a token uses outside the iterated part, "
    "N2 those in one iteration, C the iterations and D the tokens."
)


@dataclass(frozen=True)
class LadderFindings:
    """What a report has of a ladder.

    Attributes:
        registered: the registration, if there is one.
        law: the registered law, otherwise that of the finished runs; None if it cannot be fitted.
        said: what the law was fitted to and cannot tell, or why there is none.
        parameters: a table of the law's parameters; None without a law.
    """

    registered: Registration | None
    law: Law | None
    said: str
    parameters: Table | None


def find(plan: Plan) -> LadderFindings | None:
    """Read the registration or fit the law; None without a ladder, or if it tests its rule with several learning rates.

    Raises:
        ConfigError: the study is not the one that was registered; one line.
    """
    ladder, registered = plan.study.settings.ladder, read_registration(plan.study)
    if ladder is None or len(ladder.rate_factors) > 1:
        return None
    if registered is not None:
        law = Law(**{name: value for name, (value, _, _) in registered.law.items()})
        said = _text(len(registered.inputs), registered.warnings)
        return LadderFindings(registered, law, said, _parameters(registered.law))
    try:
        fit = ladder_runs(plan.study).fit()
    except ConfigError as error:
        return LadderFindings(None, None, f"{LAW} It is not fitted: {error}.", None)
    values = {name: (value, *fit.intervals[name]) for name, value in asdict(fit.law).items()}
    return LadderFindings(None, fit.law, _text(fit.points, fit.warnings), _parameters(values))


def prediction_table(plan: Plan, registered: Registration, summaries: Sequence[Summary]) -> Table:
    """The registered predictions, and the measured losses."""
    losses = {summary.arm.arm.name: list(summary.losses.values()) for summary in summaries}
    errors, rows = prediction_errors(registered, losses), []
    for arm, each in registered.predictions.items():
        low, high = each.interval
        row = [plan.study.arm(arm).title, f"{each.loss:.4f}", f"{low:.4f} to {high:.4f}"]
        if (error := errors[arm]) is None:
            rows.append([*row, "-", "-", "-"])
            continue
        measured = sum(losses[arm]) / len(losses[arm])
        rows.append([*row, f"{measured:.4f}", f"{error:+.2%}", "yes" if low <= measured <= high else "no"])
    return ["arm", "predicted", "95 % interval", "measured", "error", "within"], rows


def _text(points: int, warnings: Sequence[str]) -> str:
    said = " ".join(f"{warning[0].upper()}{warning[1:]}." for warning in warnings)
    return f"{LAW} It was fitted to {points} runs of the smaller widths; intervals are from a bootstrap. {said}".strip()


def _parameters(law: dict[str, tuple[float, float, float]]) -> Table:
    rows = [[name, f"{value:.4g}", f"{low:.4g} to {high:.4g}"] for name, (value, low, high) in law.items()]
    return ["parameter", "value", "95 % interval"], rows
