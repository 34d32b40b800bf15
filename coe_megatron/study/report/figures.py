"""The figures of a study. Colours are told apart by colour-blind readers, and lines by dashes and marks in print."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import mean
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from coe_megatron.study.plan.names import joined
from coe_megatron.study.report.comparison import Summary
from coe_megatron.study.report.results import Result, done
from coe_megatron.text import shortened

# Okabe and Ito's palette without yellow, which print loses.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# In print without colour, marks stand for these, and the filling of marks for dashes.
_MARKS, _DASHES, _FILLS = "osD^vP*", ("-", "--", ":", "-."), ("full", "none", "left", "bottom")
_HATCHES = ("", "//", "..", "\\\\", "xx", "--")  # and these for colours of bars
_GREY = "#666666"
_MOST_PAIRS = 4  # of an arm, of experts that follow one another
_MOST_TICKS = 12  # of rows, without overlap
_MOST_ARMS = 32  # in the figures; of a thousand they would be larger than a PNG can be, and nobody could read it
_LONGEST_LABEL = 36  # columns
_LITERAL = {"parse_math": False}  # a label with $ is no formula of TeX
_MIB = 2**20
_Amount: TypeAlias = Callable[[Result, Mapping[str, Any]], float]  # of a run at one of its evaluations
_LOSS = "validation loss (nats a token)"


@dataclass(frozen=True)
class Look:
    """How an arm is drawn wherever it is drawn; `label` is its title, shortened, and no other arm's."""

    name: str
    label: str
    colour: str
    mark: str
    dash: str
    fill: Any

    @property
    def marked(self) -> dict[str, Any]:
        """Arguments of matplotlib for its marks."""
        return {"color": self.colour, "marker": self.mark, "fillstyle": self.fill, "markeredgewidth": 1}

    @property
    def drawn(self) -> dict[str, Any]:
        """Arguments of matplotlib for its lines."""
        return {**self.marked, "linestyle": self.dash, "linewidth": 1.4, "markersize": 4.5, "label": self.name}


@dataclass(frozen=True)
class Drawing:
    """A figure, and what stands below it.

    Attributes:
        name: of its files.
        caption: what is shown, and how to read it.
    """

    name: str
    caption: str
    figure: Figure


def draw(results: Sequence[Result], summaries: Sequence[Summary], baseline: str) -> Iterator[Drawing]:
    """All figures that the finished runs allow, of the arms that `arms_shown` names."""
    looks, names = _looks(summaries), arms_shown(summaries, baseline)
    summaries = [summary for summary in summaries if summary.arm.arm.name in names]
    finished = [result for result in done(results) if result.run.arm in names]
    if not finished:
        return
    yield _curves(finished, looks)
    if any(summary.gain is not None for summary in summaries):
        yield _gains(summaries, looks, baseline)
    yield _against_memory(summaries, finished, looks)
    yield from _scaling(summaries, looks)
    yield _memory(finished, looks)
    yield _memory_by_component(finished, looks)
    yield _routing_over_time(finished, looks)
    yield _loads(finished, looks)
    yield _norms(finished, looks)
    if chained := [result for result in finished if _pairs(result)]:
        yield _followers(chained, looks)


def arms_shown(summaries: Sequence[Summary], baseline: str) -> set[str]:
    """The arms in the figures: those with the lowest loss, where there are too many, and the baseline."""
    best = sorted(summaries, key=lambda each: (each.arm.arm.name != baseline, each.mean is None, each.mean))
    return {summary.arm.arm.name for summary in best[:_MOST_ARMS]}


def _looks(summaries: Sequence[Summary]) -> Mapping[str, Look]:
    """Labels of the first axis have the colours and marks, the others' the dashes and fillings.

    Where that are too many of either, arms go through the colours, and once through these the dashes change.
    """
    arms = [summary.arm.arm for summary in summaries]
    keys = [tuple(arm.labels.values()) for arm in arms]
    first = list(dict.fromkeys(key[0] for key in keys))
    rest = list(dict.fromkeys(key[1:] for key in keys))
    apart = len(first) <= len(_COLOURS) and len(rest) <= len(_DASHES)
    looks = {}
    labels = _labels([arm.title for arm in arms])
    for number, (arm, key) in enumerate(zip(arms, keys, strict=True)):
        at, other = (first.index(key[0]), rest.index(key[1:])) if apart else (number, number // len(_COLOURS))
        at, other = at % len(_COLOURS), other % len(_DASHES)
        looks[arm.name] = Look(arm.name, labels[number], _COLOURS[at], _MARKS[at], _DASHES[other], _FILLS[other])
    return looks


def is_cut(title: str) -> bool:
    """Whether figures have no room for all of it."""
    return shortened(title, _LONGEST_LABEL) != title


def _labels(titles: Sequence[str]) -> list[str]:
    """Titles as figures have room for them; those that become alike have the arm's number behind them."""
    short = [shortened(title, _LONGEST_LABEL) for title in titles]
    return [f"{each} ({number})" if short.count(each) > 1 else each for number, each in enumerate(short, 1)]


def _by_arm(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    for name, group in groupby(results, key=lambda result: result.run.arm):
        yield name, list(group)


def _figure(rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 4.2) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes, looks: Mapping[str, Look]) -> None:
    """Below the figure, which grows by it."""
    handles, names = axes.get_legend_handles_labels()
    labels = [looks[name].label for name in names]
    across = max(1, min(len(labels), int(figure.get_figwidth() * 12 / (max(map(len, labels)) + 5))))
    figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(labels) / across))
    # By name first: matplotlib leaves out labels that begin with _.
    made = figure.legend(handles, names, loc="outside lower center", ncols=across, frameon=False, handlelength=3)
    for text, label in zip(made.get_texts(), labels, strict=True):
        text.set(text=label, **_LITERAL)


def _curves(results: Sequence[Result], looks: Mapping[str, Look]) -> Drawing:
    """Loss against steps, tokens, FLOPs and time."""
    amounts: dict[str, tuple[str, _Amount]] = {
        "steps": ("", lambda result, line: line["step"]),
        "tokens counted in the loss": ("", lambda result, line: line["tokens"]),
        "FLOPs of training": ("", lambda result, line: _share(result, line) * result.arm.flops),
        "time in steps": ("s", lambda result, line: _share(result, line) * result.seconds),
    }
    figure, grid = _figure(2, 2, height=6.2)
    for axes, (title, (unit, amount)) in zip(grid.flat, amounts.items(), strict=True):
        _plain(axes)
        for name, runs in _by_arm(results):
            lines = _in_common([result.evaluations for result in runs])
            losses = np.array([[line["valid_loss"] for line in some] for some in lines])
            at = np.array([[amount(result, line) for line in some] for result, some in zip(runs, lines, strict=True)])
            look, every = looks[name], math.ceil(losses.shape[1] / 8)
            axes.plot(at.mean(0), losses.mean(0), **look.drawn, markevery=every)
            axes.fill_between(at.mean(0), losses.min(0), losses.max(0), color=look.colour, alpha=0.15, linewidth=0)
        axes.set_xlabel(title)
        axes.xaxis.set_major_formatter(EngFormatter(unit))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _from_the_first_quarter(axes, results, amount)
    for axes in grid[:, 0]:
        axes.set_ylabel(_LOSS)
    _legend(figure, grid[0, 0], looks)
    return Drawing(
        "loss-curves",
        "Validation loss against steps, tokens, FLOPs and time: means over seeds, bands from the lowest to the "
        "highest, from a quarter of the steps on. Time is the machine's, in steps alone.",
        figure,
    )


def _share(result: Result, line: Mapping[str, Any]) -> float:
    return line["step"] / result.run.config.training.steps


def _in_common(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Mapping[str, Any]]]:
    """The lines of those steps that all runs have."""
    steps = set.intersection(*({line["step"] for line in lines} for lines in runs))
    return [[line for line in lines if line["step"] in steps] for lines in runs]


def _from_the_first_quarter(axes: Axes, results: Sequence[Result], amount: _Amount) -> None:
    """The loss before training is many times what arms differ by: begin with what they have after a quarter of it."""
    later = [(result, line) for result in results for line in result.evaluations if _share(result, line) >= 0.25]
    losses, at = [line["valid_loss"] for _, line in later], [amount(result, line) for result, line in later]
    margin = 0.05 * (max(losses) - min(losses)) or 0.1
    axes.set_ylim(min(losses) - margin, max(losses) + margin)
    axes.set_xlim(left=min(at) - 0.03 * max(at))


def _gains(summaries: Sequence[Summary], looks: Mapping[str, Look], baseline: str) -> Drawing:
    """Who beats the baseline."""
    shown = [summary for summary in summaries if summary.gain is not None]
    figure, grid = _figure(height=1.2 + 0.38 * len(shown))
    axes: Axes = grid[0, 0]
    _plain(axes)
    base = next(summary for summary in summaries if summary.arm.arm.name == baseline)
    for row, summary in enumerate(shown):
        look = looks[summary.arm.arm.name]
        seeds = [base.losses[seed] - loss for seed, loss in summary.losses.items() if seed in base.losses]
        axes.plot(seeds, [row] * len(seeds), "|", color=look.colour, markersize=9)
        axes.plot([summary.gain or 0.0], [row], **look.marked, markersize=7)
        if summary.interval is not None:
            axes.plot(summary.interval, [row, row], color=look.colour, linewidth=1.4)
    axes.axvline(0, color=_GREY, linewidth=1)
    axes.set_yticks(range(len(shown)), [looks[summary.arm.arm.name].label for summary in shown], **_LITERAL)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("gain in validation loss (nats a token)")
    return Drawing(
        "gains",
        f"Gain over the baseline, {joined(base.arm.arm.labels)}, seed by seed (strokes), their mean (marks) and its "
        "interval of 95 % confidence (lines). Right of 0 is better.",
        figure,
    )


def _against_memory(summaries: Sequence[Summary], results: Sequence[Result], looks: Mapping[str, Look]) -> Drawing:
    """Loss against memory, and the arms that no other beats in both."""
    figure, grid = _figure()
    axes: Axes = grid[0, 0]
    _plain(axes)
    measured = {name: mean(result.memory for result in runs) / _MIB for name, runs in _by_arm(results)}
    points = []
    for summary in summaries:
        name = summary.arm.arm.name
        if name in measured and summary.mean is not None:
            _with_spread(axes, measured[name], summary, looks[name])
            points.append((measured[name], summary.mean))
    front = pareto(points)
    axes.step([x for x, _ in front], [y for _, y in front], where="post", color=_GREY, linestyle=":", zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("memory of a rank at its peak, measured (MiB)")
    axes.set_ylabel(_LOSS)
    _legend(figure, axes, looks)
    return Drawing(
        "loss-against-memory",
        "Final validation loss against memory: means over seeds, bars from the lowest to the highest. The dotted line "
        "is the Pareto front: no arm has both less memory and less loss than one on it.",
        figure,
    )


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points, less being better in both coordinates, those that no other beats; by their first coordinate."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


_SCALED: dict[str, tuple[str, Callable[[Any], float]]] = {
    "iterations": ("C, iterations", lambda config: config.chain.iterations),
    "choices": ("K, experts a token visits in an iteration", lambda config: config.moe.topk),
    "experts": ("N, routed experts", lambda config: config.moe.num_experts),
    "layers": ("L, layers", lambda config: config.model.num_layers),
    "steps": ("steps", lambda config: config.training.steps),
    "learning-rate": ("learning rate", lambda config: config.optimizer.lr),
}
_FEWEST = {"learning-rate": 3}  # values; two may be those of two topologies, and no axis of their own


def _scaling(summaries: Sequence[Summary], looks: Mapping[str, Look]) -> Iterator[Drawing]:
    """Final loss against C, K, N, L, steps or learning rate, where an axis of the study varies one of them."""
    known = [summary for summary in summaries if summary.mean is not None]
    for name, (title, value) in _SCALED.items():
        groups = [
            group for group in _differing_in_one_axis(known) if len(_values(group, value)) >= _FEWEST.get(name, 2)
        ]
        if groups:
            shown = [summary for summary in known if any(summary in group for group in groups)]
            yield _scaled(f"scaling-{name}", title, value, shown, groups, looks)


def _scaled(
    name: str,
    title: str,
    value: Callable[[Any], float],
    shown: Sequence[Summary],
    groups: Sequence[Sequence[Summary]],
    looks: Mapping[str, Look],
) -> Drawing:
    figure, grid = _figure()
    axes: Axes = grid[0, 0]
    _plain(axes)
    for summary in shown:
        _with_spread(axes, value(summary.arm.arm.config), summary, looks[summary.arm.arm.name])
    for group in groups:
        if len(_values(group, value)) == len(group):  # else two of them differ in something else, and no line is right
            line = sorted((value(summary.arm.arm.config), summary.mean or 0.0) for summary in group)
            axes.plot(*zip(*line, strict=True), color=_GREY, linewidth=0.8, zorder=1)
    ticks = _values(shown, value)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(title)
    axes.set_ylabel(_LOSS)
    _legend(figure, axes, looks)
    return Drawing(
        name,
        f"Final validation loss against {title}: means over seeds, bars from the lowest to the highest. Lines join "
        "arms that differ in one axis of the study alone; whatever else that axis changes, changes along them too.",
        figure,
    )


def _with_spread(axes: Axes, at: float, summary: Summary, look: Look) -> None:
    """A mark at the mean over seeds, and a bar from the lowest to the highest."""
    losses, middle = list(summary.losses.values()), summary.mean or 0.0
    spread = [[middle - min(losses)], [max(losses) - middle]]
    axes.errorbar(at, middle, spread, **look.marked, linestyle="", label=look.name, capsize=3)


def _differing_in_one_axis(summaries: Sequence[Summary]) -> Iterator[list[Summary]]:
    """For every axis the groups of arms that have the same labels in all others."""
    for axis in summaries[0].arm.arm.labels if summaries else ():

        def others(summary: Summary, axis: str = axis) -> tuple[str, ...]:
            return tuple(label for name, label in summary.arm.arm.labels.items() if name != axis)

        for _, group in groupby(sorted(summaries, key=others), key=others):
            yield list(group)


def _values(summaries: Sequence[Summary], value: Callable[[Any], float]) -> list[float]:
    """The different ones, from the smallest on."""
    return sorted({value(summary.arm.arm.config) for summary in summaries})


def _memory(results: Sequence[Result], looks: Mapping[str, Look]) -> Drawing:
    """Is the estimate right?"""
    figure, grid = _figure(width=5.2, height=4.8)
    axes: Axes = grid[0, 0]
    _plain(axes)
    for name, runs in _by_arm(results):
        look, estimated = looks[name], runs[0].arm.memory / _MIB
        measured = [result.memory / _MIB for result in runs]
        axes.plot([estimated] * len(runs), measured, **look.marked, linestyle="", label=look.name, alpha=0.8)
    amounts = [amount / _MIB for result in results for amount in (result.arm.memory, result.memory)]
    ends = 0.95 * min(amounts), 1.05 * max(amounts)
    axes.plot(ends, ends, color=_GREY, linewidth=1)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("memory of a rank at its peak, estimated (MiB)")
    axes.set_ylabel("measured (MiB)")
    _legend(figure, axes, looks)
    return Drawing(
        "memory", "Memory estimated by the plan against what runs measured; on the line the estimate is right.", figure
    )


def _memory_by_component(results: Sequence[Result], looks: Mapping[str, Look]) -> Drawing:
    """What is the memory made of?"""
    arms = [(looks[name].label, runs[0].arm.components, runs) for name, runs in _by_arm(results)]
    figure, grid = _figure(height=1.4 + 0.38 * len(arms))
    axes: Axes = grid[0, 0]
    _plain(axes)
    begins = np.zeros(len(arms))
    for name, colour, hatch in zip(arms[0][1], _COLOURS, _HATCHES, strict=False):
        amounts = np.array([parts[name] / _MIB for _, parts, _ in arms])
        bars = axes.barh(range(len(arms)), amounts, 0.6, begins, color=colour, hatch=hatch, edgecolor="white")
        bars.set_label(name.replace("_", " "))
        begins += amounts
    measured = [max(result.memory for result in runs) / _MIB for _, _, runs in arms]
    axes.plot(measured, range(len(arms)), "|", color="black", markersize=16, markeredgewidth=2, label="measured peak")
    axes.set_yticks(range(len(arms)), [label for label, _, _ in arms], **_LITERAL)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel("memory of a rank at its peak (MiB)")
    handles, labels = axes.get_legend_handles_labels()
    figure.set_figheight(figure.get_figheight() + 0.5)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return Drawing(
        "memory-by-component",
        "What a rank holds when it holds most, by component, as the plan foresees it; strokes are the measured peaks.",
        figure,
    )


def _routing_over_time(results: Sequence[Result], looks: Mapping[str, Look]) -> Drawing:
    """What routers do as they learn."""
    shown = {
        "routing_entropy": "entropy of routers / log N",
        "routing_load_max_over_mean": "busiest expert / mean load",
        "routing_dead_experts": "experts without a token",
        "routing_overlap": "retention: share of repeated experts",
    }
    figure, grid = _figure(2, 2, height=6.2)
    for axes, (key, title) in zip(grid.flat, shown.items(), strict=True):
        _plain(axes)
        for name, runs in _by_arm(results):
            first, look = runs[0], looks[name]
            lines = [line for line in first.steps if line.get(key) is not None]
            unit = math.log(first.run.config.moe.num_experts) if key == "routing_entropy" else 1.0
            values = [line[key] / unit for line in lines]
            steps = [line["step"] for line in lines]
            axes.plot(steps, values, **look.drawn, markevery=max(1, len(steps) // 6))
        axes.set_title(title, fontsize="medium", loc="left")
    for axes in grid[1]:
        axes.set_xlabel("steps")
    _legend(figure, grid[0, 0], looks)
    return Drawing(
        "routing",
        "Routing over training, means over layers and iterations, of each arm's first finished seed. Retention counts "
        "choices that fell on an expert which the token had had in an earlier iteration of the layer.",
        figure,
    )


def _loads(results: Sequence[Result], looks: Mapping[str, Look]) -> Drawing:
    """Who carries how much, by layer and iteration."""
    arms = [(name, runs[0].steps[-1]["routing"]) for name, runs in _by_arm(results)]
    columns = min(3, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure, grid = _figure(rows, columns, width=3.0 * columns + 1, height=0.6 + 2.4 * rows)
    top = max(max(part["load"]) * len(part["load"]) for _, parts in arms for part in parts)
    for axes, (name, parts) in zip(grid.flat, arms, strict=False):
        load = np.array([sorted((share * len(part["load"]) for share in part["load"]), reverse=True) for part in parts])
        image = axes.imshow(load, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        ticks = range(0, len(parts), math.ceil(len(parts) / _MOST_TICKS))
        axes.set_yticks(ticks, [f"{parts[row]['layer']}.{parts[row]['iteration']}" for row in ticks], fontsize=7)
        axes.set_title(looks[name].label, fontsize="small", loc="left", **_LITERAL)
        axes.set_xlabel("experts, busiest first")
    for axes in grid.flat[len(arms) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("layer.iteration")
    figure.colorbar(image, ax=grid, shrink=0.8, aspect=20 * rows, label="load / mean load")
    return Drawing(
        "load",
        "Load of the experts by layer and iteration in the last step of each arm's first finished seed; 1 is perfect "
        "balance.",
        figure,
    )


def _norms(results: Sequence[Result], looks: Mapping[str, Look]) -> Drawing:
    """Does the chain's state grow?"""
    figure, grid = _figure(1, 2, height=3.8)
    for axes, key, title in (
        (grid[0, 0], "state_norm", "norm of the state x(t)"),
        (grid[0, 1], "increment_over_state", "increment over state"),
    ):
        _plain(axes)
        for name, runs in _by_arm(results):
            parts, look = runs[0].steps[-1]["routing"], looks[name]
            most = max(part["iteration"] for part in parts)
            at = [part["layer"] + (part["iteration"] - 1) / most for part in parts]
            axes.plot(at, [part[key] for part in parts], **look.drawn)
        axes.set_title(title, fontsize="medium", loc="left")
        axes.set_xlabel("layer, its iterations one after the other")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yscale("log")  # a chain that runs away is not to hide the others
    _legend(figure, grid[0, 0], looks)
    return Drawing(
        "norms",
        "Root mean square of the chain's state after each iteration, and of what its experts added against what they "
        "were given, in the last step of each arm's first finished seed.",
        figure,
    )


def _pairs(result: Result) -> list[Mapping[str, Any]]:
    """The entries that say which experts follow which."""
    return [part for part in result.steps[-1]["routing"] if part.get("pairs")]


def _followers(results: Sequence[Result], looks: Mapping[str, Look]) -> Drawing:
    """Which experts follow which."""
    arms = [(name, _spread(_pairs(runs[0]), _MOST_PAIRS)) for name, runs in _by_arm(results)]
    columns = max(len(parts) for _, parts in arms)
    figure, grid = _figure(len(arms), columns, width=1.0 + 1.9 * columns, height=0.6 + 2.0 * len(arms))
    for row, (name, parts) in zip(grid, arms, strict=True):
        for axes, part in zip(row, parts, strict=False):
            image = axes.imshow(_lift(part["pairs"]), cmap="cividis", vmin=-3, vmax=3, interpolation="nearest")
            axes.set_title(f"layer {part['layer']}, iteration {part['iteration']}", fontsize="x-small")
        for axes in row[len(parts) :]:
            axes.set_visible(False)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(looks[name].label, fontsize="x-small", **_LITERAL)
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=20 * len(arms))
    bar.set_label("log2 of observed / by chance", fontsize="small")
    return Drawing(
        "followers",
        "Experts that follow one another: rows are experts of the iteration before, columns those of the iteration "
        f"named, both in their own order; light pairs share more tokens than chance would have them share, dark ones "
        f"fewer. A light diagonal would be tokens that stay. Of each arm up to {_MOST_PAIRS} places, evenly from the "
        "first to the last, in the last step of its first finished seed.",
        figure,
    )


def _spread(parts: Sequence[Any], most: int) -> list[Any]:
    """So many of them at most, evenly from the first to the last."""
    return [parts[round(at)] for at in np.linspace(0, len(parts) - 1, min(most, len(parts)))]


def _lift(pairs: Sequence[Sequence[int]]) -> np.ndarray:
    """log2 of how often experts meet over how often they would if iterations chose independently; 0 without tokens."""
    counts = np.array(pairs, dtype=float)
    chance = np.outer(counts.sum(1), counts.sum(0)) / max(counts.sum(), 1.0)
    return np.log2(np.divide(counts + 0.5, chance + 0.5))
