"""What the documents name is there: links and anchors, settings, options, variables, metrics; and their picture."""

import re
import runpy
from functools import cache
from pathlib import Path

import pytest

from coe_megatron.config import RunConfig, flat
from coe_megatron.config.megatron_flags import FLAGS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "docs" / "studies" / "README.md"])
# The log and the changelog say what was true at their time, and reports are generated.
CURRENT = [page for page in PAGES if page.name not in ("experiments.md", "CHANGELOG.md", "settings.md")]
# Options of torchrun, sbatch, srun, pip, venv, docker and tensorboard.
FOREIGN = {
    *("--nproc-per-node", "--max-restarts", "--log-dir", "--standalone", "--nnodes"),
    *("--account", "--cpus-per-task", "--exclusive", "--export", "--gpus-per-node", "--nodes", "--ntasks-per-node"),
    *("--signal", "--time", "--bind_all", "--host", "--logdir", "--system-site-packages", "--append-eod"),
}


def _ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@cache
def _sources(*folders: str) -> str:
    kinds = ("*.py", "*.sh", "*.sbatch")
    return "\n".join(path.read_text() for folder in folders for kind in kinds for path in (ROOT / folder).rglob(kind))


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


@pytest.mark.parametrize("page", CURRENT, ids=_ids(CURRENT))
def test_every_setting_is_one(page: Path) -> None:
    known = {re.sub(r"\.\d+\.", ".N.", line) for line in re.findall(r"^\| `([\w.]+)` \|", _settings(), re.MULTILINE)}
    sections = {name.partition(".")[0] for name in flat(RunConfig()) if "." in name}
    known |= {name.rpartition(".")[0] for name in known}
    files = r"(?:py|md|json|jsonl|yaml|log|txt|idx|bin|model|partial|damaged|lock|png)"
    text = re.sub(r"```layers\n.*?```", "", page.read_text(), flags=re.DOTALL)  # of packages
    for name in re.findall(rf"(?<![\w/.\-])((?:{'|'.join(sections)})(?:\.[a-z_]+)+)", text):
        if not re.search(rf"\.{files}$", name):
            assert name in known, name


def _settings() -> str:
    return (ROOT / "docs" / "settings.md").read_text()


@pytest.mark.parametrize("page", CURRENT, ids=_ids(CURRENT))
def test_every_option_is_one(page: Path) -> None:
    code = _sources("coe_megatron", "launch", "examples", "tests")
    for option in re.findall(r"(?<![\w-])(--[a-z][\w-]+)", page.read_text()):
        made = (f'"{option}"', f'"{option[2:]}"')  # the latter where a program makes options of a table of limits
        assert option in FOREIGN | FLAGS.keys() or any(each in code for each in made), option


@pytest.mark.parametrize("page", CURRENT, ids=_ids(CURRENT))
def test_every_variable_is_read_somewhere(page: Path) -> None:
    code = _sources("coe_megatron", "launch", "tests")
    for name in re.findall(r"\bCOE_[A-Z_]+\b", page.read_text()):
        assert re.search(rf"\b{name}\b", code), name


def test_every_metric_is_written() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    part = text.partition("## `metrics.jsonl`")[2].partition("## See the state")[0]
    code = _sources("coe_megatron/training", "coe_megatron/model")
    cells = [cell for cell in re.findall(r"^\| (`.*?) \|", part, re.MULTILINE)]
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) > 30
    for name in names:
        assert re.search(rf"\b{name}\b", code), name


def test_every_file_named_in_the_plan_of_the_documents_is_listed() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_the_picture_of_the_readme_has_the_losses_of_the_report() -> None:
    curves = runpy.run_path(str(ROOT / "docs" / "chain_vs_moe.py"))["curves"]()  # asserts it against results.csv
    assert len(curves) == 5
    for curve in curves.values():
        assert len(curve.flops) == len(curve.mean) == 4
        assert (curve.low <= curve.mean).all() and (curve.mean <= curve.high).all()
        assert (curve.mean[:-1] > curve.mean[1:]).all()
