"""The report of a study whose runs are made up: every figure, tables that hold whatever labels say, one HTML file."""

import csv
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.legend import Legend
from programs import python
from study_made_up import leave, leave_all

from coe_megatron.errors import one_line
from coe_megatron.study.plan.arms import Run
from coe_megatron.study.plan.cost_table import Plan, make_plan
from coe_megatron.study.report.comparison import compare
from coe_megatron.study.report.figures import draw as drawing_module
from coe_megatron.study.report.figures.draw import draw
from coe_megatron.study.report.figures.style import StudyFigure, arm_styles
from coe_megatron.study.report.report import as_markdown, render, write_report
from coe_megatron.study.report.results import collect, results_csv

pytestmark = pytest.mark.thorough

Write = Callable[..., Path]
DESIGNS = {
    f"C{iterations}": {"chain.iterations": iterations, "moe.topk": 8 // iterations, "model.num_layers": 4}
    for iterations in (1, 2, 4)
}
FIGURES = {
    "loss-curves", "gains", "scaling-iterations", "effect-2", "loss-against-memory", "memory-by-component",
    "iterations", "routing", "load", "norms", "followers",
}  # fmt: skip


def loss_of(run: Run) -> float:
    return 4.0 - 0.1 * run.config.chain.iterations + 0.03 * run.seed**2


def as_table(text: str) -> list[list[str]]:
    """The cells of the first table; every line has as many."""
    lines = [line for line in text.partition("\n| ")[2].partition("\n\n")[0].splitlines() if line]
    cells = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines]
    assert len({len(row) for row in cells}) == 1
    return cells


class Page(HTMLParser):
    """What a page refers to, and its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources, self.tags, self.cells, self.in_cell = list[str](), list[str](), list[str](), False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "td":
            self.cells.append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.cells[-1] += data


@pytest.fixture
def plan(study_file: Write, tmp_path: Path) -> Plan:
    axes = {"design": DESIGNS, "norm_placement": {"chain.norm_placement": ["prenorm", "reference"]}}
    baseline = {"design": "C1", "norm_placement": "prenorm"}
    return make_plan(study_file(output=str(tmp_path / "out"), axes=axes, skip=None, baseline=baseline), machine="cpu")


def report(plan: Plan, folder: Path, title: str = "A study") -> tuple[str, Page]:
    files = write_report(plan, title, folder)
    assert set(files) == set(folder.iterdir()) and all(file.stat().st_size for file in files)
    return (folder / "report.md").read_text(), Page((folder / "report.html").read_text())


@pytest.mark.slow
def test_every_figure_is_made_and_the_same_again(plan: Plan, tmp_path: Path) -> None:
    leave_all(plan.study.runs, loss_of)
    text, page = report(plan, tmp_path / "report")
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == FIGURES
    assert set(re.findall(r"!\[.*?\]\((.*?)\.svg\)", text)) == FIGURES
    assert len(page.sources) == len(FIGURES)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert not {"link", "script"} & set(page.tags)
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    report(plan, tmp_path / "report")
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_what_the_tables_say(plan: Plan, tmp_path: Path) -> None:
    leave_all(plan.study.runs, loss_of)
    results = collect(plan)
    text = as_markdown(plan, "A study", results, compare(results, plan.arms), [])
    assert "12 of 12 runs are finished: 6 arms with the seeds 1, 2. The baseline is C1 prenorm." in text
    assert "Not in the tables" not in text
    _, _, *rows = as_table(text)
    assert [row[0].strip() for row in rows][:2] == ["C4 prenorm", "C4 reference"] and len(rows) == 6
    assert [cell.strip() for cell in rows[0]] == [
        "C4 prenorm", "2", "3.6750", "0.0636", "+0.3000", "+0.3000 to +0.3000", "-"
    ]  # fmt: skip
    assert "**Too few seeds:** C1 reference, C2 prenorm, C2 reference, C4 prenorm, C4 reference." in text
    assert "p of equivalence" not in text and "seeds that would decide |" not in text
    _, _, first, *_ = as_table(text.partition("## Cost of the arms")[2])
    assert re.fullmatch(r"\d+ / 402", first[6].strip()) and first[7].strip().endswith(" s / 56 s")


def test_final_answers_by_group(plan: Plan, tmp_path: Path) -> None:
    first, second = (run for run in plan.study.runs if run.arm == "c1_prenorm")
    for run, right in ((first, 0.5), (second, 1.0)):
        leave(
            run, answer_accuracy=right, answer_problems=4, answer_groups={"2 hops": {"accuracy": right, "problems": 4}}
        )
    other = next(run for run in plan.study.runs if run.arm == "c2_prenorm")
    leave(other, answer_accuracy=0.25, answer_problems=4, answer_groups={"1 hop": {"accuracy": 0.25, "problems": 4}})
    results = collect(plan)
    text = as_markdown(plan, "A study", results, compare(results, plan.arms, "c1_prenorm"), [])
    head, _, *found = as_table(text.partition("### Final answers by group")[2])
    assert [[cell.strip() for cell in row] for row in (head, *found)] == [
        ["arm", "1 hop", "2 hops"],
        ["c1_prenorm", "-", "0.750 (0.500 to 1.000)"],
        ["c2_prenorm", "0.250 (0.250 to 0.250)", "-"],
    ]
    (row,) = (row for row in csv.DictReader(io.StringIO(results_csv(results))) if row["answer_accuracy_1 hop"])
    assert (row["arm"], row["answer_accuracy_1 hop"], row["answer_accuracy_2 hops"]) == ("c2_prenorm", "0.25", "")


def test_labels_and_errors_are_text_whatever_they_hold(study_file: Write, tmp_path: Path) -> None:
    wild = "a|b <script>x</script> *c* _d_ `e` & [f](g)"
    axes = {"design": {wild: {"moe.topk": 2}, "plain": {"moe.topk": 4}}}
    file = study_file(output=str(tmp_path / "out"), axes=axes, skip=None, baseline={"design": "plain"})
    plan = make_plan(file)
    leave_all(plan.study.runs[:3], loss_of)
    leave(plan.study.runs[3], outcome=f"failed: {wild}\nand more")
    text, page = report(plan, tmp_path / "report", title=f"On {wild}")
    assert "script" not in page.tags and "em" not in page.tags[: page.tags.index("img")] and "a" not in page.tags
    assert page.cells[2] == f"failed: {wild}\\nand more" and wild in page.cells
    assert len(as_table(text)) == 3


def test_a_study_that_has_not_begun_has_a_report_too(plan: Plan, tmp_path: Path) -> None:
    text, page = report(plan, tmp_path / "report")
    assert "0 of 12 runs are finished" in text and len(as_table(text)) == 14 and page.sources == []


def test_one_arm_with_one_seed_and_one_evaluation(study_file: Write, tmp_path: Path) -> None:
    changes = {"axes": {"design": {"only": {"moe.topk": 2}}}, "baseline": {"design": "only"}, "seeds": [7]}
    file = study_file(output=str(tmp_path / "out"), skip=None, set={"training.evaluate_every": 100}, **changes)
    plan = make_plan(file)
    leave_all(plan.study.runs, loss_of)
    text, _ = report(plan, tmp_path / "report")
    assert "1 of 1 runs are finished: 1 arm with the seed 7" in text and "The baseline is the only arm." in text
    assert "![gains]" not in text and "Too few different arms for a fit." in text


def test_without_its_baseline_nothing_is_compared(plan: Plan) -> None:
    leave_all(plan.study.runs[2:8], loss_of)
    results = collect(plan)
    summaries = compare(results, plan.arms)
    text = as_markdown(plan, "A study", results, summaries, [])
    assert "The baseline has no finished run, so no arm can be compared with it." in text
    assert {drawing.name for drawing in draw(plan, results, summaries)} == FIGURES - {"gains"}


def test_seeds_with_other_evaluations_are_averaged_where_both_have_them(plan: Plan) -> None:
    leave_all(plan.study.runs[:2], lambda run: 4.0)
    path = Path(plan.study.runs[0].config.output) / "metrics.jsonl"
    path.write_text(path.read_text().replace('"valid_loss": 6.0', '"valid_loss": null'))
    results = collect(plan)
    curves = next(draw(plan, results, compare(results, plan.arms)))
    (line,) = curves.figure.axes[0].lines
    assert list(line.get_xdata()) == [0, 100] and list(line.get_ydata()) == [10.0, 4.0]


def test_lines_join_arms_that_differ_in_nothing_else(study_file: Write, tmp_path: Path) -> None:
    """Two designs have C = 2: the line goes through the one that has the same K."""
    designs = {
        "C1": {"chain.iterations": 1, "moe.topk": 4},
        "C2": {"chain.iterations": 2, "moe.topk": 2},
        "wide": {"chain.iterations": 2, "moe.topk": 4},
    }
    for count, wanted in (
        (2, {"scaling-iterations": [1, 2]}),
        (3, {"scaling-iterations": [1, 2], "scaling-choices": [2, 4]}),
    ):
        axes = {"design": dict(list(designs.items())[:count])}
        file = study_file(output=str(tmp_path / "out"), axes=axes, skip=None, baseline={"design": "C1"})
        plan = make_plan(file)
        leave_all(plan.study.runs, loss_of)
        results = collect(plan)
        found = {each.name: each.figure for each in draw(plan, results, compare(results, plan.arms))}
        lines = {name: figure.axes[0].lines[0] for name, figure in found.items() if name.startswith("scaling")}
        assert {name: list(line.get_xdata()) for name, line in lines.items()} == wanted
        assert {line.get_linestyle() for line in lines.values()} == {"-"}


@pytest.mark.slow
def test_learning_rates_are_drawn_where_they_are_an_axis(study_file: Write, tmp_path: Path) -> None:
    """And a figure that is not drawn any more goes with the report it was in; what else lies there stays."""
    folder = tmp_path / "report"
    for axis, drawn in (({"optimizer.lr": [1e-3, 2e-3]}, True), ({"chain.norm_placement": ["prenorm"]}, False)):
        first = next(iter(axis.values()))[0]
        file = study_file(output=str(tmp_path / "out"), axes={"rate": axis}, skip=None, baseline={"rate": first})
        plan = make_plan(file)
        leave_all(plan.study.runs, lambda run: run.config.optimizer.lr)
        write_report(plan, "rates", folder)
        assert (folder / "scaling-learning-rate.svg").exists() == drawn
        assert (folder / "loss-curves.png").exists()
        (folder / "my-own.png").touch()
    assert (folder / "my-own.png").exists()


@pytest.mark.parametrize("shape", [(20, 1), (5, 3), (2, 6)])
def test_no_two_arms_look_alike_without_colours(study_file: Write, tmp_path: Path, shape: tuple[int, int]) -> None:
    axes = {
        "width": {f"w{n}": {"moe.ffn_hidden_size": 8 * (n + 1)} for n in range(shape[0])},
        "length": {f"l{n}": {"training.steps": 100 * (n + 1)} for n in range(shape[1])},
    }
    file = study_file(output=str(tmp_path / "out"), axes=axes, skip=None, baseline={"width": "w0", "length": "l0"})
    plan = make_plan(file)
    styles = arm_styles(compare(collect(plan), plan.arms)).values()
    assert (
        len({(style.mark, style.fill) for style in styles})
        == len({(style.mark, style.dash) for style in styles})
        == len(styles)
    )


def test_the_program_names_its_files_and_a_folder_that_cannot_be_written(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    done = python("launch/study.py", "report", file, "--to", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.splitlines()] == [
        "results.csv", "timings.csv", "report.md", "report.html"
    ]  # fmt: skip
    done = python("launch/study.py", "report", file, "--to", file)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"study.py: error: the report's folder is {file}: it is a file, where a folder is needed" in done.stderr


# Labels, and what a figure shows where that is something else.
HOSTILE = {
    r"$\frac{a$ b": None, "a, b": None, "=1+1": None, "@x": None, "_x": None, "%s{0}": None, "שלום": None,
    "e\u0301": None, "🙂": None, "<b>x</b>": None, "[x](javascript:x)": None, "a|b`c`\\": None, "\t=2": r"\t=2",
    "a\nb": r"a\nb", "\x00": r"\x00", "n" * 254: "n" * 26 + "…" + "n" * 9, "n" * 255: None,
}  # fmt: skip


@pytest.fixture
def hostile(study_file: Write, tmp_path: Path) -> Plan:
    axes = {"de, sign": {label: {"moe.ffn_hidden_size": 8 * number} for number, label in enumerate(HOSTILE, 1)}}
    file = study_file(
        output=str(tmp_path / "out"), axes=axes, skip=None, baseline={"de, sign": r"$\frac{a$ b"}, seeds=[1]
    )
    plan = make_plan(file)
    leave_all(plan.study.runs, loss_of)
    return plan


def legend(drawing: StudyFigure) -> list[str]:
    """The names in all legends of a figure."""
    found = drawing.figure.findobj(lambda artist: isinstance(artist, Legend))
    return [text.get_text() for each in found for text in each.get_texts()]


def without_letters(titles: list[str]) -> list[str]:
    """Titles of panels as they would be without (a), (b), ..."""
    assert all(re.match(r"\([a-z]\) ", title) for title in titles)
    return [title[4:] for title in titles]


@pytest.mark.filterwarnings("error")
def test_figures_draw_labels_literally(hostile: Plan) -> None:
    """Without warnings of glyphs that are missing; long labels are cut, and what is alike then has a number."""
    results = collect(hostile)
    found = {each.name: each for each in draw(hostile, results, compare(results, hostile.arms))}
    wanted = [shown or label for label, shown in HOSTILE.items()]
    wanted[-2:] = [f"{wanted[-2]} (16)", f"{wanted[-2]} (17)"]
    for name in ("loss-curves", "routing", "norms"):
        assert legend(found[name]) == wanted
    marks = [text.get_text() for axes in found["loss-against-memory"].figure.axes for text in axes.texts]
    assert sorted(name.removeprefix("   ") for name in marks if name) == sorted(wanted)
    rows = [text.get_text() for axes in found["gains"].figure.axes for text in axes.get_yticklabels()]
    assert rows == wanted[1:]
    for start in ("load", "followers"):
        panels = [axes for name in found if name.startswith(start) for axes in found[name].figure.axes]
        assert without_letters(list(filter(None, (axes.get_title(loc="left") for axes in panels)))) == wanted
    for name in ("loss-against-memory", "gains"):
        assert render(found[name], "svg").startswith(b"<?xml")  # matplotlib reads formulas as it draws


def test_a_report_holds_hostile_labels_whole_and_as_text(
    hostile: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coe_megatron.study.report.report.draw", lambda *_: ())
    text, page = report(hostile, tmp_path / "report", title="On $x$ <i>\n| \udcff #")
    shown = [one_line(label) for label in HOSTILE]
    assert set(shown) <= set(page.cells) and not {"b", "i", "a", "code", "em"} & set(page.tags)
    assert "$" not in text and text.startswith("# On &#36;x&#36; &#60;i&#62;&#92;n")
    assert '"a, b"' in text and "Long labels are truncated" in text


def test_csv_holds_labels_as_they_are_and_no_formulas(hostile: Plan) -> None:
    found = list(csv.DictReader(io.StringIO(results_csv(collect(hostile)), newline="")))
    labels = [row["axis_de, sign"] for row in found]
    assert [label.removeprefix("'") for label in labels] == list(HOSTILE)
    assert [label for label in labels if label.startswith("'")] == ["'=1+1", "'@x", "'\t=2"]


def test_of_many_arms_figures_show_the_best_and_the_baseline(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing_module, "MAX_ARMS", 3)
    leave_all(plan.study.runs, loss_of)
    results = collect(plan)
    summaries = compare(results, plan.arms)
    assert legend(next(draw(plan, results, summaries))) == ["C1 prenorm", "C4 prenorm", "C4 reference"]
    text = as_markdown(plan, "A study", results, summaries, [])
    assert "Of 6 arms, they show the baseline and the 2 with the lowest loss." in text
