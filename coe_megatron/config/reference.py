"""Writes docs/settings.md, every setting of a run once, from the dataclasses.

python -m coe_megatron.config.reference [FILE]
"""

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from coe_megatron.config.describe import describe
from coe_megatron.config.load import dataclasses_in, is_listed
from coe_megatron.config.settings import RunConfig

_HEAD = """# Settings

Every setting of a run, made by `python -m coe_megatron.config.reference` from the dataclasses in
`coe_megatron/config/settings.py`. In a YAML file they are nested (`moe: {topk: 4}`), on a command line dotted
(`moe.topk=4`). What is not given has its default. `base:` names files whose settings hold where a file says nothing.
"""


def reference() -> str:
    """The whole document as Markdown."""
    return _HEAD + "".join(_section(cls, prefix) for cls, prefix in _sections(RunConfig, ""))


def _sections(cls: Any, prefix: str) -> Iterator[tuple[Any, str]]:
    yield cls, prefix
    for name, hint in get_type_hints(cls).items():
        for inner in dataclasses_in(hint):
            listed = "N." if is_listed(hint) else ""
            yield from _sections(inner, f"{prefix}{name}.{listed}")


def _section(cls: Any, prefix: str) -> str:
    text = inspect.getdoc(cls) or ""
    hints, meanings = get_type_hints(cls, include_extras=True), _meanings(text)
    rows = [
        f"| `{prefix}{field.name}` | {describe(hints[field.name])} | {_default(field)} | {meanings[field.name]} |"
        for field in fields(cls)
        if not is_dataclass(hints[field.name])
    ]
    title = prefix.rstrip(".") or "the run"
    summary = " ".join(text.partition("\nAttributes:")[0].split())
    return (
        f"\n## {title}\n\n{summary}\n\n| setting | values | default | meaning |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def _meanings(text: str) -> dict[str, str]:
    """Attribute -> its text, of a docstring in Google's style."""
    block = text.partition("Attributes:")[2].partition("\nRaises:")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", block, re.MULTILINE)
    return {name: " ".join(meaning.split()).replace("|", "\\|") for name, meaning in found}


def _default(field: Field) -> str:
    factory = field.default_factory
    if factory is MISSING and field.default is MISSING:
        return "must be given"
    value = field.default if factory is MISSING else factory()
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    return f"`{list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/settings.md")
    target.write_text(reference())
