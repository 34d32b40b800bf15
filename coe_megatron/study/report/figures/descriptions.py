"""What figures say, in words and numbers, for readers who do not see them."""

from collections.abc import Mapping, Sequence

from coe_megatron.study.report.comparison import Summary

_MAX_LISTED = 8


def ranking(values: Mapping[str, float], form: str, unit: str = "") -> str:
    """All values in ascending order, or with many arms the lowest and the highest, and how far they are apart."""
    unit = f" {unit}" if unit else ""
    order = sorted(values.items(), key=lambda item: item[1])
    listed = [f"{name} {value:{form}}" for name, value in order]
    if len(order) == 1:
        return f"{listed[0]}{unit}."
    between = f"Between lowest and highest are {order[-1][1] - order[0][1]:{form.lstrip('+')}}{unit}."
    if len(order) <= _MAX_LISTED:
        return f"From lowest to highest: {', '.join(listed)}{unit}. {between}"
    return f"Of {len(order)}, the lowest are {', '.join(listed[:3])}; the highest is {listed[-1]}{unit}. {between}"


def loss_ranking(summaries: Sequence[Summary], labels: Mapping[str, str]) -> str:
    """Mean final losses of the arms that have them."""
    found = {labels[each.arm.arm.name]: each.mean for each in summaries if each.mean is not None}
    return f"Mean final validation loss. {ranking(found, '.4f', 'nats per token')}"


def with_interval(value: float, ends: tuple[float, float] | None, form: str) -> str:
    """Such as `+0.1000 (+0.0500 to +0.1500)`."""
    return f"{value:{form}}" + (f" ({ends[0]:{form}} to {ends[1]:{form}})" if ends else "")
