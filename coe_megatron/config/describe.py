"""Descriptions of the valid values of a setting, for docs/settings.md and for messages, and of a model."""

import re
from typing import Any, Literal, get_args, get_origin

from coe_megatron.config.settings import LARGEST, PathText, RunConfig


def should_be(hint: Any) -> str:
    """The valid values of a type, for a message."""
    text = describe(hint).replace("`", "").replace("true, false", "true or false")
    return f"{'an' if text.startswith('integer') else 'a'} {text}" if text.startswith(_COUNTABLE) else text


def describe(hint: Any) -> str:
    """The valid values of a type, in Markdown."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if hint == PathText:
        return "path"
    if metadata := getattr(hint, "__metadata__", ()):
        return f"{describe(hint.__origin__)}{_bounds(metadata)}"
    if hint is type(None):
        return "`null`"
    if get_origin(hint) in (list, tuple):
        parts = get_args(hint)
        inner = "; ".join(describe(part) for part in parts if part is not ...)
        return f"list of {_plural(inner)}" if get_origin(hint) is list or ... in parts else f"[{inner}]"
    if get_origin(hint) is dict:
        return "names with " + describe(get_args(hint)[1])
    if arguments := get_args(hint):
        return " or ".join(describe(part) for part in arguments)
    return {bool: "`true`, `false`", int: "integer", float: "number", str: "text"}.get(hint, "section")


def _plural(text: str) -> str:
    return re.sub(r"^(integer|number|section)", r"\1s", text)


def _bounds(metadata: tuple[Any, ...]) -> str:
    constraints = [part for info in metadata for part in getattr(info, "metadata", [info])]
    limits = []
    for part in constraints:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("lt", "<"), ("le", "≤")):
            if (limit := getattr(part, name, None)) not in (None, LARGEST):  # no need to mention the largest integer
                limits.append(f"{sign} {limit}")
    return f" {', '.join(limits)}" if limits else ""


_COUNTABLE = ("integer", "number", "list", "path")


def notation(config: RunConfig) -> str:
    """A model in the paper's notation, such as `CoE-2(4/64)+1`."""
    chain, moe = config.chain, config.moe
    name = "MoE" if chain.iterations == 1 else f"CoE-{chain.iterations}"
    return f"{name}({moe.topk}/{moe.num_experts})" + (f"+{moe.num_shared_experts}" if moe.num_shared_experts else "")
