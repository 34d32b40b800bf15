"""Configs that come with the package are found by name, unless there is a file of that name."""

from pathlib import Path

import pytest

from coe_megatron.config import load
from coe_megatron.config.packaged import CONFIGS, find
from coe_megatron.errors import ConfigError
from coe_megatron.study.plan.arms import make_study
from coe_megatron.study.plan.study_file import read_study

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["quickstart.yaml", "configs/quickstart.yaml", "cpu/moe_8-64.yaml"])
def test_a_packaged_config_is_found_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(name) == load(ROOT / "configs" / name.removeprefix("configs/"))


def test_a_file_that_is_there_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("base: configs/quickstart.yaml\ntraining: {steps: 7}\n")
    assert load("quickstart.yaml").training.steps == 7
    Path("quickstart.yaml").unlink()
    Path("quickstart.yaml").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="it is a dangling link to nowhere"):
        load("quickstart.yaml")


def test_a_base_is_found_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: cpu/moe_8-64.yaml\ntraining: {steps: 7}\n")
    assert load(tmp_path / "mine.yaml").moe == load(ROOT / "configs/cpu/moe_8-64.yaml").moe
    (tmp_path / "study.yaml").write_text("base_study: studies/cpu/main-pair.yaml\noutput: here\n")
    mine, packaged = read_study(tmp_path / "study.yaml"), read_study(Path("studies/cpu/main-pair.yaml"))
    assert [arm.config.moe for arm in make_study(mine).arms] == [arm.config.moe for arm in make_study(packaged).arms]
    (tmp_path / "study.yaml").write_text(
        "base: quickstart.yaml\noutput: here\nseeds: [1]\naxes: {lr: {a: {optimizer.lr: 0.1}}}\nbaseline: {lr: a}\n"
    )
    (arm,) = make_study(read_study(tmp_path / "study.yaml")).arms
    assert arm.config.model == load(ROOT / "configs/quickstart.yaml").model


@pytest.mark.parametrize("name", ["../pyproject.toml", "../configs/quickstart.yaml", "cpu", "\0", "n" * 300, "configs"])
def test_nothing_else_is_found(name: str, tmp_path: Path) -> None:
    assert find(Path(name), tmp_path) == tmp_path / name


def test_all_configs_are_packaged() -> None:
    assert {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")} == {
        path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")
    }
