"""The report of a study: report.md with tables and figures, the same as a single HTML file, and CSV files."""

import base64
import html
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import markdown
import matplotlib

from coe_megatron.errors import one_line
from coe_megatron.files import read_limited, require_replaceable, require_writable, write_atomically
from coe_megatron.study.plan.cost_table import Plan, format_count, format_duration
from coe_megatron.study.plan.names import joined
from coe_megatron.study.plan.registration import read_registration
from coe_megatron.study.report.comparison import Summary, compare
from coe_megatron.study.report.figures.draw import arms_shown, draw
from coe_megatron.study.report.figures.style import StudyFigure, is_truncated
from coe_megatron.study.report.ladder import law_table, prediction_table
from coe_megatron.study.report.results import Result, collect, finished_results, results_csv, timings_csv
from coe_megatron.study.report.scaling_fit import Fit, fit
from coe_megatron.study.report.tuning import tuning_csv, tuning_table, tuning_text

_STYLE = """body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
@media print { body { max-width: none; font-size: 11px } img { break-inside: avoid; max-height: 95vh } }"""

_TEXTS = ("report.md", "report.html", "results.csv", "timings.csv", "tuning.csv")
_MAX_BYTES = 1 << 26  # of a report.md


def write_report(plan: Plan, title: str, folder: Path) -> list[Path]:
    """Write the report into a folder, replacing an earlier report; returns the files.

    Raises:
        ConfigError: the folder or a file in it cannot be written, or has another type; or the study is not the one that
            was registered; one line.
        OSError: writing failed, such as on a full disk.
    """
    check_folder(folder)
    read_registration(plan.study)  # refuses a study that has changed since, before anything is written
    results = collect(plan)
    summaries = compare(results, plan.arms, plan.study.baseline.name)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_figures(folder)
    files = [_write(folder / "results.csv", results_csv(results)), _write(folder / "timings.csv", timings_csv(results))]
    if plan.tuning:
        files.append(_write(folder / "tuning.csv", tuning_csv(plan.tuning)))
    figures, images = list(draw(results, summaries, plan.study.baseline.name)), dict[str, bytes]()
    for figure in figures:
        images[figure.name] = render(figure, "svg")
        files.append(_write(folder / f"{figure.name}.svg", images[figure.name]))
        files.append(_write(folder / f"{figure.name}.png", render(figure, "png")))
    text = as_markdown(plan, title, results, summaries, figures)
    files.append(_write(folder / "report.md", text))
    files.append(_write(folder / "report.html", as_html(title, text, images)))
    return files


def check_folder(folder: Path) -> None:
    """Raise ConfigError unless a report can be written there, and an earlier one can be read."""
    require_writable(folder, "the report's folder", "folder")
    for name in _TEXTS:
        require_replaceable(folder / name, "a file of the report")


def _remove_figures(folder: Path) -> None:
    """Remove the figures of an earlier report, since not all of them may be drawn again."""
    earlier = folder / "report.md"
    if earlier.exists():
        text = read_limited(earlier, "the earlier report", _MAX_BYTES).decode(errors="replace")
        for name in re.findall(r"\]\(([\w-]+)\.svg\)", text):
            for kind in ("svg", "png"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)


def as_markdown(
    plan: Plan, title: str, results: Sequence[Result], summaries: Sequence[Summary], figures: Sequence[StudyFigure]
) -> str:
    """The report as Markdown; figures are separate files."""
    finished, study = finished_results(results), plan.study
    seeds = ", ".join(map(str, study.settings.seeds))
    parts = [
        f"# {_escaped(title)}",
        f"{len(finished)} of {len(results)} runs are finished: {_counted(plan.arms, 'arm')} with "
        f"{'the seeds' if len(study.settings.seeds) > 1 else 'the seed'} {seeds}. "
        f"The baseline is {_name(plan, study.baseline.name)}. Losses are final validation losses in nats per token.",
        study.settings.seed_effect,
        _budget(plan),
        *_unfinished(results),
        *_tuning(plan),
        *_ladder(plan, summaries),
    ]
    if finished:
        parts += [
            "## Losses",
            _conclusion(summaries, study.baseline.name),
            _losses(summaries, study.baseline.name),
            _explanation(summaries),
            _answers(finished),
        ]
        parts += ["## Cost of the arms", _costs(plan, finished), "### Memory by component", _memory(plan, finished)]
        parts += ["## Loss against parameters, FLOPs and recurrence", _scaling_fit(fit(summaries))]
        shown = (f"![{each.name}]({each.name}.svg)\n\n*{_escaped(each.caption)}*" for each in figures)
        parts += ["## Figures", _arms_in_figures(summaries, study.baseline.name), *shown]
    return "\n\n".join(filter(None, parts)) + "\n"


def as_html(title: str, text: str, images: Mapping[str, bytes]) -> str:
    """The same as a self-contained HTML page; `images` has the figures as SVG, by name."""
    body = markdown.markdown(text, extensions=["tables"])
    for name, image in images.items():
        figure = base64.b64encode(image).decode()
        body = body.replace(f'src="{name}.svg"', f'src="data:image/svg+xml;base64,{figure}"')
    head = f'<meta charset="utf-8"><title>{html.escape(one_line(title))}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _arms_in_figures(summaries: Sequence[Summary], baseline: str) -> str:
    """A note if the figures exclude arms or truncate labels; empty in most studies."""
    names = arms_shown(summaries, baseline)
    notes = []
    if len(names) < len(summaries):
        notes.append(f"Of {len(summaries)} arms, they show the baseline and the {len(names) - 1} with the lowest loss.")
    if any(is_truncated(summary.arm.arm.title) for summary in summaries):
        notes.append("Long labels are truncated (…); if two become the same, the arm's number is appended.")
    return " ".join(notes)


def _budget(plan: Plan) -> str:
    budget = plan.study.settings.budget
    if budget is None:
        return "No budget holds a quantity equal; the costs of the arms are below."
    return (
        f"All arms have the same {budget.equal.replace('_', ' ')} as the baseline; `{budget.solve}` is solved for this."
    )


def _tuning(plan: Plan) -> list[str]:
    if not plan.tuning:
        return []
    columns, rows = tuning_table(plan.tuning)
    escaped = [[_escaped(cell) for cell in row] for row in rows]
    return ["## Tuning", _escaped(tuning_text(plan.tuning)), _table([_escaped(each) for each in columns], escaped)]


def _ladder(plan: Plan, summaries: Sequence[Summary]) -> list[str]:
    ladder = plan.study.settings.ladder
    if ladder is None or len(ladder.rate_factors) > 1:  # several learning rates per width test the rule instead
        return []
    registered = read_registration(plan.study)
    text, table = law_table(plan, registered)
    parts = ["## Scaling law", _escaped(text), *([_table(*table)] if table else [])]
    if registered is None:
        return parts
    columns, rows = prediction_table(plan, registered, summaries)
    escaped = [[_escaped(cell) for cell in row] for row in rows]
    known = f"Registered before the largest width ran; SHA-256 of registration.json: {registered.sha256}."
    return [*parts, "### The largest width, as predicted", known, _table(columns, escaped)]


def _unfinished(results: Sequence[Result]) -> list[str]:
    missing = [result for result in results if not result.finished]
    if not missing:
        return []
    rows = [[_escaped(result.run.arm), str(result.run.seed), _escaped(result.state)] for result in missing]
    return ["Not in the tables and figures below:", _table(["arm", "seed", "state"], rows)]


def _conclusion(summaries: Sequence[Summary], baseline: str) -> str:
    """The result in a sentence."""
    others = [summary for summary in summaries if summary.arm.arm.name != baseline]
    if not others:
        return "The baseline is the only arm."
    if not next(summary for summary in summaries if summary.arm.arm.name == baseline).losses:
        return "The baseline has no finished run, so no arm can be compared with it."
    headings = {"better": "Better than the baseline", "worse": "Worse", "not significant": "No significant difference"}
    headings[""] = "Too few seeds"
    found = {
        verdict: [_escaped(joined(each.arm.arm.labels)) for each in others if each.verdict == verdict]
        for verdict in headings
    }
    return " ".join(f"**{headings[verdict]}:** {', '.join(arms)}." for verdict, arms in found.items() if arms)


def _losses(summaries: Sequence[Summary], baseline: str) -> str:
    rows = []
    for summary in sorted(summaries, key=lambda each: (each.mean is None, each.mean)):
        gain = "baseline" if summary.arm.arm.name == baseline else _number(summary.gain, "+.4f")
        interval = f"{summary.interval[0]:+.4f} to {summary.interval[1]:+.4f}" if summary.interval else "-"
        rows.append(
            [
                _label(summary),
                str(len(summary.losses)),
                _number(summary.mean, ".4f"),
                _number(summary.std, ".4f"),
                gain,
                interval,
                "&lt; 0.001" if summary.p is not None and summary.p < 0.001 else _number(summary.p, ".3f"),
                summary.verdict or "-",
            ]
        )
    columns = ["arm", "seeds", "mean loss", "s.d.", "gain", "95 % CI", "p", "against the baseline"]
    return _table(columns, rows)


def _answers(finished: Sequence[Result]) -> str:
    """Accuracy of final answers, of runs with `training.evaluate_answers`; empty without any."""
    found: dict[str, list[float]] = {}
    for result in finished:
        if (accuracy := result.steps[-1].get("answer_accuracy")) is not None:
            found.setdefault(result.run.arm, []).append(accuracy)
    if not found:
        return ""
    rows = [
        [_escaped(arm), f"{sum(each) / len(each):.3f}", ", ".join(f"{accuracy:.3f}" for accuracy in each)]
        for arm, each in found.items()
    ]
    return "### Final answers\n\n" + _table(["arm", "mean accuracy", "by seed"], rows)


def _explanation(summaries: Sequence[Summary]) -> str:
    tested = sum(summary.interval is not None for summary in summaries)
    return (
        "The standard deviation (s.d.) is over seeds. The gain is the baseline's loss minus the arm's, over the seeds "
        "that both have finished. Its confidence interval (CI) and p come from a two-sided paired t-test over these "
        "seeds, and the verdict from the interval. There is no correction for multiple comparisons"
        + (f": {tested} tests without any true difference give {tested * 0.05:.2g} false verdicts." if tested else ".")
    )


def _costs(plan: Plan, finished: Sequence[Result]) -> str:
    rows = []
    for arm in plan.arms:
        runs = [result for result in finished if result.run.arm == arm.arm.name]
        if runs:
            measured = max(result.memory for result in runs)
            seconds = sum(result.seconds for result in runs) / len(runs)
            rows.append(
                [
                    _name(plan, arm.arm.name),
                    format_count(arm.parameters),
                    format_count(arm.flops_per_token),
                    format_count(arm.flops),
                    format_count(arm.expert_flops),
                    f"{arm.arm.config.training.steps:,}",
                    f"{arm.memory / 2**20:,.0f} / {measured / 2**20:,.0f}",
                    f"{format_duration(arm.seconds.total) if arm.seconds else '-'} / {format_duration(seconds)}",
                ]
            )
    columns = ["arm", "parameters", "FLOPs per token", "FLOPs", "expert FLOPs", "steps"]
    return _table([*columns, "MiB per rank, predicted / measured", "time, predicted / in steps"], rows)


def _memory(plan: Plan, finished: Sequence[Result]) -> str:
    """Predicted peak memory of a rank by component, and the measured peak."""
    rows = []
    for arm in plan.arms:
        if measured := [result.memory for result in finished if result.run.arm == arm.arm.name]:
            amounts = [*arm.components.values(), arm.memory, max(measured)]
            cells = [f"{amount / 2**20:,.1f}" for amount in amounts]
            rows.append([_name(plan, arm.arm.name), *cells, f"{arm.memory / max(measured) - 1:+.1%}"])
    names = [name.replace("_", " ") for name in plan.arms[0].components]
    text = (
        "Peak memory of a rank within a step in MiB: predicted from the config, by component, and measured. "
        "Gradients are allocated while activations are released, so at the peak neither need be complete. Other is "
        "what the optimizer needs for its step, and what ZeRO 3 and tensor parallelism gather."
    )
    return f"{text}\n\n{_table(['arm', *names, 'total', 'measured', 'prediction error'], rows)}"


def _scaling_fit(found: Fit | None) -> str:
    if found is None:
        return "Too few different arms for a fit."
    rows = [
        [each.of, f"{each.value:+.4f}", f"{each.interval[0]:+.4f} to {each.interval[1]:+.4f}"]
        for each in found.coefficients
    ]
    excluded = (
        f" Excluded, since nearly constant or nearly a function of the others: {', '.join(found.excluded)}."
        if found.excluded
        else ""
    )
    text = (
        f"Least-squares fit of log loss, linear in the logarithms of these quantities, over {found.points} arms (means "
        f"over seeds). The residuals, which include all other differences between arms, have a standard deviation of "
        f"{found.residual:.2%}.{excluded} The fit does not extrapolate beyond these arms."
    )
    return f"{text}\n\n{_table(['quantity', 'exponent', '95 % CI'], rows)}"


def _name(plan: Plan, arm: str) -> str:
    return _escaped(next(each.title for each in plan.study.arms if each.name == arm))


def _label(summary: Summary) -> str:
    return _escaped(summary.arm.arm.title)


def _counted(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _escaped(text: str) -> str:
    """Text of a user on one line, escaped for Markdown and HTML.

    We use character references, which all dialects of Markdown support; GitHub's also has formulas and strikethrough.
    """
    return re.sub(r"[&<>\\`*\[\]|~$#{}]|(?<!\w)_|_(?!\w)", lambda found: f"&#{ord(found[0])};", one_line(text))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(figure: StudyFigure, kind: str) -> bytes:
    """A figure as an image of kind "svg" or "png"; the same figure gives the same bytes."""
    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": figure.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # such a glyph is drawn as a box
        warnings.filterwarnings(
            "ignore", "constrained_layout not applied"
        )  # long labels may leave no space for the axes
        metadata = {"Date": None} if kind == "svg" else None
        figure.figure.savefig(image, format=kind, dpi=150, metadata=metadata)
    return image.getvalue()


def _write(path: Path, content: str | bytes) -> Path:
    write_atomically(path, content)
    return path
