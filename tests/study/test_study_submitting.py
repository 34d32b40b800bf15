"""`study.py submit` with an sbatch that notes what it was given: hostile names go through it and a shell unharmed."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from programs import ROOT

from coe_megatron.files import as_argument
from coe_megatron.study.plan.arms import make_study
from coe_megatron.study.plan.study_file import read_study
from coe_megatron.study.run.paths import config_of
from coe_megatron.study.run.slurm_arrays import submissions

pytestmark = pytest.mark.thorough

Write = Callable[..., Path]
Program = Callable[..., tuple[int, str, str]]
HOSTILE = """-o %j,a b'c"$(touch executed)`touch executed`;touch executed #\\*"""
SBATCH = f"""#!{sys.executable}
import json, os, sys
names = ("COE_HOME", "COE_RANKS_PER_NODE")
with open("given.json", "w") as file:
    json.dump({{"words": sys.argv[1:], **{{name: os.environ[name] for name in names}}}}, file)
print("7;cluster")
"""


@pytest.fixture
def place(tmp_path: Path, study_file: Write, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose study has a hostile output, and an sbatch first on the path."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    study_file(output=HOSTILE)
    return tmp_path


def given(place: Path) -> list[str]:
    return json.loads((place / "given.json").read_text())["words"]


def configs(place: Path) -> list[str]:
    runs = make_study(read_study(place / "study.yaml")).runs
    return sorted(as_argument(config_of(run)) for run in runs)


def test_sbatch_is_given_names_as_they_are(place: Path, study_program: Program) -> None:
    status, out, err = study_program("submit", "study.yaml", "--sbatch=--comment='a b' --time=1")
    assert (status, err) == (0, "") and "job 7: 6 runs of 1 ranks" in out
    words = given(place)
    assert words[:3] == ["--parsable", "--array=0-5", "--nodes=1"] and words[5:7] == ["--comment=a b", "--time=1"]
    assert sorted(words[8:]) == configs(place) and all(Path(word).is_file() for word in words[8:])
    assert not (place / "executed").exists() and not any(word.startswith("-") for word in words[7:])


def test_the_dry_run_can_be_pasted_into_a_shell(place: Path, study_program: Program) -> None:
    status, out, _ = study_program("submit", "study.yaml", "--dry-run", "--sbatch=--comment='$(touch executed)'")
    assert status == 0 and not (place / "given.json").exists() and not Path(configs(place)[0]).exists()
    done = subprocess.run(["bash", "-c", out.splitlines()[-1]], capture_output=True, text=True, check=True)
    assert done.stdout == "7;cluster\n" and not (place / "executed").exists()
    assert sorted(given(place)[7:]) == configs(place) and "--comment=$(touch executed)" in given(place)


def test_a_task_hands_on_its_own_config(place: Path, study_program: Program) -> None:
    """pretrain.sbatch as SLURM runs it, with stand-ins for Python and for SLURM's own programs."""
    study_program("submit", "study.yaml")
    (place / "python").write_text(
        '#!/bin/sh\nwhile test "$1" != --; do shift; done\nshift\nprintf "%s\\n" "$#" "$1" >&2; exit 9\n'
    )
    (place / "python").chmod(0o755)
    for name in ("squeue", "scontrol"):
        (place / "bin" / name).symlink_to("/bin/true")
    job = {"PATH": os.environ["PATH"], "COE_PYTHON": str(place / "python"), "COE_STUDY": "1", "SLURM_JOB_ID": "7"}
    job |= {"SLURM_JOB_NODELIST": "n1", "SLURMD_NODENAME": "n1"}
    script, *given_configs = given(place)[5:]
    found = []
    for task in range(6):
        environment = {**job, "SLURM_ARRAY_TASK_ID": str(task)}
        done = subprocess.run(
            ["bash", script, *given_configs], env=environment, capture_output=True, text=True, check=False
        )
        count, config = done.stderr.splitlines()
        assert (done.returncode, count) == (9, "1")
        found.append(config)
    assert found == given_configs and not (place / "executed").exists()


def test_what_sbatch_says_is_one_line_whatever_it_is(
    place: Path, study_program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "bin" / "sbatch").write_text("#!/bin/bash\nprintf 'no\\nnot \\xff\\x1b so\\n' >&2\nexit 3\n")
    status, _, err = study_program("submit", "study.yaml")
    assert (status, err.count("\n")) == (2, 1) and "sbatch ended with status 3: not " in err and "\x1b" not in err
    (place / "bin" / "sbatch").chmod(0o644)
    (place / "bin" / "sbatch").rename(place / "sbatch")
    monkeypatch.setenv("PATH", str(place))  # nothing can be executed there
    status, _, err = study_program("submit", "study.yaml")
    assert (status, err.count("\n")) == (2, 1) and "sbatch" in err


def test_more_configs_than_a_command_line_holds(place: Path, study_program: Program) -> None:
    long = "x/" * 1500
    many = (place / "study.yaml").read_text().replace("seeds:\n- 1\n- 2", f"seeds: {list(range(480))}")
    (place / "study.yaml").write_text(many)
    runs = make_study(read_study(place / "study.yaml")).runs
    runs = [replace(run, config=replace(run.config, output=long + run.config.output)) for run in runs]
    (array,) = submissions(runs, None, None, [])
    with pytest.raises(ValueError, match=r"^sbatch cannot be started: argument list too long, with 1,440 runs; --only"):
        array.submit(os.environ)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sbatch=run.sh --time=1",), "--sbatch begins with run.sh: it must hold options, such as --time=1:00:00"),
        (("--sbatch='",), "argument --sbatch: "),
        (("--ranks-per-node=0",), "argument --ranks-per-node: 0 must be a whole number of at least 1"),
        (("--only", "moe"), "--only is moe: it must be an arm, one of moe-4-8_prenorm, coe-2-2-8_prenorm, "),
    ],
)
def test_mistakes_in_options(place: Path, study_program: Program, options: tuple[str, ...], said: str) -> None:
    status, _, err = study_program("submit", "study.yaml", *options)
    assert (status, err.count("\n")) == (2, 1) and said in err and not (place / "given.json").exists()


def test_the_command_is_what_a_shell_reads(place: Path) -> None:
    (array,) = submissions(make_study(read_study(place / "study.yaml")).runs, None, 2, ["--comment=a;b"])
    home, study, ranks, *words = shlex.split(str(array))
    assert (home, study, ranks) == (f"COE_HOME={ROOT}", "COE_STUDY=1", "COE_RANKS_PER_NODE=1")
    assert words == array.command
