"""A picture of where the predicted time of a step goes: a bar for each part, and all of them side by side."""

import io

from coe_megatron.estimate.step_time import StepTime
from coe_megatron.text import duration

# Of colours that colour-blind readers can tell apart: parts, and what they are.
_KINDS = {
    "products": (
        "#0072B2",
        ("attention", "attention_scores", "routers", "experts", "shared", "dense", "variants", "output"),
    ),
    "other work": ("#56B4E9", ("moves", "starts", "update")),
    "communication that nothing hides": (
        "#D55E00",
        ("all_to_all", "tensor", "context", "pipeline", "gradients", "weights"),
    ),
    "waiting for other ranks": ("#999999", ("bubble", "imbalance")),
}


def draw_step(time: StepTime, title: str) -> bytes:
    """Draw the parts of a step; returns a PNG.

    Args:
        title: short lines, such as the layout and the machine.
    """
    from matplotlib.figure import Figure  # takes a second

    parts = sorted(time.parts.items(), key=lambda part: part[1])
    colours = {name: colour for colour, names in _KINDS.values() for name in names}
    figure = Figure(figsize=(7, 1.3 + 0.26 * len(parts)), layout="constrained")
    whole, each = figure.subplots(2, 1, height_ratios=[1, len(parts)])
    start = 0.0
    for name, seconds in reversed(parts):
        whole.barh(0, seconds, left=start, color=colours[name], edgecolor="white", linewidth=1.0)
        start += seconds
    whole.set_title(title, fontsize=9, loc="left", parse_math=False)
    whole.set_xlim(0, time.total)
    whole.set_yticks([0], [duration(time.total)])
    each.barh([name.replace("_", "-") for name, _ in parts], [seconds for _, seconds in parts])
    for bar, (name, seconds) in zip(each.patches, parts, strict=True):
        bar.set_color(colours[name])
        each.annotate(
            f" {duration(seconds)}, {seconds / time.total:.1%}", (seconds, bar.get_y() + 0.4), va="center", fontsize=8
        )
    each.set_xlim(0, 1.25 * parts[-1][1])
    each.set_xlabel("seconds of a step")
    for axes in (whole, each):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for label, (colour, names) in _KINDS.items():
        if any(name in time.parts for name in names):
            whole.plot([], [], "s", color=colour, label=label)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()
