"""One SLURM for all tests here, and one user's folder on it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import ROOT, python
from slurm_cluster import Cluster, cluster, missing
from slurm_place import CONFIG, UGLY, Place


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(f"no SLURM can be started: {reason}")
    folder = tmp_path_factory.mktemp("slurm")
    with cluster(folder, size=8, cpus=8) as made:
        yield made


@pytest.fixture(scope="session")
def place(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place") / UGLY
    home = folder / "the home"
    (home / "launch").mkdir(parents=True)
    (home / "coe_megatron").symlink_to(ROOT / "coe_megatron")
    (home / "launch" / "slurm").symlink_to(ROOT / "launch" / "slurm")
    for name, stands_for in (("rank_program.py", "pretrain_coe.py"), ("check_program.py", "check_nodes.py")):
        shutil.copy(Path(__file__).with_name(name), home / "launch" / stands_for)
    (folder / "a config.yaml").write_text(CONFIG)
    prepare = ("launch/prepare_data.py", "--builtin", 400, "--vocab-size", 512)
    done = python(*prepare, "--output", folder / "prepared data", seconds=300)
    assert done.returncode == 0, done.stderr
    return Place(slurm, folder, home)
