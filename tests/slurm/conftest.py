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
    (home / "launch" / "slurm").symlink_to(ROOT / "launch" / "slurm")
    for part in ("", "cli"):  # but for two programs all is the package itself
        (home / "coe_megatron" / part).mkdir()
        for path in (ROOT / "coe_megatron" / part).iterdir():
            if path.name not in ("__pycache__", "cli"):
                (home / "coe_megatron" / part / path.name).symlink_to(path.resolve())
    programs = home / "coe_megatron" / "cli"
    (programs / "pretrain.py").rename(programs / "pretrain_itself.py")
    (programs / "check_nodes.py").unlink()
    for name, stands_for in (("rank_program.py", "pretrain.py"), ("check_program.py", "check_nodes.py")):
        shutil.copy(Path(__file__).with_name(name), programs / stands_for)
    (folder / "a config.yaml").write_text(CONFIG)
    prepare = ("launch/prepare_data.py", "--builtin", 400, "--vocab-size", 512)
    done = python(*prepare, "--output", folder / "prepared data", seconds=300)
    assert done.returncode == 0, done.stderr
    return Place(slurm, folder, home)
