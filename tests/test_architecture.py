"""docs/architecture.md against the code: the direction of imports, the list of packages, files and functions."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "coe_megatron"
PAGE = (ROOT / "docs" / "architecture.md").read_text()


@cache
def layers() -> dict[str, int]:
    """The height of every entry of the page, a package or a file, from 0 at the bottom."""
    (block,) = re.findall(r"```layers\n(.*?)```", PAGE, re.DOTALL)
    lines = block.strip().splitlines()
    return {name: height for height, line in enumerate(reversed(lines)) for name in line.split()}


def entry_of(module: str, known: dict[str, int]) -> str:
    """The longest entry that a module is, or is in; such as `study.plan` for `study.plan.arms`."""
    parts = module.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    found = next((prefix for prefix in prefixes if prefix in known), None)
    assert found is not None, f"{module} is on no line of docs/architecture.md"
    return found


@cache
def modules() -> dict[str, str]:
    """Name, without `coe_megatron.`, and source of every module that has more than a docstring."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text()
        if name and not all(isinstance(node, ast.Expr) for node in ast.parse(source).body):
            found[name] = source
    return found


def imports(source: str, names: set[str]) -> Iterator[str]:
    """The modules among `names` that a source imports, in functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level:  # only of the files that an export brings along
                assert node.level == 1 and str(node.module).endswith("_coe"), "imports name the whole path"
                continue
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        else:
            continue
        for name in imported:
            own = name.removeprefix("coe_megatron.")
            if own != name:
                yield own if own in names else own.rpartition(".")[0] or own


def against_the_direction(sources: dict[str, str]) -> set[tuple[str, str]]:
    """Who imports what, although it is on a higher line, or beside it on the same one."""
    known, names = layers(), set(modules())
    found = set()
    for module, source in sources.items():
        own = entry_of(module, known)
        for imported in imports(source, names):
            other = entry_of(imported, known)
            if other != own and known[other] >= known[own]:
                found.add((module, imported))
    return found


def test_imports_go_down() -> None:
    assert against_the_direction(modules()) == set()


@pytest.mark.parametrize(
    ("importer", "source", "imported"),
    [
        ("chain.method", "from coe_megatron.training import loop", "training.loop"),
        ("zero.engine", "def late():\n    from coe_megatron.checkpoint.listing import find", "checkpoint.listing"),
        ("parsing", "import coe_megatron.files", "files"),
    ],
    ids=["a layer", "in a function", "beside it"],
)
def test_an_import_against_the_direction_is_found(importer: str, source: str, imported: str) -> None:
    assert against_the_direction({importer: source}) == {(importer, imported)}


def test_every_entry_of_the_layers_is_there() -> None:
    for entry in layers():
        path = PACKAGE.joinpath(*entry.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), entry


def test_every_package_is_in_the_plan() -> None:
    packages = {entry_of(name, layers()) for name in modules()}
    for folder in sorted(name for name in packages if PACKAGE.joinpath(*name.split(".")).is_dir()):
        assert f"| `coe_megatron/{folder.replace('.', '/')}/` |" in PAGE, folder


def _definitions(path: Path) -> set[str]:
    """`function`, `Class`, `Class.method` of a file, and what it imports: an entry point may only pass a call on."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def test_every_file_and_function_of_the_page_is_there() -> None:
    named = re.findall(r"^\|.*\| `([\w/]+\.py)` \| (?:`([\w.]+)`)? *\|$", PAGE, re.MULTILINE)
    assert len(named) > 50  # the walks
    for file, function in named:
        assert (ROOT / file).is_file(), file
        assert not function or function in _definitions(ROOT / file), f"{file}: {function}"
    for file in re.findall(r"`((?:coe_megatron|launch|tests)/[\w/.]+\.(?:py|sh|sbatch|yaml))`", PAGE):
        assert (ROOT / file).is_file(), file
