"""Tables of final losses and answers: arms against their baselines, and what the tests say."""

from collections.abc import Mapping, Sequence
from functools import partial

from coe_megatron.convert.answers import interval as wilson_interval
from coe_megatron.study.plan.cost_table import Plan
from coe_megatron.study.plan.names import joined
from coe_megatron.study.report.comparison import Comparison, Summary, by_seed, compare_values
from coe_megatron.study.report.markdown_text import escaped, interval, number, p_value, table
from coe_megatron.study.report.results import Result, answers_of, group_accuracies, set_losses
from coe_megatron.study.report.statistics import LEVEL, MAX_SEEDS, MIN_SEEDS

_HEADINGS = {
    "better": "Better than the baseline",
    "worse": "Worse",
    "equivalent": "Equivalent",
    "undecided": "Undecided",
    "": "Too few seeds",
}


def conclusion(summaries: Sequence[Summary]) -> str:
    """The result in a sentence."""
    others = [summary for summary in summaries if not summary.is_baseline]
    if not others:
        return "The baseline is the only arm."
    if not any(summary.losses for summary in summaries if summary.is_baseline):
        return "The baseline has no finished run, so no arm can be compared with it."
    found = {verdict: [_named(each) for each in others if each.verdict == verdict] for verdict in _HEADINGS}
    return " ".join(f"**{_HEADINGS[verdict]}:** {', '.join(arms)}." for verdict, arms in found.items() if arms)


def _named(summary: Summary) -> str:
    """The arm's labels; with the seeds that would decide, if it is undecided."""
    name, found = escaped(joined(summary.arm.arm.labels)), summary.comparison
    return (
        name
        if found is None or found.verdict != "undecided"
        else f"{name} ({_seeds_to_decide(found)} seeds would decide)"
    )


def losses(summaries: Sequence[Summary]) -> str:
    """Mean loss and gain of every arm, the best first."""
    titles = {summary.arm.arm.name: summary.arm.arm.title for summary in summaries}
    several = sum(summary.is_baseline for summary in summaries) > 1
    rows = []
    for summary in sorted(summaries, key=lambda each: (each.mean is None, each.mean)):
        against = ["-" if summary.is_baseline else escaped(titles[summary.arm.arm.baseline])] if several else []
        rows.append(
            [
                escaped(summary.arm.arm.title),
                str(len(summary.losses)),
                number(summary.mean, ".4f"),
                number(summary.std, ".4f"),
                *against,
                "baseline" if summary.is_baseline else number(summary.gain, "+.4f"),
                interval(summary.interval, "+.4f"),
                summary.verdict or "-",
            ]
        )
    columns = ["arm", "seeds", "mean loss", "s.d.", *(["against"] if several else []), "gain", "95 % CI", "verdict"]
    return table(columns, rows)


def significance(summaries: Sequence[Summary], margin: float | None) -> str:
    """p-values, and what the number of seeds can show; empty if no arm has enough seeds."""
    rows = []
    for summary in summaries:
        if (found := summary.comparison) is None or found.p_adjusted is None:
            continue
        equivalence = [p_value(found.equivalence_p)] if margin is not None else []
        rows.append(
            [
                escaped(summary.arm.arm.title),
                str(len(found.gains)),
                p_value(found.sample.p),
                p_value(found.p_adjusted),
                *equivalence,
                number(found.sample.minimum_detectable, ".4f"),
                _seeds_to_decide(found),
            ]
        )
    columns = ["arm", "seeds", "p", "p (Holm)", *(["p of equivalence (Holm)"] if margin is not None else [])]
    return table([*columns, "detectable gain", "seeds that would decide"], rows) if rows else ""


def explanation(summaries: Sequence[Summary], margin: float | None) -> str:
    """How to read the tables."""
    tested = max((each.comparison.tests for each in summaries if each.comparison), default=0)
    several = sum(summary.is_baseline for summary in summaries) > 1
    correction = f"corrected by Holm's method over the {tested} comparisons of the study" if tested else "corrected"
    sentences = [
        "The standard deviation (s.d.) is over seeds. The gain is the baseline's loss minus the arm's, over the seeds "
        f"that both have finished{', with the baseline that has the labels of the arm on the other axes' * several}.",
        "Its 95 % confidence interval (CI), which is not corrected, and p come from a two-sided paired t-test over "
        f"these seeds. The verdict is better or worse if p, {correction}, is below {LEVEL:g}.",
        _equivalence(margin),
        f"Below {MIN_SEEDS} common seeds there is no verdict. The detectable gain is the true gain that the test finds "
        f"at the level of {LEVEL:g} with a power of 0.8, with this number of seeds and the measured s.d. of the gain. "
        "The seeds that would decide are those with which a verdict other than undecided has a probability of 0.8, if "
        "gain and s.d. are as measured.",
    ]
    return " ".join(sentences)


def _equivalence(margin: float | None) -> str:
    if margin is None:
        return "The study declares no margin, so that no arm can be shown to be equivalent."
    return (
        f"It is equivalent, whatever p is, if two one-sided tests, corrected alike, show that the gain is between "
        f"-{margin:g} and +{margin:g} nats per token, the margin that the study declares."
    )


def _seeds_to_decide(comparison: Comparison) -> str:
    if comparison.verdict != "undecided":
        return "-"
    found = comparison.seeds_to_decide
    return f"{found:,}" if found else f"&gt; {MAX_SEEDS:,}"


def validation_sets(plan: Plan, results: Sequence[Result]) -> str:
    """Final losses of each validation set, of runs that have several; empty otherwise."""
    names = dict.fromkeys(name for result in results if result.finished for name in set_losses(result))
    parts = []
    for name in names:
        values = by_seed(results, partial(_set_loss, name))
        found = _values(plan, values, -1, ".4f", plan.study.settings.margin)
        parts.append(f"#### {escaped(name)}\n\n{found}")
    if not parts:
        return ""
    text = (
        "The losses above are over all validation sets together, by tokens. Here is each set by itself. Gains, tests "
        "and margin are as above; Holm's correction is over the arms of each table."
    )
    return "\n\n".join(["### Validation sets", text, *parts])


def _set_loss(name: str, result: Result) -> float | None:
    return set_losses(result).get(name)


def answers(plan: Plan, results: Sequence[Result]) -> str:
    """Accuracy of final answers, of runs with `training.evaluate_answers`; empty without any."""
    values = by_seed(results, lambda result: found[0] if (found := answers_of(result)) else None)
    if not values:
        return ""
    text = (
        "The fraction of word problems whose final answer is right, after the last step. All runs of an arm are asked "
        "the same problems. The gain is the arm's accuracy minus the baseline's. Its statistics are those of the "
        "losses, corrected over the arms of this table, and without a margin. Intervals by seed are Wilson's 95 % "
        "intervals over the problems of a run."
    )
    rows = [
        [escaped(result.arm.arm.title), str(result.run.seed), f"{right:.3f}", str(total), _wilson(right, total)]
        for result in results
        if result.finished and (found := answers_of(result))
        for right, total in [found]
    ]
    by_run = table(["arm", "seed", "accuracy", "problems", "95 % interval (Wilson)"], rows)
    return "\n\n".join(["### Final answers", text, _values(plan, values, 1, ".3f", None), by_run])


def _wilson(accuracy: float, total: int) -> str:
    low, high = wilson_interval(round(accuracy * total), total)
    return f"{low:.3f} to {high:.3f}"


def _values(plan: Plan, values: Mapping[str, Mapping[int, float]], sign: int, form: str, margin: float | None) -> str:
    """A table of a quantity of the arms against their baselines; `sign` as in `compare_values`."""
    comparisons = compare_values(values, plan.arms, sign, margin)
    rows = []
    for arm in (each.arm for each in plan.arms if each.arm.name in values):
        found, own = comparisons.get(arm.name), list(values[arm.name].values())
        gain = number(found.sample.mean if found else None, f"+{form}")
        rows.append(
            [
                escaped(arm.title),
                str(len(own)),
                f"{sum(own) / len(own):{form}}",
                "baseline" if arm.baseline == arm.name else gain,
                interval(found.sample.interval() if found else None, f"+{form}"),
                p_value(found.p_adjusted if found else None),
                (found.verdict if found else "") or "-",
            ]
        )
    return table(["arm", "seeds", "mean", "gain", "95 % CI", "p (Holm)", "verdict"], rows)


def answer_groups(finished: Sequence[Result]) -> str:
    """Mean accuracy over the seeds, and its range, by arm and group of problems; empty if problems have no groups."""
    found: dict[str, dict[str, list[float]]] = {}
    for result in finished:
        for group, accuracy in group_accuracies(result).items():
            found.setdefault(result.run.arm, {}).setdefault(group, []).append(accuracy)
    groups = sorted({group for accuracies in found.values() for group in accuracies})
    if not groups:
        return ""
    rows = [
        [escaped(arm), *(_mean_and_range(accuracies.get(group, [])) for group in groups)]
        for arm, accuracies in found.items()
    ]
    text = "Mean accuracy over the seeds, with the lowest and the highest, by group of problems."
    return f"### Final answers by group\n\n{text}\n\n{table(['arm', *map(escaped, groups)], rows)}"


def _mean_and_range(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"
