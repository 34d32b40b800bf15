"""Tables of what arms cost: parameters, FLOPs, time and memory; effective speed-up; loss at equal memory."""

from collections.abc import Mapping, Sequence

from coe_megatron.study.plan.cost_table import Plan, format_count
from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.equal_memory import EqualMemory
from coe_megatron.study.report.markdown_text import escaped, interval, number, p_value, table
from coe_megatron.study.report.results import Result
from coe_megatron.study.report.speedup import QUANTITIES, Factor, speedups
from coe_megatron.text import format_duration

_MIB = 2**20
_SCHEDULES = {
    "constant": "",
    "wsd": "Before its cooldown, the baseline's loss is higher than that of a run that ends there",
}
_DECAYED = (
    "The baseline's learning rate decays, so that its loss on the way is higher than that of a run that ends there"
)


def costs(plan: Plan, finished: Sequence[Result]) -> str:
    """Parameters, FLOPs, steps, memory and time of each arm."""
    rows = []
    for arm in plan.arms:
        runs = [result for result in finished if result.run.arm == arm.arm.name]
        if runs:
            measured = max(result.memory for result in runs)
            seconds = sum(result.seconds for result in runs) / len(runs)
            rows.append(
                [
                    escaped(arm.arm.title),
                    format_count(arm.parameters),
                    format_count(arm.flops_per_token),
                    format_count(arm.flops),
                    format_count(arm.expert_flops),
                    f"{arm.arm.config.training.steps:,}",
                    f"{arm.memory / _MIB:,.0f} / {measured / _MIB:,.0f}",
                    f"{format_duration(arm.seconds.total) if arm.seconds else '-'} / {format_duration(seconds)}",
                ]
            )
    columns = ["arm", "parameters", "FLOPs per token", "FLOPs", "expert FLOPs", "steps"]
    return table([*columns, "MiB per rank, predicted / measured", "time, predicted / in steps"], rows)


def memory_by_component(plan: Plan, memory: Mapping[str, float]) -> str:
    """Predicted peak memory of a rank by component, and the measured peak."""
    rows = []
    for arm in plan.arms:
        if measured := memory.get(arm.arm.name):
            cells = [f"{amount / _MIB:,.1f}" for amount in (*arm.components.values(), arm.memory, measured)]
            rows.append([escaped(arm.arm.title), *cells, f"{arm.memory / measured - 1:+.1%}"])
    names = [name.replace("_", " ") for name in plan.arms[0].components]
    text = (
        "Peak memory of a rank within a step in MiB: predicted from the config, by component, and measured. "
        "Gradients are allocated while activations are released, so at the peak neither need be complete. Other is "
        "what the optimizer needs for its step, and what ZeRO 3 and tensor parallelism gather."
    )
    return f"{text}\n\n{table(['arm', *names, 'total', 'measured', 'prediction error'], rows)}"


def speedup(plan: Plan, finished: Sequence[Result], at_memory: Mapping[str, EqualMemory]) -> str:
    """Effective speed-up of every arm; empty if no arm has a seed in common with its baseline."""
    by_arm: dict[str, dict[int, Result]] = {}
    for result in finished:
        by_arm.setdefault(result.run.arm, {})[result.run.seed] = result
    rows = []
    for arm in (each.arm for each in plan.arms if each.arm.baseline != each.arm.name):
        found = speedups(by_arm.get(arm.name, {}), by_arm.get(arm.baseline, {}))
        if found:
            memory = at_memory[arm.name].factor if arm.name in at_memory else None
            rows.append([escaped(arm.title), *(_factor(found[name]) for name in QUANTITIES), _factor(memory)])
    if not rows:
        return ""
    text = (
        "What the baseline needs to reach the arm's final loss, over what the arm needed: above 1, the arm is more "
        "efficient. Factors are geometric means over seeds, with 95 % confidence intervals. The baseline's validation "
        "curve with the same seed is interpolated in the logarithm of the steps; tokens, FLOPs and seconds in steps "
        "are taken as proportional to steps. A curve is not extrapolated: &gt; means that the baseline does not reach "
        "the loss by its last step, &lt; that it does so at its first evaluation, with some seed. Memory is that of "
        "the smallest size of the baseline in the study that reaches the loss, interpolated between sizes."
        f"{_schedule(plan)}"
    )
    return f"## Effective speed-up\n\n{text}\n\n{table(['arm', *QUANTITIES, 'memory'], rows)}"


def _schedule(plan: Plan) -> str:
    """A note if losses on the way are not those of shorter runs."""
    schedules = {arm.arm.config.optimizer.decay for arm in plan.arms if arm.arm.baseline == arm.arm.name}
    notes = dict.fromkeys(_SCHEDULES.get(decay, _DECAYED) for decay in sorted(schedules))
    return "".join(f" {note}: these factors are too favourable to the arms, except memory." for note in notes if note)


def _factor(found: Factor | None) -> str:
    if found is None:
        return "-"
    if found.bound:
        return f"{'&lt;' if found.bound == '<' else '&gt;'} {found.mean:.2f}"
    return f"{found.mean:.2f}" + (f" ({interval(found.interval, '.2f')})" if found.interval else "")


def loss_at_equal_memory(summaries: Sequence[Summary], at_memory: Mapping[str, EqualMemory]) -> str:
    """Gains over the baseline at the arm's memory; empty if the baseline has a single size."""
    titles = {summary.arm.arm.name: escaped(summary.arm.arm.title) for summary in summaries}
    if not any(len(each.sizes) > 1 for each in at_memory.values()):
        return ""
    rows = [[titles[name], f"{each.memory / _MIB:,.1f}", *_at_memory(each)] for name, each in at_memory.items()]
    sizes = {size.name: size for each in at_memory.values() for size in each.sizes}
    listed = ", ".join(f"{titles[name]} ({size.memory / _MIB:,.1f} MiB)" for name, size in sizes.items())
    text = (
        "The gain over the baseline at the size that has the arm's measured peak memory, interpolated for each seed in "
        f"the logarithm of memory between the sizes of the baseline: {listed}. Sizes that another one beats in memory "
        "and loss do not count. An arm outside of their range is not compared. Tests and margin are those of the "
        "losses, corrected over the arms of this table. The next table has the memory by component."
    )
    columns = ["arm", "MiB per rank", "gain at equal memory", "95 % CI", "p (Holm)", "verdict"]
    return f"## Loss at equal memory\n\n{text}\n\n{table(columns, rows)}"


def _at_memory(found: EqualMemory) -> list[str]:
    if (comparison := found.comparison) is None:
        return ["outside of the sizes", "-", "-", "-"]
    sample = comparison.sample
    return [
        number(sample.mean, "+.4f"),
        interval(sample.interval(), "+.4f"),
        p_value(comparison.p_adjusted),
        comparison.verdict or "-",
    ]
