"""The loss plot of a run: training and validation loss over tokens seen."""

import io
import logging
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coe_megatron.errors import one_line
from coe_megatron.files import read_limited, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"  # distinct for colour-blind readers and in print
_SIGNATURE, _LAST = b"\x89PNG\r\n\x1a\n", b"IEND"  # a PNG's beginning, and its last chunk
_MAX_BYTES = 1 << 26
_MAX_LOSS = 1e9  # nats; larger values are not drawn
_MAX_NAME = 200  # characters
_DASHES = ("--", ":", "-.")  # of single validation sets, in the colour of the validation loss


def draw_loss(lines: Sequence[Mapping[str, Any]], entropy: float, title: str, path: Path) -> Path:
    """Draw the losses in metrics.jsonl.

    Args:
        lines: its objects; null and absurdly large losses are skipped.
        entropy: of the token frequencies in nats, drawn as a baseline.
        title: name of the model.
        path: the PNG to write; returned.

    Raises:
        OSError: it cannot be written; an existing one does not change.
    """
    with _silent():
        content = _drawn(lines, entropy, title)
    write_atomically(path, content)
    return path


def _drawn(lines: Sequence[Mapping[str, Any]], entropy: float, title: str) -> bytes:
    from matplotlib.figure import Figure  # only rank 0 draws, and at the end
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    curves: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("train_loss", "training (one step)", {"color": _BLUE, "alpha": 0.6, "linewidth": 1}),
        ("valid_loss", "validation", {"color": _ORANGE, "marker": "o", "markersize": 4, "linewidth": 2}),
    )
    for key, label, style in curves:
        _curve(axes, _points((line, line.get(key)) for line in lines), label, **style)
    sets = next((line["valid"] for line in reversed(lines) if line.get("valid")), ())
    for name, dashes in zip(sets, cycle(_DASHES), strict=False):
        points = _points((line, line.get("valid", {}).get(name, {}).get("loss")) for line in lines)
        _curve(axes, points, f"validation: {_name(name)}", color=_ORANGE, linestyle=dashes)
    axes.axhline(entropy, color=_GREY, linestyle="--", linewidth=1, label="entropy of token frequencies")
    axes.set(xlabel="tokens seen (padding not counted)", ylabel="loss [nats per token]")
    axes.set_title(_name(title), parse_math=False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)  # names of validation sets are the user's
    axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


@contextmanager
def _silent() -> Iterator[None]:
    """Hide warnings about missing glyphs and cramped layout: the plot is drawn all the same."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name(text: str) -> str:
    """A name given by the user, as it is drawn."""
    return one_line(text[:_MAX_NAME])


def is_complete_png(path: Path) -> bool:
    """Whether a file is a complete PNG, by the checksums of its chunks."""
    try:
        content = read_limited(path, path.name, _MAX_BYTES)
    except ValueError:
        return False
    kind, rest = b"", content.removeprefix(_SIGNATURE)
    while len(content) > len(rest) >= 12 and kind != _LAST:
        kind, end = rest[4:8], 8 + int.from_bytes(rest[:4])
        if zlib.crc32(rest[4:end]) != int.from_bytes(rest[end : end + 4]):
            return False
        rest = rest[end + 4 :]
    return kind == _LAST and not rest


def _points(values: Iterable[tuple[Mapping[str, Any], float | None]]) -> list[tuple[float, float]]:
    """(tokens, loss) of the lines that have both."""
    return [
        (line["tokens"], loss)
        for line, loss in values
        if "tokens" in line and loss is not None and abs(loss) < _MAX_LOSS
    ]


def _curve(axes: "Axes", points: Sequence[tuple[float, float]], label: str, **style: Any) -> None:
    """A curve through (tokens, loss), with its last loss in the legend."""
    if points:
        axes.plot(*zip(*points, strict=True), label=f"{label}, {points[-1][1]:.3f} at the end", **style)
