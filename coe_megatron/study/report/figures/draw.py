"""All figures of a study."""

from collections.abc import Iterator, Sequence

from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.figures.curves import gains, loss_curves
from coe_megatron.study.report.figures.memory import loss_against_memory, memory, memory_by_component
from coe_megatron.study.report.figures.routing import expert_pairs, followers, loads, norms, routing_over_time
from coe_megatron.study.report.figures.scaling import scaling
from coe_megatron.study.report.figures.style import StudyFigure, arm_styles
from coe_megatron.study.report.results import Result, finished_results

MAX_ARMS = 32  # in a figure; with a thousand it would be unreadable, and larger than a PNG can be


def draw(results: Sequence[Result], summaries: Sequence[Summary], baseline: str) -> Iterator[StudyFigure]:
    """Yield all figures that the finished runs allow, of the arms in `arms_shown`."""
    styles, names = arm_styles(summaries), arms_shown(summaries, baseline)
    summaries = [summary for summary in summaries if summary.arm.arm.name in names]
    finished = [result for result in finished_results(results) if result.run.arm in names]
    if not finished:
        return
    yield loss_curves(finished, styles)
    if any(summary.gain is not None for summary in summaries):
        yield gains(summaries, styles, baseline)
    yield loss_against_memory(summaries, finished, styles)
    yield from scaling(summaries, styles)
    yield memory(finished, styles)
    yield memory_by_component(finished, styles)
    yield routing_over_time(finished, styles)
    yield loads(finished, styles)
    yield norms(finished, styles)
    if chained := [result for result in finished if expert_pairs(result)]:
        yield followers(chained, styles)


def arms_shown(summaries: Sequence[Summary], baseline: str) -> set[str]:
    """Names of the arms in the figures: the baseline, and if there are too many arms, those with the lowest loss."""
    best = sorted(summaries, key=lambda each: (each.arm.arm.name != baseline, each.mean is None, each.mean))
    return {summary.arm.arm.name for summary in best[:MAX_ARMS]}
