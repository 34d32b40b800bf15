"""Figures for print: nothing overlaps or is cut whatever arms are called, sizes, facets, descriptions, one per axis."""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from omegaconf import OmegaConf
from scipy import stats
from small_study import BASE, STUDY
from study_made_up import leave, leave_all

from coe_megatron.study.plan.arms import Run
from coe_megatron.study.plan.cost_table import Plan, make_plan
from coe_megatron.study.report.comparison import Summary, compare
from coe_megatron.study.report.figures.draw import arms_shown, draw
from coe_megatron.study.report.figures.label_column import spread
from coe_megatron.study.report.figures.panels import MAX_ARMS, facets, half_widths
from coe_megatron.study.report.figures.style import (
    DOUBLE,
    SINGLE,
    StudyFigure,
    arm_styles,
    short_label,
    text_width,
)
from coe_megatron.study.report.report import as_html, as_markdown, render
from coe_megatron.study.report.results import Result, collect

pytestmark = pytest.mark.thorough

Write = Callable[..., Path]
TUNE = {"setting": "optimizer.lr", "values": [1e-3, 2e-3, 4e-3], "seeds": [101, 102]}


def loss_of(run: Run) -> float:
    return (
        4.0 - 0.1 * run.config.chain.iterations + 0.001 * run.config.moe.ffn_hidden_size + 0.03 * (run.seed % 10) ** 2
    )


def planned(write: Write, output: Path, axes: Mapping[str, Any], baseline: Mapping[str, Any], **more: Any) -> Plan:
    return make_plan(write(output=str(output), axes=axes, skip=None, baseline=baseline, **more))


def drawn(plan: Plan) -> dict[str, StudyFigure]:
    leave_all(plan.study.runs, loss_of)
    results = collect(plan)
    return {each.name: each for each in draw(plan, results, compare(results, plan.arms))}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[Result]]:
    """Nine arms of two axes, tuned, with answers by group: every figure there is."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "base.yaml").write_text(BASE)
    axes = {
        "width": {f"w{n}": {"moe.ffn_hidden_size": 16 * n, "chain.iterations": n} for n in (1, 2, 3)},
        "norm": {"chain.norm_placement": ["prenorm", "reference", "iteration_norm"]},
    }
    changes = {"axes": axes, "skip": [], "baseline": {"width": "w1"}, "tune": TUNE, "output": str(folder / "out")}
    OmegaConf.save(OmegaConf.create(STUDY | changes), folder / "study.yaml")
    for run in make_plan(folder / "study.yaml").tuning_runs:
        leave(run, loss_of(run) + abs(math.log2(run.config.optimizer.lr / 2e-3)))
    plan = make_plan(folder / "study.yaml")
    for run in plan.study.runs:
        groups = {f"{hops} hops": {"accuracy": 1 / (hops + run.seed), "problems": 9} for hops in (1, 2, 3)}
        leave(run, loss_of(run), answer_accuracy=0.5, answer_problems=27, answer_groups=groups)
    return plan, collect(plan)


def named(summaries: Sequence[Summary], labels: Sequence[Sequence[str]]) -> list[Summary]:
    """The same arms with other labels."""
    changed = []
    for summary, own in zip(summaries, labels, strict=True):
        arm = summary.arm.arm
        arm = replace(arm, labels=dict(zip(arm.labels, own, strict=True)))
        changed.append(replace(summary, arm=replace(summary.arm, arm=arm)))
    return changed


def texts_of(figure: Figure) -> list[Text]:
    """The texts that are drawn, with something in them."""
    figure.draw_without_rendering()
    hidden = set()
    for axes in figure.findobj(lambda artist: hasattr(artist, "xaxis")):
        for axis in (axes.xaxis, axes.yaxis):
            ticks = set(axis._update_ticks()) if axes.get_visible() else set()
            every = {*axis.get_major_ticks(), *axis.get_minor_ticks()}
            hidden |= {label for tick in every - ticks for label in (tick.label1, tick.label2)}
        if not axes.get_visible():
            hidden |= set(axes.findobj(Text))
    found = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text() and artist.get_visible())
    return [text for text in found if text not in hidden]


def overlaps(first: Bbox, second: Bbox) -> bool:
    """Whether boxes share more than a rounded edge."""
    both = Bbox.intersection(first, second)
    return both is not None and both.width > 0.5 and both.height > 0.5


def collisions(figure: Figure) -> Iterator[str]:
    """Pairs of texts that overlap, legends on data, and texts that the figure cuts."""
    texts = texts_of(figure)
    boxes = [text.get_window_extent() for text in texts]
    for index, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        for other, second in zip(texts[:index], boxes[:index], strict=True):
            if overlaps(box, second):
                yield f"{text.get_text()!r} overlaps with {other.get_text()!r}"
        inside = Bbox.intersection(figure.bbox, box)
        if inside is None or inside.width < box.width - 1 or inside.height < box.height - 1:
            yield f"{text.get_text()!r} is cut"
    panels = [axes for axes in figure.findobj(lambda artist: hasattr(artist, "xaxis")) if axes.get_visible()]
    for legend in figure.findobj(lambda artist: type(artist).__name__ == "Legend"):
        if any(overlaps(legend.get_window_extent(), axes.get_window_extent()) for axes in panels):
            yield "a legend is on data"
    for axes in panels:
        for text in axes.texts:
            if text.get_text() and overlaps(text.get_window_extent(), axes.get_window_extent()):
                yield f"{text.get_text()!r} is on data"


LABEL = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=60)
LABELS = st.lists(st.tuples(LABEL, LABEL), min_size=9, max_size=9, unique=True)


@pytest.mark.slow
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(LABELS)
@example([("W" * 200, f"{number}") for number in range(9)])
def test_nothing_overlaps_or_is_cut_whatever_labels_are(
    many: tuple[Plan, list[Result]], labels: list[tuple[str, str]]
) -> None:
    plan, results = many
    summaries = named(compare(results, plan.arms), labels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        for each in draw(plan, results, summaries):
            assert list(collisions(each.figure)) == [], each.name


@pytest.fixture(scope="module")
def figures(many: tuple[Plan, list[Result]]) -> dict[str, StudyFigure]:
    plan, results = many
    return {each.name: each for each in draw(plan, results, compare(results, plan.arms))}


def test_every_figure_fits_a_page_and_can_be_read(figures: Mapping[str, StudyFigure]) -> None:
    assert set(figures) == {
        "tuning", "loss-curves", "gains", "scaling-iterations", "effect-2", "loss-against-memory",
        "memory-by-component", "answers-by-group", "iterations", "routing", "load", "norms", "followers", "followers-2",
    }  # fmt: skip
    for name, each in figures.items():
        width, height = each.figure.get_size_inches()
        assert width in (SINGLE, DOUBLE) and height < 9.8, name
        assert min(text.get_fontsize() for text in texts_of(each.figure)) >= 7, name
        assert list(collisions(each.figure)) == [], name


@pytest.mark.parametrize(
    "name",
    ["tuning", "gains", "effect-2", "scaling-iterations", "loss-against-memory", "iterations", "routing", "norms"],
)
def test_all_marks_are_within_the_axes(figures: Mapping[str, StudyFigure], name: str) -> None:
    figures[name].figure.draw_without_rendering()
    for axes in figures[name].figure.findobj(_is_axes):
        lines = [line for line in axes.lines if line.get_marker() in ("o", "s", "D") and line.get_clip_on()]
        places = [place for line in lines for place in line.get_transform().transform(line.get_xydata())]
        seen = [place for place in places if np.isfinite(place).all()]
        assert seen or axes.get_title(loc="left").endswith("retention")
        assert all(axes.bbox.padded(1).contains(*place) for place in seen)


def test_panels_have_letters_and_no_legend_has_more_than_eight_arms(figures: Mapping[str, StudyFigure]) -> None:
    letters = [axes.get_title(loc="left")[:3] for axes in figures["loss-curves"].figure.findobj(_is_axes)]
    assert letters == [f"({letter})" for letter in "abcdefghi"]  # three facets; tokens are proportional to steps
    for name, each in figures.items():
        legends = each.figure.findobj(lambda artist: type(artist).__name__ == "Legend")
        assert all(len(legend.get_texts()) <= MAX_ARMS for legend in legends), name
    alone = figures["scaling-iterations"].figure.findobj(_is_axes)
    assert [axes.get_title(loc="left") for axes in alone] == [""]


def _is_axes(artist: Any) -> bool:
    return hasattr(artist, "xaxis")


def test_descriptions_have_the_numbers_of_the_data(
    many: tuple[Plan, list[Result]], figures: Mapping[str, StudyFigure]
) -> None:
    plan, results = many
    summaries = compare(results, plan.arms)
    best = min((each for each in summaries), key=lambda each: each.mean or math.inf)
    assert f"the lowest are {best.arm.arm.title} {best.mean:.4f}, " in figures["loss-curves"].alt
    gain = max((each for each in summaries if each.gain is not None), key=lambda each: each.gain or 0)
    low, high = gain.interval or (math.nan, math.nan)
    assert f"{gain.arm.arm.title} {gain.gain:+.4f} ({low:+.4f} to {high:+.4f})" in figures["gains"].alt
    assert "w1 prenorm: 0.002 is best, with 3.9910 nats per token; the worst value has 4.9910." in figures["tuning"].alt
    assert "402 MiB" in figures["loss-against-memory"].alt
    assert "Accuracy in group 1 hops. Of 9, the lowest are w1 prenorm 0.417" in figures["answers-by-group"].alt
    for each in figures.values():
        assert re.search(r"\d", each.alt), each.name


@pytest.mark.parametrize("name", ["gains", "loss-against-memory"])
def test_the_description_is_in_every_form_of_a_figure(
    many: tuple[Plan, list[Result]], figures: Mapping[str, StudyFigure], name: str
) -> None:
    plan, results = many
    image, figure = render(figures[name], "svg"), replace(figures[name], alt='1 < 2 & ]( "x" *y*')
    described = render(figure, "svg")
    root = ElementTree.fromstring(described)
    found = {child.tag.rpartition("}")[2]: child.text for child in root}
    assert (found["title"], found["desc"]) == (name, figure.alt)
    text = as_markdown(plan, "A study", results, compare(results, plan.arms), [figure])
    page = as_html("A study", text, {name: described})
    assert 'alt="1 &#60; 2 &#38; &#93;( &quot;x&quot; &#42;y&#42;" src="data:' in page
    width = figures[name].figure.get_figwidth() * 72
    assert f'<figure style="--width: {width:g}pt">' in page and "<figcaption>" in page and len(image) > 1000


def test_settings_that_vary_together_are_drawn_once(study_file: Write, tmp_path: Path) -> None:
    """C with K at constant C * K: one figure, which names K; the other would be its mirror image."""
    designs = {f"C{c}": {"chain.iterations": c, "moe.topk": 4 // c} for c in (1, 2, 4)}
    found = drawn(planned(study_file, tmp_path / "out", {"design": designs}, {"design": "C1"}))
    assert [name for name in found if name.startswith(("scaling", "effect"))] == ["scaling-iterations"]
    assert "Along them also change moe.topk (4, 2, 1)." in found["scaling-iterations"].caption
    (axes,) = found["scaling-iterations"].figure.findobj(_is_axes)
    line = next(line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 3)
    assert list(line.get_xdata()) == [1, 2, 4] and not found["scaling-iterations"].figure.findobj(_is_legend)


def _is_legend(artist: Any) -> bool:
    return type(artist).__name__ == "Legend"


def test_every_axis_has_a_figure_numbers_as_lines_and_others_as_gains(study_file: Write, tmp_path: Path) -> None:
    axes = {
        "gating": {"own": {"chain.gating": "independent"}, "shared": {"chain.gating": "shared_router"}},
        "width": {"model.hidden_size": [32, 64]},
        "design": {"C2": {"chain.iterations": 2}, "C3": {"chain.iterations": 3}},
    }
    found = drawn(planned(study_file, tmp_path / "out", axes, {"gating": "own", "width": 32, "design": "C2"}))
    names = [name for name in found if name.startswith(("scaling", "effect"))]
    assert names == ["effect-1", "scaling-hidden", "scaling-iterations"]
    assert (
        "Gain over own in nats per token" in found["effect-1"].alt and "shared with 32 C2 +0.0" in found["effect-1"].alt
    )
    (panel,) = found["effect-1"].figure.findobj(_is_axes)
    assert [text.get_text() for text in panel.get_yticklabels()] == ["32 C2", "32 C3", "64 C2", "64 C3"]


def test_arms_that_became_the_same_are_drawn_once(study_file: Write, tmp_path: Path) -> None:
    """A tuned setting can make two arms one."""
    plan = planned(study_file, tmp_path / "out", {"rate": {"optimizer.lr": [1e-3, 2e-3, 4e-3]}}, {"rate": 1e-3})
    first, second, third = plan.arms
    same = replace(third, arm=replace(third.arm, config=replace(second.arm.config, output=third.arm.config.output)))
    summaries = [Summary(each, {1: 4.0}) for each in (first, second, same)]
    assert arms_shown(summaries) == {first.arm.name, second.arm.name}
    text = as_markdown(plan, "A study", collect(plan), summaries, [])
    assert "Of arms with the same settings" not in text  # nothing is finished
    leave_all(plan.study.runs, loss_of)
    text = as_markdown(plan, "A study", collect(plan), summaries, [])
    assert "Of arms with the same settings, figures show one." in text


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20)), min_size=1, max_size=32, unique=True))
def test_facets_hold_every_arm_once_and_at_most_eight(keys: list[tuple[int, int]]) -> None:
    summaries: Any = [_Named(f"{first}_{second}", {"a": f"a{first}", "b": f"b{second}"}) for first, second in keys]
    styles = arm_styles(summaries)
    found = facets(list(styles), styles)
    assert sorted(name for facet in found for name in facet.names) == sorted(styles)
    assert max(len(facet.names) for facet in found) <= MAX_ARMS
    assert len(found) == 1 or len(found) <= 2 * math.ceil(len(keys) / MAX_ARMS)
    assert all(bool(facet.title) == (len(found) > 1) for facet in found)


class _Named:
    """As much of a summary as a style needs."""

    def __init__(self, name: str, labels: Mapping[str, str]) -> None:
        self.name, self.labels, self.title = name, labels, " ".join(labels.values())
        self.arm = self
        self.arm.arm = self  # type: ignore[attr-defined]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=MAX_ARMS))
def test_names_in_a_column_are_apart_within_it_and_stay_where_there_is_space(places: list[float]) -> None:
    places, gap = sorted(places), 0.1
    found = spread(places, gap)
    assert found[0] >= -1e-9 and found[-1] <= 1 + 1e-9
    assert all(later - earlier >= gap - 1e-9 for earlier, later in pairwise(found))
    if all(later - earlier >= gap for earlier, later in pairwise(places)):
        assert found == pytest.approx(places)


@given(LABEL)
@example("W" * 300)
@example("漢" * 40)
def test_labels_fit_their_space(label: str) -> None:
    assert text_width(short_label(label)) <= 2.3
    assert short_label(label) == label or "…" in short_label(label)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=6))
def test_intervals_are_those_of_students_t(values: list[float]) -> None:
    array = np.array(values)
    error = array.std(ddof=1) / math.sqrt(len(values))
    low, high = stats.t.interval(0.95, len(values) - 1, array.mean(), error) if error else (array.mean(),) * 2
    assert float(half_widths(array)) == pytest.approx((high - low) / 2, abs=1e-9)
