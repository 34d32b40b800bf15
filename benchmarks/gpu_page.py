"""The page of the GPU day, report.md with its figures, from report.json as far as it has got."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coe_megatron.files import write_atomically
from coe_megatron.study.report.figures.style import COLOURS, LITERAL, style_axes

PAGE = "report.md"
_GIB = 2**30
_SHOWN = 15  # kernels of the figure and the table
_LONGEST = 60  # characters of a kernel's name
Results = dict[str, Any]
TITLES = {
    "tier": "GPU tier (`pytest -m gpu`)",
    "layers": "Layers against Megatron's local spec",
    "layers_te": "Layers against Megatron's Transformer Engine spec",
    "steps": "Training steps against Megatron's local MoE layers",
    "steps_te": "Training steps against Megatron's Transformer Engine spec",
    "kernels": "One step by kernels",
    "parity": "Losses against the CPU",
    "arms": "The paper's arms",
}


def write(report: Results, folder: Path) -> None:
    """Write the page and the figures of the parts that have results."""
    lines = [f"# GPU day, {report['date']}", "", *_conditions(report), ""]
    rows = [
        [TITLES[part], each["status"], f"{each['seconds']:.0f} s", each["error"]] for part, each in _finished(report)
    ]
    lines += _table(["part", "status", "time", "remark"], rows)
    for part, each in _finished(report):
        if results := each.get("results"):
            lines += ["", f"## {TITLES[part]}", "", *_SECTIONS[part.removesuffix("_te")](results, folder)]
    write_atomically(folder / PAGE, "\n".join(lines) + "\n")


def _finished(report: Results) -> Iterator[tuple[str, Results]]:
    return ((part, each) for part, each in report["parts"].items() if "status" in each)


def _conditions(report: Results) -> Iterator[str]:
    if report["quick"]:
        yield "**Small sizes, for a rehearsal: times and memory mean nothing.**"
    if machine := report["machine"]:
        if machine["pretended"]:
            yield "**The CUDA device is pretended (tests/rehearsal): nothing here was measured on a GPU.**"
        shown = ("device", "torch", "cuda", "megatron_core", "deepspeed", "transformer_engine", "python")
        yield ", ".join(f"{name.replace('_', ' ')} {machine[name] or 'none'}" for name in shown) + "."


def _tier(tests: Results, _folder: Path) -> list[str]:
    lines = [", ".join(f"{len(names)} {outcome}" for outcome, names in tests.items()) + "."]
    return lines + [f"- {outcome}: `{name}`" for outcome in ("failed", "skipped") for name in tests[outcome]]


def _layers(found: list[Results], _folder: Path) -> list[str]:
    rows = []
    for each in found:
        shape, seconds = each["shape"], each["seconds"]
        sizes = [shape[name] for name in ("hidden", "expert_ffn", "experts", "topk", "tokens")]
        times = [f"{1e3 * seconds[name]['median']:.2f} ms" for name in ("stock", "ours", "coe")]
        ratios = [f"{each[name]['median']:.2f}" for name in ("speed_up", "time_ratio", "time_over_flops")]
        rows.append([*map(str, sizes), *times, *ratios])
    head = ["d", "ffn", "N", "K", "T", "stock", "ours", "CoE-2(K/2)", "stock/ours", "CoE/MoE", "by FLOPs"]
    text = (
        "Medians of forward and backward of one MoE sub-layer with a shared expert in bf16. CoE/MoE are both ours; by "
    )
    text += "FLOPs is that ratio over the ratio of FLOPs."
    return [text, "", *_table(head, rows)]


def _steps(found: Results, _folder: Path) -> list[str]:
    names = {"stock": "Megatron's MoE layer", "ours": "ours, C = 1", "coe": "chain"}
    ours = found.get("ours", {}).get("seconds")
    rows = [
        [names[name], each["arm"], *_speed(each), f"{each['seconds']['median'] / ours['median']:.2f}" if ours else "-"]
        for name, each in found.items()
    ]
    table = _table(["layer", "arm", *_SPEED, "time over ours"], rows)
    return ["The same model and optimizer around the layers.", "", *table]


def _arms(found: Results, folder: Path) -> list[str]:
    done = {arm: each for arm, each in found.items() if "seconds" in each}
    rows = [[arm, *_speed(each), *map(_gib, _peaks(each)), _percent(_peaks(each))] for arm, each in done.items()]
    lines = _table(["arm", *_SPEED, "peak predicted", "measured", "difference"], rows)
    missing = [f"- `{arm}`: {each.get('error') or each['left_out']}" for arm, each in found.items() if arm not in done]
    drawn = {"throughput": _draw_throughput, "memory": _draw_memory} if done else {}
    return [*lines, "", *missing, "", *(_drawn(name, draw, done, folder) for name, draw in drawn.items())]


def _kernels(found: Results, folder: Path) -> list[str]:
    heaviest, total = found["heaviest"][:_SHOWN], found["milliseconds"]
    rows = []
    for each in heaviest:
        spent = each["milliseconds"]
        rows.append([f"`{each['name'][:_LONGEST]}`", f"{spent:.2f} ms", f"{spent / total:.1%}", str(each["calls"])])
    text = f"{found['of']}, {total:.1f} ms in all."
    table = _table(["name", "time", "share", "calls"], rows)
    return [text, "", *table, "", _drawn("kernels", _draw_kernels, found, folder)]


def _parity(found: Results, _folder: Path) -> list[str]:
    rows = []
    for name, each in found.items():
        first, *_, last = (f"{loss:.4f}" for loss in each["cpu"])
        rows.append([name, str(len(each["cpu"])), first, last, f"{each['worst']:.1e}", f"{each['tolerance']:.0e}"])
    return _table(["precision", "steps", "first loss", "last loss", "worst relative difference", "tolerance"], rows)


_SECTIONS: dict[str, Callable[[Any, Path], list[str]]] = {
    "tier": _tier, "layers": _layers, "steps": _steps, "kernels": _kernels, "parity": _parity, "arms": _arms,
}  # fmt: skip
_SPEED = ("step", "tokens/s", "TFLOP/s", "MFU")


def _speed(each: Results) -> list[str]:
    mfu = "-" if each["mfu"] is None else f"{each['mfu']:.1%}"
    step = f"{1e3 * each['seconds']['median']:.0f} ms"
    return [step, f"{each['tokens_per_second']:,.0f}", f"{each['tflops']:.3g}", mfu]


def _peaks(each: Results) -> tuple[int, int | None]:
    """Predicted and measured peak in bytes; the pretended device measures none."""
    return each["memory_predicted"]["peak"], each["memory"].get("peak")


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / _GIB:.2f} GiB"


def _percent(peaks: tuple[int, int | None]) -> str:
    predicted, measured = peaks
    return f"{predicted / measured - 1:+.1%}" if measured else "-"


def _draw_throughput(axes: Axes, done: Results) -> None:
    bars = axes.barh(list(done), [each["tokens_per_second"] for each in done.values()], color=COLOURS[0])
    axes.bar_label(bars, [_speed(each)[-1] for each in done.values()], padding=3, fontsize="small")
    axes.set_xlabel("tokens per second; MFU beside the bars")


def _draw_memory(axes: Axes, done: Results) -> None:
    for number, (kind, colour) in enumerate((("predicted", COLOURS[4]), ("measured", COLOURS[1]))):
        sizes = [(_peaks(each)[number] or 0) / _GIB for each in done.values()]
        axes.barh([at - 0.2 + 0.4 * number for at in range(len(done))], sizes, height=0.38, color=colour, label=kind)
    axes.set_yticks(range(len(done)), list(done))
    axes.set_xlabel("peak memory (GiB)")
    axes.figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize="small")


def _draw_kernels(axes: Axes, found: Results) -> None:
    heaviest = found["heaviest"][:_SHOWN]
    axes.barh(range(len(heaviest)), [each["milliseconds"] for each in heaviest], color=COLOURS[0])
    axes.set_yticks(range(len(heaviest)), [each["name"][:_LONGEST] for each in heaviest], fontsize="small", **LITERAL)
    axes.set_xlabel(f"milliseconds of one step ({found['of']})")


def _drawn(name: str, draw: Callable[[Axes, Results], None], results: Results, folder: Path) -> str:
    """Write a figure of horizontal bars, first on top; returns its line of the page."""
    bars = min(len(results["heaviest"]), _SHOWN) if "heaviest" in results else len(results)
    figure = Figure(figsize=(8.0, 1.2 + 0.3 * bars), layout="constrained")
    axes = figure.subplots()
    draw(axes, results)
    style_axes(axes)
    axes.set_ylim(bars - 0.4, -0.6)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(folder / f"{name}.png", image.getvalue())
    return f"![{name}]({name}.png)"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
