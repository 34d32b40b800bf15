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
from coe_megatron.study.plan.cost_table import Plan
from coe_megatron.study.plan.names import joined
from coe_megatron.study.report.comparison import Summary, compare
from coe_megatron.study.report.cost_tables import costs, loss_at_equal_memory, memory_by_component, speedup
from coe_megatron.study.report.equal_memory import equal_memory, peak_memory
from coe_megatron.study.report.figures.draw import arms_shown, draw
from coe_megatron.study.report.figures.style import PRINT, StudyFigure, is_truncated
from coe_megatron.study.report.ladder import LadderFindings, find, prediction_table
from coe_megatron.study.report.loss_tables import (
    answer_groups,
    answers,
    conclusion,
    explanation,
    losses,
    significance,
    validation_sets,
)
from coe_megatron.study.report.markdown_text import counted, escaped, table
from coe_megatron.study.report.results import Result, collect, finished_results, results_csv, timings_csv
from coe_megatron.study.report.scaling_fit import Fit, fit
from coe_megatron.study.report.throughput import over_ranks, ranks_table
from coe_megatron.study.report.tuning import tuning_csv, tuning_table, tuning_text
from coe_megatron.study.report.why import iterations_table

_DOTS = 200  # per inch of a PNG
_SCREEN = 1.4  # size of figures on a screen, as a multiple of that in print
_STYLE = f"""body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }}
p, h1, h2, h3, h4 {{ overflow-wrap: anywhere }}
table {{ border-collapse: collapse; font-size: 13px; display: block; margin: 1em 0; overflow-x: auto }}
th, td {{ padding: .25em .5em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }}
th:first-child, td:first-child {{ text-align: left; min-width: 10em; overflow-wrap: anywhere }}
figure {{ margin: 2em 0 }}
figure img {{ width: calc(var(--width) * {_SCREEN}); max-width: 100%; height: auto }}
figcaption {{ font-style: italic; max-width: 50em }}
@media (max-width: 960px) {{
table {{ font-size: 11px }}
th, td {{ padding: .25em .3em }}
th:first-child, td:first-child {{ min-width: 8em }} }}
@page {{ size: A4; margin: 15mm }}
@media print {{
body {{ max-width: none; margin: 0; padding: 0; font-size: 10pt }}
h1, h2, h3, h4 {{ break-after: avoid }}
table {{ display: table; width: 100%; font-size: 7pt }}
tr, figure {{ break-inside: avoid }}
th, td {{ padding: .15em .3em }}
th:first-child, td:first-child {{ min-width: 6em }}
figure img {{ width: var(--width); max-height: 230mm; object-fit: contain }} }}"""

_FIGURE = re.compile(
    r'<p><img alt="(?P<alt>[^"]*)" src="(?P<name>[\w-]+)\.svg" /></p>\s*<p><em>(?P<caption>.*?)</em></p>'
)
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
    ladder = find(plan)  # refuses a study that has changed since, before anything is written
    results = collect(plan)
    summaries = compare(results, plan.arms, plan.study.settings.margin)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_figures(folder)
    files = [_write(folder / "results.csv", results_csv(results)), _write(folder / "timings.csv", timings_csv(results))]
    if plan.tuning:
        files.append(_write(folder / "tuning.csv", tuning_csv(plan.tuning)))
    figures, images = list(draw(plan, results, summaries, ladder)), dict[str, bytes]()
    for figure in figures:
        images[figure.name] = render(figure, "svg")
        files.append(_write(folder / f"{figure.name}.svg", images[figure.name]))
        files.append(_write(folder / f"{figure.name}.png", render(figure, "png")))
    text = as_markdown(plan, title, results, summaries, figures, ladder)
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
    plan: Plan,
    title: str,
    results: Sequence[Result],
    summaries: Sequence[Summary],
    figures: Sequence[StudyFigure],
    ladder: LadderFindings | None = None,
) -> str:
    """The report as Markdown; figures are separate files."""
    finished, study = finished_results(results), plan.study
    seeds = ", ".join(map(str, study.settings.seeds))
    parts = [
        f"# {escaped(title)}",
        f"{len(finished)} of {len(results)} runs are finished: {counted(plan.arms, 'arm')} with "
        f"{'the seeds' if len(study.settings.seeds) > 1 else 'the seed'} {seeds}. "
        f"{_baselines(summaries)} Losses are final validation losses in nats per token.",
        study.settings.seed_effect,
        _budget(plan),
        *_unfinished(results),
        *_tuning(plan),
        *(_ladder(plan, summaries, ladder) if ladder else []),
    ]
    if finished:
        parts += [
            "## Losses",
            conclusion(summaries),
            losses(summaries),
            significance(summaries, study.settings.margin),
            explanation(summaries, study.settings.margin),
            validation_sets(plan, results),
            answers(plan, results),
            answer_groups(finished),
        ]
        memory, settings = peak_memory(results), study.settings
        solved = [settings.budget.solve] if settings.budget else []
        solved += [settings.tune.setting] if settings.tune else []
        at_memory = equal_memory(summaries, memory, solved, settings.margin)
        parts += [speedup(plan, finished, at_memory), loss_at_equal_memory(summaries, at_memory)]
        parts += ["## Memory by component", memory_by_component(plan, memory)]
        parts += ["## Cost of the arms", costs(plan, finished), ranks_table(over_ranks(summaries, finished))]
        parts += _iterations(plan, finished)
        parts += ["## Loss against parameters, FLOPs and recurrence", _scaling_fit(fit(summaries))]
        shown = (f"![{escaped(each.alt)}]({each.name}.svg)\n\n*{escaped(each.caption)}*" for each in figures)
        parts += ["## Figures", _arms_in_figures(summaries), *shown]
    return "\n\n".join(filter(None, parts)) + "\n"


def as_html(title: str, text: str, images: Mapping[str, bytes]) -> str:
    """The same as a self-contained HTML page; `images` has the figures as SVG, by name."""

    def with_image(found: re.Match[str]) -> str:
        image, alt, caption = images[found["name"]], found["alt"], found["caption"]
        width = re.search(rb'width="([0-9.]+pt)"', image)
        source = f"data:image/svg+xml;base64,{base64.b64encode(image).decode()}"
        size = f' style="--width: {width[1].decode()}"' if width else ""
        return f'<figure{size}><img alt="{alt}" src="{source}"><figcaption>{caption}</figcaption></figure>'

    body = _FIGURE.sub(with_image, markdown.markdown(text, extensions=["tables"]))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(one_line(title))}</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _baselines(summaries: Sequence[Summary]) -> str:
    names = [escaped(joined(summary.arm.arm.labels)) for summary in summaries if summary.is_baseline]
    return f"The baseline is {names[0]}." if len(names) == 1 else f"The baselines are {', '.join(names)}."


def _arms_in_figures(summaries: Sequence[Summary]) -> str:
    """A note if the figures exclude arms or truncate labels; empty in most studies."""
    shown = arms_shown(summaries)
    different = {summary.arm.arm.fingerprint for summary in summaries}
    notes = []
    if len(different) < len(summaries):
        notes.append("Of arms with the same settings, figures show one.")
    if len(shown) < len(different):
        base = sum(summary.is_baseline for summary in summaries)
        notes.append(
            f"Of {len(summaries)} arms, they show {'the baseline' if base == 1 else 'the baselines'} and the "
            f"{len(shown) - base} with the lowest loss."
        )
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
    cells = [[escaped(cell) for cell in row] for row in rows]
    return ["## Tuning", escaped(tuning_text(plan.tuning)), table([escaped(each) for each in columns], cells)]


def _ladder(plan: Plan, summaries: Sequence[Summary], ladder: LadderFindings) -> list[str]:
    parts = ["## Scaling law", escaped(ladder.said), *([table(*ladder.parameters)] if ladder.parameters else [])]
    if (registered := ladder.registered) is None:
        return parts
    columns, rows = prediction_table(plan, registered, summaries)
    cells = [[escaped(cell) for cell in row] for row in rows]
    known = f"Registered before the largest width ran; SHA-256 of registration.json: {registered.sha256}."
    return [*parts, "### The largest width, as predicted", known, table(columns, cells)]


def _unfinished(results: Sequence[Result]) -> list[str]:
    missing = [result for result in results if not result.finished]
    if not missing:
        return []
    rows = [[escaped(result.run.arm), str(result.run.seed), escaped(result.state)] for result in missing]
    return ["Not in the tables and figures below:", table(["arm", "seed", "state"], rows)]


def _iterations(plan: Plan, finished: Sequence[Result]) -> list[str]:
    """What the iterations of each chain do; nothing without chains."""
    titles = {arm.arm.name: escaped(joined(arm.arm.labels)) for arm in plan.arms}
    said, columns, rows = iterations_table(finished, titles)
    return ["## What the iterations do", said, table(columns, rows)] if rows else []


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
    return f"{text}\n\n{table(['quantity', 'exponent', '95 % CI'], rows)}"


def render(figure: StudyFigure, kind: str) -> bytes:
    """A figure as an image of kind "svg" or "png"; the same figure gives the same bytes."""
    image = io.BytesIO()
    with matplotlib.rc_context(PRINT | {"svg.hashsalt": figure.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # such a glyph is drawn as a box
        warnings.filterwarnings(
            "ignore", "constrained_layout not applied"
        )  # long labels may leave no space for the axes
        metadata = {"Date": None, "Title": figure.name} if kind == "svg" else None
        figure.figure.savefig(image, format=kind, dpi=_DOTS, metadata=metadata)
    return _with_description(image.getvalue(), figure.alt) if kind == "svg" else image.getvalue()


def _with_description(image: bytes, text: str) -> bytes:
    """An SVG whose description, below its title, is the text."""
    description = f"</title><desc>{html.escape(text)}</desc>".encode(errors="replace")
    return image.replace(b"</title>", description, 1)


def _write(path: Path, content: str | bytes) -> Path:
    write_atomically(path, content)
    return path
