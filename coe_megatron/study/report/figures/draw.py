"""All figures of a study."""

from collections.abc import Iterator, Mapping, Sequence

from coe_megatron.study.plan.cost_table import Plan
from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.figures.answers import answers_by_group
from coe_megatron.study.report.figures.curves import loss_curves
from coe_megatron.study.report.figures.gains import effect, gains
from coe_megatron.study.report.figures.iterations import iterations
from coe_megatron.study.report.figures.ladder import loss_against_tokens
from coe_megatron.study.report.figures.memory import loss_against_memory, memory_by_component
from coe_megatron.study.report.figures.ranks import throughput
from coe_megatron.study.report.figures.routing import followers, loads, norms, routing_over_time
from coe_megatron.study.report.figures.scaling import scaling
from coe_megatron.study.report.figures.style import ArmStyle, StudyFigure, arm_styles
from coe_megatron.study.report.figures.tuning import tuning_curves
from coe_megatron.study.report.ladder import LadderFindings
from coe_megatron.study.report.results import Result, finished_results
from coe_megatron.study.report.throughput import over_ranks

MAX_ARMS = 32  # in a figure; with a thousand it would be unreadable, and larger than a PNG can be


def draw(
    plan: Plan, results: Sequence[Result], summaries: Sequence[Summary], ladder: LadderFindings | None = None
) -> Iterator[StudyFigure]:
    """Yield all figures that the finished runs allow, of the arms in `arms_shown`."""
    styles, names = arm_styles(summaries), arms_shown(summaries)
    summaries = [summary for summary in summaries if summary.arm.arm.name in names]
    if curves := [curve for curve in plan.tuning if curve.arm in names and any(curve.losses)]:
        yield tuning_curves(curves, styles)
    if ladder and ladder.law:
        yield loss_against_tokens(summaries, ladder.law, ladder.registered)
    finished = [result for result in finished_results(results) if result.run.arm in names]
    if not finished:
        return
    yield loss_curves(finished, summaries, styles)
    if any(summary.gain is not None for summary in summaries):
        yield gains(summaries, styles)
    yield from _axes(plan, summaries)
    if scaled := over_ranks(summaries, finished):
        yield throughput(scaled)
    yield loss_against_memory(summaries, finished, styles)
    yield memory_by_component(finished, styles)
    yield from filter(None, (answers_by_group(finished, styles), iterations(finished, styles)))
    yield from _routing(finished, styles)


def _axes(plan: Plan, summaries: Sequence[Summary]) -> Iterator[StudyFigure]:
    """For every axis that the arms vary its numbers, or its labels' gains unless they are the figure of gains."""
    settings = plan.study.settings
    budget, tune = settings.budget, settings.tune
    consequences = {*([budget.solve] if budget else []), *([tune.setting] if tune else [])}
    axes = list(summaries[0].arm.arm.labels)
    varied = [axis for axis in axes if len({each.arm.arm.labels[axis] for each in summaries}) > 1]
    seen: set[str] = set()
    for axis in varied:
        found = list(scaling(summaries, axis, consequences, seen))
        seen |= {each.name for each in found}
        yield from found
        if len(varied) > 1 and not found and (figure := effect(axis, summaries, 1 + axes.index(axis))):
            yield figure


def _routing(finished: Sequence[Result], styles: Mapping[str, ArmStyle]) -> Iterator[StudyFigure]:
    yield routing_over_time(finished, styles)
    yield from loads(finished, styles)
    yield norms(finished, styles)
    yield from followers(finished, styles)


def arms_shown(summaries: Sequence[Summary]) -> set[str]:
    """Names of the arms in the figures.

    Of arms whose settings have become the same, such as by tuning, it has the first. If there are too many arms, it has
    the baselines, and those with the lowest loss.
    """
    different: dict[str, Summary] = {}
    for summary in sorted(summaries, key=lambda each: not each.is_baseline):
        different.setdefault(summary.arm.arm.fingerprint, summary)
    best = sorted(different.values(), key=lambda each: (not each.is_baseline, each.mean is None, each.mean))
    return {summary.arm.arm.name for summary in best[:MAX_ARMS]}
