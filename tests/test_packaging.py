"""Pins, container and package agree with each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements() -> list[str]:
    return PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]


def test_every_dependency_is_pinned() -> None:
    pinned = {_canonical(name) for name in PINS}
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
    assert PINS["torch"] == "2.13.0" and PINS["megatron-core"] == "0.16.1" and PINS["deepspeed"] == "0.19.8"


def test_importing_the_package_loads_no_engine_and_patches_nothing() -> None:
    code = (
        "import sys, coe_megatron; heavy = {'torch', 'torch.distributed', 'deepspeed', 'megatron'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
