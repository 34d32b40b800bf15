"""The report of a study: report.md with tables and figures, the same as one HTML file, and the numbers as CSV."""

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
from coe_megatron.study.plan.cost_table import Plan, count, span
from coe_megatron.study.plan.names import joined
from coe_megatron.study.report.comparison import Summary, compare
from coe_megatron.study.report.figures import Drawing, arms_shown, draw, is_cut
from coe_megatron.study.report.results import Result, collect, done, results_csv, timings_csv
from coe_megatron.study.report.scaling_fit import Fit, fit

_STYLE = """body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
@media print { body { max-width: none; font-size: 11px } img { break-inside: avoid; max-height: 95vh } }"""

_TEXTS = ("report.md", "report.html", "results.csv", "timings.csv")
_LARGEST = 1 << 26  # bytes of a report.md


def write_report(plan: Plan, title: str, folder: Path) -> list[Path]:
    """Write everything into a folder, over what an earlier report left; returns the files.

    Raises:
        ConfigError: the folder, or a file in it, cannot be written, or is something else; one line that names it.
        OSError: it could not be written after all, such as on a full disk.
    """
    check_folder(folder)
    results = collect(plan)
    summaries = compare(results, plan.arms, plan.study.baseline.name)
    folder.mkdir(parents=True, exist_ok=True)
    _forget_figures(folder)
    files = [_write(folder / "results.csv", results_csv(results)), _write(folder / "timings.csv", timings_csv(results))]
    drawings, images = list(draw(results, summaries, plan.study.baseline.name)), dict[str, bytes]()
    for drawing in drawings:
        images[drawing.name] = _drawn(drawing, "svg")
        files.append(_write(folder / f"{drawing.name}.svg", images[drawing.name]))
        files.append(_write(folder / f"{drawing.name}.png", _drawn(drawing, "png")))
    text = as_markdown(plan, title, results, summaries, drawings)
    files.append(_write(folder / "report.md", text))
    files.append(_write(folder / "report.html", as_html(title, text, images)))
    return files


def check_folder(folder: Path) -> None:
    """That a report can be written there, and what of an earlier one must be read; raises ConfigError otherwise."""
    require_writable(folder, "the report's folder", "folder")
    for name in _TEXTS:
        require_replaceable(folder / name, "a file of the report")


def _forget_figures(folder: Path) -> None:
    """Those of an earlier report, which may not be drawn any more."""
    earlier = folder / "report.md"
    if earlier.exists():
        text = read_limited(earlier, "the earlier report", _LARGEST).decode(errors="replace")
        for name in re.findall(r"\]\(([\w-]+)\.svg\)", text):
            for kind in ("svg", "png"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)


def as_markdown(
    plan: Plan, title: str, results: Sequence[Result], summaries: Sequence[Summary], drawings: Sequence[Drawing]
) -> str:
    """The report as text; figures are files beside it."""
    finished, study = done(results), plan.study
    seeds = ", ".join(map(str, study.settings.seeds))
    parts = [
        f"# {_escaped(title)}",
        f"{len(finished)} of {len(results)} runs are finished: {_counted(plan.arms, 'arm')} with "
        f"{'the seeds' if len(study.settings.seeds) > 1 else 'the seed'} {seeds}. "
        f"The baseline is {_name(plan, study.baseline.name)}. Losses are in nats a token, on the validation set, after "
        "the last step.",
        _budget(plan),
        *_not_done(results),
    ]
    if finished:
        parts += [
            "## Losses",
            _answer(summaries, study.baseline.name),
            _losses(summaries, study.baseline.name),
            _reading(summaries),
        ]
        parts += ["## What the arms cost", _costs(plan, finished), "### Memory by component", _memory(plan, finished)]
        parts += ["## Loss against parameters, FLOPs and recurrence", _fitted(fit(summaries))]
        figures = (f"![{each.name}]({each.name}.svg)\n\n*{_escaped(each.caption)}*" for each in drawings)
        parts += ["## Figures", _drawn_arms(summaries, study.baseline.name), *figures]
    return "\n\n".join(filter(None, parts)) + "\n"


def as_html(title: str, text: str, images: Mapping[str, bytes]) -> str:
    """The same as one page that needs no other file; `images` are the figures as SVG, by name."""
    body = markdown.markdown(text, extensions=["tables"])
    for name, image in images.items():
        figure = base64.b64encode(image).decode()
        body = body.replace(f'src="{name}.svg"', f'src="data:image/svg+xml;base64,{figure}"')
    head = f'<meta charset="utf-8"><title>{html.escape(one_line(title))}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _drawn_arms(summaries: Sequence[Summary], baseline: str) -> str:
    """Which arms the figures leave out, and what became of their labels; nothing in most studies."""
    names = arms_shown(summaries, baseline)
    said = []
    if len(names) < len(summaries):
        said.append(f"Of {len(summaries)} arms they show the baseline and the {len(names) - 1} with the lowest loss.")
    if any(is_cut(summary.arm.arm.title) for summary in summaries):
        said.append("Long labels are cut (…); where that leaves two alike, the arm's number stands behind it.")
    return " ".join(said)


def _budget(plan: Plan) -> str:
    budget = plan.study.settings.budget
    if budget is None:
        return "Nothing is held equal by a budget; what the arms cost stands below."
    return f"All arms have the baseline's {budget.equal.replace('_', ' ')}: `{budget.solve}` is solved for it."


def _not_done(results: Sequence[Result]) -> list[str]:
    missing = [result for result in results if not result.finished]
    if not missing:
        return []
    rows = [[_escaped(result.run.arm), str(result.run.seed), _escaped(result.state)] for result in missing]
    return ["Not in the tables and figures below:", _table(["arm", "seed", "state"], rows)]


def _answer(summaries: Sequence[Summary], baseline: str) -> str:
    """In a sentence, what was found."""
    others = [summary for summary in summaries if summary.arm.arm.name != baseline]
    if not others:
        return "The baseline is the only arm."
    if not next(summary for summary in summaries if summary.arm.arm.name == baseline).losses:
        return "The baseline has no finished run, so that nothing can be held against it."
    told = {"better": "Better than the baseline", "worse": "Worse", "no difference seen": "No difference seen"}
    told[""] = "Too few seeds to tell"
    found = {
        verdict: [_escaped(joined(each.arm.arm.labels)) for each in others if each.verdict == verdict]
        for verdict in told
    }
    return " ".join(f"**{told[verdict]}:** {', '.join(arms)}." for verdict, arms in found.items() if arms)


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
                _number(summary.spread, ".4f"),
                gain,
                interval,
                "&lt; 0.001" if summary.p is not None and summary.p < 0.001 else _number(summary.p, ".3f"),
                summary.verdict or "-",
            ]
        )
    columns = ["arm", "seeds", "mean loss", "spread", "gain", "95 % interval", "p", "against the baseline"]
    return _table(columns, rows)


def _reading(summaries: Sequence[Summary]) -> str:
    tested = sum(summary.interval is not None for summary in summaries)
    return (
        "Spread is the standard deviation over seeds. Gain is the baseline's loss less the arm's, over the seeds that "
        "both have finished; its interval and p come from a paired t-test over these (two-sided), and the verdict from "
        "the interval. Nothing is corrected for the number of arms"
        + (f": {tested} tests without any difference give {tested * 0.05:.2g} verdicts of one." if tested else ".")
    )


def _costs(plan: Plan, finished: Sequence[Result]) -> str:
    rows = []
    for arm in plan.arms:
        runs = [result for result in finished if result.run.arm == arm.arm.name]
        if runs:
            measured = max(result.memory for result in runs)
            took = sum(result.seconds for result in runs) / len(runs)
            rows.append(
                [
                    _name(plan, arm.arm.name),
                    count(arm.parameters),
                    count(arm.flops_per_token),
                    count(arm.flops),
                    count(arm.expert_flops),
                    f"{arm.arm.config.training.steps:,}",
                    f"{arm.memory / 2**20:,.0f} / {measured / 2**20:,.0f}",
                    f"{span(arm.seconds.total) if arm.seconds else '-'} / {span(took)}",
                ]
            )
    columns = ["arm", "parameters", "FLOPs a token", "FLOPs", "of experts", "steps"]
    return _table([*columns, "MiB a rank, estimated / measured", "time estimated / in steps"], rows)


def _memory(plan: Plan, finished: Sequence[Result]) -> str:
    """What a rank holds at its peak, as the plan has it, and the measured peak beside it."""
    rows = []
    for arm in plan.arms:
        if measured := [result.memory for result in finished if result.run.arm == arm.arm.name]:
            amounts = [*arm.components.values(), arm.memory, max(measured)]
            cells = [f"{amount / 2**20:,.1f}" for amount in amounts]
            rows.append([_name(plan, arm.arm.name), *cells, f"{arm.memory / max(measured) - 1:+.1%}"])
    names = [name.replace("_", " ") for name in plan.arms[0].components]
    text = (
        "Peak memory of a rank within a step, in MiB, as predicted from the config, and the measured peak. "
        "Gradients come as activations go, so that neither need be there in full at that moment; other is what "
        "the optimizer takes for its step, and what ZeRO 3 and tensor parallelism gather."
    )
    return f"{text}\n\n{_table(['arm', *names, 'together', 'measured', 'estimated off by'], rows)}"


def _fitted(found: Fit | None) -> str:
    if found is None:
        return "Too few different arms for a fit."
    rows = [
        [each.of, f"{each.value:+.4f}", f"{each.interval[0]:+.4f} to {each.interval[1]:+.4f}"]
        for each in found.coefficients
    ]
    excluded = (
        f" Left out, being nearly constant or nearly following from the others: {', '.join(found.excluded)}."
        if found.excluded
        else ""
    )
    text = (
        f"log loss as a line in the logarithms of these, least squares over {found.points} arms, each the mean of its "
        f"seeds; what the line leaves, to which all else that arms differ in adds, has a standard deviation of "
        f"{found.residual:.2%}.{excluded} It is no law beyond these arms."
    )
    return f"{text}\n\n{_table(['of', 'exponent', '95 % interval'], rows)}"


def _name(plan: Plan, arm: str) -> str:
    return _escaped(next(each.title for each in plan.study.arms if each.name == arm))


def _label(summary: Summary) -> str:
    return _escaped(summary.arm.arm.title)


def _counted(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _escaped(text: str) -> str:
    """Text that is none of ours, on one line, with nothing that Markdown or HTML takes for more than text.

    Character references, which all dialects read alike: GitHub's knows formulas, strokes and more beside.
    """
    return re.sub(r"[&<>\\`*\[\]|~$#{}]|(?<!\w)_|_(?!\w)", lambda found: f"&#{ord(found[0])};", one_line(text))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _drawn(drawing: Drawing, kind: str) -> bytes:
    """A figure as an image; the same figure gives the same bytes."""
    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": drawing.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # it is drawn as a box
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # long labels leave no room for the axes
        metadata = {"Date": None} if kind == "svg" else None
        drawing.figure.savefig(image, format=kind, dpi=150, metadata=metadata)
    return image.getvalue()


def _write(path: Path, content: str | bytes) -> Path:
    write_atomically(path, content)
    return path
