"""Draws scaling.png: predicted speed from 8 to 98,304 GPUs, from a machine file. Prints the numbers as a table.

python docs/scaling.py [MACHINE]
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coe_megatron.config import load
from coe_megatron.estimate.machine import Machine, machine
from coe_megatron.estimate.run_estimate import vocabulary
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.step_time import step_time
from coe_megatron.scale.search import MARGIN, Search
from coe_megatron.study.report.figures.style import COLOURS, PRINT, SMALL, add_letters, style_axes
from coe_megatron.text import aligned

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "1024-gpus.yaml"
RANKS = (8, 64, 512, 1024, 4096, 16384, 98304)
SAMPLES = 4  # for each GPU in weak scaling, as in the config
DESIGNS = {"MoE(6/64)+2": ["chain.iterations=1", "moe.topk=6"], "CoE-2(3/64)+2": []}
WAYS = {  # dispatcher and chunks
    "alltoall": ("alltoall", 1),
    "deduplicated": ("deduplicated", 1),
    "deduplicated, 4 chunks": ("deduplicated", 4),
}


def weak(found: Machine, expert: int) -> Iterator[tuple[str, str, list[float]]]:
    """Tokens per second and GPU by design, dispatch and number of GPUs, with as many samples for each GPU."""
    for design, overrides in DESIGNS.items():
        for way, (dispatcher, chunks) in WAYS.items():
            speeds = []
            for ranks in RANKS:
                settings = [f"parallel.world_size={ranks}", f"training.global_batch={SAMPLES * ranks}"]
                settings += [f"parallel.expert={min(expert, ranks)}", f"moe.dispatcher={dispatcher}"]
                config = load(CONFIG, [*overrides, *settings, f"moe.overlap_chunks={chunks}"])
                run = RunShape.of(config, vocabulary(config))
                seconds = step_time(run, found).total
                speeds.append(SAMPLES * run.model.seq_length / seconds)
            yield design, way, speeds


def strong(found: Machine, overrides: list[str]) -> Iterator[tuple[float, str]]:
    """Tokens per second and GPU of the fastest layout for the config's own batch, and this layout."""
    assert found.memory.capacity is not None
    config = load(CONFIG, overrides)
    for ranks in RANKS:
        run = RunShape.of(config, vocabulary(config), ranks)
        best = Search(run, found, MARGIN * found.memory.capacity).best(1).best[0]
        tokens = config.training.global_batch * run.model.seq_length
        yield tokens / best.time.total / ranks, f"{best.run.layout}, {best.run.config.moe.dispatcher}"


def draw(name: str) -> None:
    """Draw the picture for a machine, and print what it shows."""
    found = machine(name)
    figure = Figure(figsize=(6.9, 2.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    rows = [["", *(f"{ranks:,}" for ranks in RANKS)]]
    for axes, expert in zip(panels, (8, 64), strict=False):
        for design, way, speeds in weak(found, expert):
            style = {"color": COLOURS[list(DESIGNS).index(design)], "linestyle": _DASHES[way]}
            axes.plot(RANKS, speeds, **style, linewidth=1.1, label=f"{design}, {way}")
            rows.append([f"EP {expert}, {design}, {way}", *(f"{speed:,.0f}" for speed in speeds)])
        axes.set_title(f"{SAMPLES} samples per GPU, EP {expert}", loc="left")
    for design, overrides in DESIGNS.items():
        fastest = list(strong(found, overrides))
        colour = COLOURS[list(DESIGNS).index(design)]
        panels[2].plot(RANKS, [speed for speed, _ in fastest], ".-", color=colour, linewidth=1.1)
        rows.append([f"4,096 samples, {design}, fastest layout", *(f"{speed:,.0f}" for speed, _ in fastest)])
        for ranks, (_, layout) in zip(RANKS, fastest, strict=True):
            print(f"{design}, {ranks:,} GPUs: {layout}")
    panels[2].set_title("4,096 samples, fastest layout", loc="left")
    for axes in panels:
        _finish(axes)
    panels[0].set_ylabel("tokens per second and GPU")
    add_letters(list(panels))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=SMALL)
    figure.savefig(HERE / "scaling.png", dpi=200)
    print("\n".join(aligned(rows, "<" + ">" * len(RANKS))))


def _finish(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs")
    style_axes(axes)


_DASHES = {"alltoall": ":", "deduplicated": "--", "deduplicated, 4 chunks": "-"}

if __name__ == "__main__":
    with matplotlib.rc_context(PRINT):
        draw(sys.argv[1] if len(sys.argv) > 1 else "h100")
