"""Pins, container and package agree with each other; what is installed is whole; who may import whom."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
LINES = [line.partition(";") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
PINS = [(*pin.split("=="), marker.strip()) for pin, _, marker in LINES]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements() -> list[str]:
    """All but what names another of the package's own extras."""
    found = list(chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()))
    return [requirement for requirement in found if not requirement.startswith(f"{PROJECT['name']}[")]


def test_every_dependency_is_pinned() -> None:
    pinned = {_canonical(name) for name, _, _ in PINS}
    for requirement in _requirements():
        name = re.match(r"[\w.-]+", requirement)
        assert name and _canonical(name[0]) in pinned, requirement


def test_every_dependency_has_its_reason_in_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for requirement in _requirements():
        name = re.match(r"[\w.-]+", requirement)
        assert name and f"`{name[0]}`" in text, requirement


def test_container_installs_the_same_pins() -> None:
    lines = (ROOT / "Dockerfile").read_text()
    assert "--constraint constraints.txt" in lines
    assert not re.search(r"[\w-]+==\d", lines), "versions belong in constraints.txt alone"
    exact = {("torch", "2.13.0", ""), ("deepspeed", "0.19.8", "")}
    old, new = 'python_version < "3.12"', 'python_version >= "3.12"'
    assert exact | {("megatron-core", "0.16.1", old), ("megatron-core", "0.19.2", new)} <= set(PINS)


def test_importing_the_package_loads_no_engine_and_patches_nothing() -> None:
    code = (
        "import sys, coe_megatron; heavy = {'torch', 'torch.distributed', 'deepspeed', 'megatron'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def _imports(package: str) -> Iterator[tuple[str, str]]:
    """(file, what it imports) of a package's files; `from a import b` counts as a.b, since b may be a module."""
    for path in sorted((ROOT / "coe_megatron" / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path.name}: imports of the project are absolute"
                yield from ((path.name, f"{node.module}.{alias.name}") for alias in node.names)


def test_the_method_needs_torch_alone() -> None:
    """`chain` is the method itself: readable and usable without Megatron, DeepSpeed or the project's other rooms.

    Only the class of its errors comes from outside, and that file imports nothing.
    """
    found = list(_imports("chain"))
    assert ("method.py", "coe_megatron.chain.settings.ChainSettings") in found and ("method.py", "torch.nn") in found
    for file, name in found:
        own = name.startswith("coe_megatron.chain.") or name == "coe_megatron.errors.ConfigError"
        assert own or name.split(".")[0] in {"torch", *sys.stdlib_module_names}, (file, name)
    assert "import" not in (ROOT / "coe_megatron/errors.py").read_text()


def test_the_layer_does_not_use_the_oracle_it_is_tested_against() -> None:
    found = [*_imports("model"), *_imports("local_backend")]
    assert ("layer.py", "coe_megatron.chain.settings.ChainSettings") in found
    assert [(file, name) for file, name in found if name.startswith("coe_megatron.chain.method")] == []


IMPORT_ALL = """
import importlib, json, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import coe_megatron
for module in pkgutil.walk_packages(coe_megatron.__path__, "coe_megatron."):
    importlib.import_module(module.name)
print(json.dumps({name: module.__file__ for name, module in sys.modules.items() if name.startswith("coe_megatron")}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder stays behind, and without asking any index for packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "coe_megatron", source / "coe_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-index", "--no-deps", "--no-build-isolation", "-w", folder]
    pip = [sys.executable, "-m", "pip", "wheel", *options, source]
    built = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.run
def test_a_wheel_holds_the_whole_package_and_needs_no_source_tree(wheel: Path, tmp_path: Path) -> None:
    source, installed = wheel.parent / "source", tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)

    files = {path.relative_to(source).as_posix() for path in (source / "coe_megatron").rglob("*") if path.is_file()}
    held = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert {"coe_megatron/corpus/templates/stories/__init__.py", "coe_megatron/configs/quickstart.yaml"} <= files
    assert "coe_megatron/slurm/scripts/pretrain.sbatch" in files
    assert files == {name for name in held if name.startswith("coe_megatron/")}
    (license,) = (name for name in held if name.endswith("/licenses/LICENSE"))
    assert (installed / license).read_bytes() == (ROOT / "LICENSE").read_bytes()

    command = [sys.executable, "-I", "-c", IMPORT_ALL, installed]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    origins = json.loads(found.stdout.splitlines()[-1])
    assert {Path(path).relative_to(installed).as_posix() for path in origins.values()} == {
        name for name in files if name.endswith(".py")
    }


SMALL_STUDY = """
base: quickstart.yaml
output: runs/study
set:
  {parallel.expert: 1, model.vocab_size: null, model.num_layers: 1, moe.num_experts: 8, training.steps: 2,
   data.validation_samples: 16}
axes:
  design:
    MoE(4/8): {chain.iterations: 1, moe.topk: 4}
    CoE-2(2/8): {chain.iterations: 2, moe.topk: 2}
baseline: {design: MoE(4/8)}
seeds: [1]
"""


@pytest.mark.run
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installed_wheel_trains_the_quickstart_and_runs_a_study(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which has the other packages from that of these tests, but not the checkout."""
    place = tmp_path / "place"
    place.mkdir()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    bin = tmp_path / "venv" / "bin"
    subprocess.run([bin / "pip", "install", "--quiet", "--no-index", "--no-deps", wheel], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    # Of a folder that is named so Python runs no .pth file, that of an editable install neither.
    (packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COE_"))}
    own |= {"PATH": f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def call(program: str, *arguments: str) -> str:
        words = [bin / program, *arguments]
        done = subprocess.run(words, cwd=place, env=own, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [bin / "python", "-c", "import coe_megatron; print(coe_megatron.__file__)"]
    found = subprocess.run(where, cwd=place, env=own, capture_output=True, text=True, check=True).stdout
    assert Path(found).is_relative_to(packages)
    assert {path.name for path in bin.glob("coe-*")} == set(PROJECT["scripts"])
    assert call("coe-check-nodes", "--help").startswith("usage: coe-check-nodes ")
    assert "-m coe_megatron.cli.pretrain" in call("coe-multi-host", "--hosts=a,b", "--dry-run", "quickstart.yaml")
    assert "parameters" in call("coe-pretrain", "quickstart.yaml", "--dry-run")
    call("coe-prepare", "--builtin", "100", "--vocab-size", "512", "--output", "data/builtin")
    small = ("training.steps=2", "model.vocab_size=512", "model.num_layers=1")
    ranks = ("--nproc-per-node", "2", "-m", "coe_megatron.cli.pretrain", "quickstart.yaml")
    assert "validation loss" in call("coe-one-host", "--", *ranks, *small)
    assert ": complete" in call("coe-checkpoint", "verify", "runs/quickstart")
    (place / "study.yaml").write_text(SMALL_STUDY)
    assert "2 of 2 runs are done" in call("coe-study", "run", "study.yaml")
    assert {row["state"] for row in json.loads(call("coe-status", "runs", "--json"))} == {"finished"}
    (place / "other.yaml").write_text(SMALL_STUDY.replace("runs/study", "runs/other"))
    planned = call("coe-study", "submit", "other.yaml", "--dry-run")
    assert f"COE_PYTHON={bin / 'python'}" in planned
    assert f" {packages / 'coe_megatron/slurm/scripts/pretrain.sbatch'} runs/other/" in planned
