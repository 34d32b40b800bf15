"""Verdicts on claims as Markdown and as JSON."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from coe_megatron.study.report.claims_file import RELATIVE, Condition
from coe_megatron.study.report.markdown_text import escaped, interval, number, p_value, table
from coe_megatron.study.report.statistics import LEVEL, MAX_SEEDS, MIN_SEEDS
from coe_megatron.study.report.verdict import Finding, Verdict

_MEASURES: Mapping[str, tuple[str, str]] = {
    "loss": ("final validation loss", "nats per token"),
    "loss_at_equal_memory": ("final validation loss at equal memory", "nats per token"),
    "accuracy": ("accuracy of answers", ""),
    "rise": ("largest rise of the validation loss", "nats per token"),
    "loss_sd": ("s.d. of the final loss over seeds", ""),
    "memory": ("measured peak memory", ""),
    "memory_predicted": ("predicted peak memory", ""),
    "flops": ("FLOPs of a run", ""),
    "parameters": ("parameters", ""),
}
_RELATIONS = {
    "less": "is less than",
    "greater": "is greater than",
    "equal": "equals",
    "not_less": "is not less than",
    "not_greater": "is not greater than",
}


def as_markdown(title: str, source: str, verdicts: Sequence[Verdict], folder: Path) -> str:
    """The page.

    Args:
        source: name of the claims file.
        folder: of the page, for its links.
    """
    tests = max((verdict.tests for verdict in verdicts), default=0)
    counts = {
        result: sum(verdict.result == result for verdict in verdicts)
        for result in ("holds", "does not hold", "undecided")
    }
    rows = [
        [
            escaped(each.claim.id),
            escaped(each.claim.statement),
            f"**{each.result}**",
            "; ".join(map(_difference, each.findings)),
            p_value(each.p_adjusted),
        ]
        for each in verdicts
    ]
    parts = [
        f"# {escaped(title)}",
        f"Of {len(verdicts)} claims, {counts['holds']} hold, {counts['does not hold']} do not, and "
        f"{counts['undecided']} are undecided. `launch/study.py verdict` writes this page from {escaped(source)} and "
        "the CSV files of the reports.",
        table(["claim", "statement", "verdict", "difference (95 % CI)", "p (Holm)"], rows, texts=3),
        "## How a claim is judged",
        _explanation(tests),
        *(_section(verdict, folder) for verdict in verdicts),
    ]
    return "\n\n".join(parts) + "\n"


def _explanation(tests: int) -> str:
    return (
        "A difference is the arm's value minus the other arm's, paired by seed, with its 95 % confidence interval by "
        "Student's t; for memory, FLOPs, parameters and s.d. it is relative to the other arm's. A condition holds if a "
        "test shows that the difference is where the condition says, and does not hold if one shows that it is not: "
        "two-sided paired t-tests, two one-sided tests for `equal`, and the Pitman-Morgan test for the s.d. With a "
        "margin, a difference that is shown to be smaller than the margin is none. A claim holds if all its conditions "
        f"do, and does not if one does not. The p-value of a claim is corrected by Holm's method over the {tests} "
        f"claims of this page that are tested, and decides below {LEVEL:g}; intervals are not corrected. Memory, FLOPs "
        f"and parameters are the same for every seed and are not tested. With fewer than {MIN_SEEDS} seeds in common, "
        "a claim is undecided. The seeds that would decide do so with a probability of 0.8, if difference and s.d. are "
        "as measured."
    )


def _section(verdict: Verdict, folder: Path) -> str:
    rows = [_cells(finding) for finding in verdict.findings]
    reports = dict.fromkeys(Path(finding.condition.report) for finding in verdict.findings)
    links = [
        f"[{escaped(report.name)}]({quote(_link(report / 'report.md', folder))})"
        if (report / "results.csv").exists()
        else f"{escaped(report.name)} (not there yet)"
        for report in reports
    ]
    columns = ["condition", "difference", "95 % CI", "p", "seeds", "seeds that would decide"]
    heading = f"## {escaped(verdict.claim.id)}: {verdict.result}"
    sources = f"Report{'s' * (len(links) > 1)}: {', '.join(links)}."
    return "\n\n".join([heading, escaped(verdict.claim.statement), table(columns, rows), sources])


def _link(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _cells(finding: Finding) -> list[str]:
    condition, form = finding.condition, _form(finding.condition)
    if finding.reason:
        return [_condition(finding), escaped(finding.reason), "-", "-", str(finding.seeds), "-"]
    needed = f"{finding.seeds_to_decide:,}" if finding.seeds_to_decide else "-"
    if _is_open(finding) and not finding.seeds_to_decide:
        needed = "unknown" if condition.measure == "loss_sd" else f"&gt; {MAX_SEEDS:,}"
    p = p_value(min(finding.p_holds, finding.p_fails)) if finding.is_tested else "-"
    return [
        _condition(finding),
        number(finding.estimate, form),
        interval(finding.interval, form),
        p,
        str(finding.seeds),
        needed,
    ]


def _difference(finding: Finding) -> str:
    """Such as `-0.1000 (-0.1200 to -0.0800)`."""
    form = _form(finding.condition)
    ends = f" ({interval(finding.interval, form)})" if finding.interval else ""
    return number(finding.estimate, form) + ends


def _is_open(finding: Finding) -> bool:
    return finding.is_tested and min(finding.p_holds, finding.p_fails) >= LEVEL


def _condition(finding: Finding) -> str:
    """The condition in words."""
    condition = finding.condition
    name, unit = _MEASURES[condition.measure]
    on_set = f" on {escaped(condition.set)}" if condition.set is not None else ""
    arm, other = (
        escaped(text) for text in (finding.arm or _named(condition.arm), finding.other or _named(condition.other))
    )
    text = f"{name}{on_set} of {arm} {_RELATIONS[condition.relation]} that of {other}"
    for amount, phrase in ((condition.by, "by at least"), (condition.margin, "margin")):
        if amount:
            shown = f"{amount:.1%}" if condition.measure in RELATIVE else f"{amount:g} {unit}".strip()
            text += f", {phrase} {shown}"
    if condition.than_in is not None:
        text += f", compared with the same difference in {escaped(_named(condition.than_in))}"
    return text


def _named(arm: Any) -> str:
    if isinstance(arm, list):
        return ", ".join(map(_named, arm))
    return " ".join(map(str, arm.values())) if isinstance(arm, Mapping) else str(arm)


def _form(condition: Condition) -> str:
    return "+.1%" if condition.measure in RELATIVE else "+.4f"


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """Unrounded values, for JSON."""
    return {
        "id": verdict.claim.id,
        "statement": verdict.claim.statement,
        "result": verdict.result,
        "p_adjusted": verdict.p_adjusted,
        "tests": verdict.tests,
        "conditions": [_finding_dict(finding) for finding in verdict.findings],
    }


def _finding_dict(finding: Finding) -> dict[str, Any]:
    condition = finding.condition
    return {
        "report": condition.report,
        "measure": condition.measure,
        "set": condition.set,
        "arm": finding.arm,
        "other": finding.other,
        "relation": condition.relation,
        "by": condition.by,
        "margin": condition.margin,
        "than_in": condition.than_in,
        "difference": finding.estimate,
        "interval": finding.interval,
        "p_holds": finding.p_holds if finding.is_tested else None,
        "p_fails": finding.p_fails if finding.is_tested else None,
        "seeds": finding.seeds,
        "seeds_to_decide": finding.seeds_to_decide,
        "reason": finding.reason or None,
    }
