"""Configs that are bombs, riddles or somebody else's files: one line, in two seconds and 300 MB."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import ROOT
from rights import as_nobody, private_folder

from coe_megatron.config import load
from coe_megatron.config.load import read
from coe_megatron.errors import ConfigError
from coe_megatron.study.plan.study_file import read_study

pytestmark = pytest.mark.thorough

QUICKSTART = ROOT / "configs/quickstart.yaml"


def refused(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    line = str(error.value)
    assert line.isprintable() and len(line) < 1000
    return line


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "config.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_a_file_is_read_once_however_often_it_is_named(write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("output: x\n", "f0.yaml")
    for level in range(1, 40):
        write(f"base: [f{level - 1}.yaml, ./f{level - 1}.yaml]\n", f"f{level}.yaml")
    reads: list[Path] = []
    from coe_megatron.config import load as module_of_load  # noqa: F401

    def noted(path: Path, values: object) -> object:
        reads.append(path)
        return values

    assert read(write("base: f39.yaml\n"), prepare=noted).output == "x"
    assert len(reads) == 41


def test_chains_of_bases(write) -> None:
    for number in range(2000):
        write(f"base: c{number + 1}.yaml\n", f"c{number}.yaml")
    assert "base leads to more than 64 files" in refused(write("base: c0.yaml\n"))


@pytest.mark.parametrize("name", ["nowhere.yaml", "a\\0b", "n" * 256, "/dev/zero", "."])
def test_a_base_that_cannot_be_read_is_named_with_its_key(name: str, write) -> None:
    path = write(f'base: "{name}"\n')
    assert refused(path).startswith(f"base in {path} is ")


def test_many_bases_count_together(write) -> None:
    for number in range(3):
        write("\n".join(f"k{number}_{key}: 1" for key in range(900)) + "\n", f"b{number}.yaml")
    assert "more than 5,000 keys" in refused(write("base: [b0.yaml, b1.yaml, b2.yaml]\n"))


def test_the_last_of_two_bases_wins_also_if_both_have_one_in_common(write) -> None:
    write("moe: {topk: 1}\n", "common.yaml")
    write("base: common.yaml\nmoe: {topk: 2}\n", "a.yaml")
    write("base: common.yaml\n", "b.yaml")
    assert load(write("base: [a.yaml, b.yaml]\n")).moe.topk == 1
    assert load(write("base: [b.yaml, a.yaml]\n")).moe.topk == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("output: ${data.path}${data.path}\ndata: {path: '${model.activation}'}\n", "data.path is a reference itself"),
        ("data: {path: a, validation: '${data}'}\n", "data is a section, but a reference must name a value"),
        ("output: ${oc.create:x}\n", "a reference is ${key.sub} or ${oc.env:VARIABLE}"),
        ("output: ${.data.path}\n", "a reference is ${key.sub} or ${oc.env:VARIABLE}"),
        ("output: '${oc.env:NOPE,${data.path}}'\n", "has a reference within a reference"),
        ("output: '" + "${" * 20_000 + "'\n", "has a reference within a reference"),
        ("output: '" + "${" * 20_000 + "}" * 20_000 + "'\n", "has a reference within a reference"),
        ("output: ${oc.env:A,b,c}\n", "a reference is ${key.sub} or ${oc.env:VARIABLE}"),
        ("output: '\\${model}'\n", "output is '${model}': ${ is allowed only in references"),
        ("output: '" + "${data.path}" * 300 + "'\ndata: {path: " + "p" * 100 + "}\n", "more than 4,096 characters"),
        ("output: '" + "${oc.env:LONG}" * 300 + "'\n", "more than 4,096 characters"),
    ],
)
def test_references_are_to_values_and_do_not_multiply(
    text: str, said: str, write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONG", "x" * 1000)
    assert said in refused(write(text))


def test_references_that_are_well(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = load(write("output: ${oc.env:SCRATCH}/${oc.env:NONE,runs}/${data.path}\ndata: {path: corpus}\n"))
    assert config.output == "/scratch/me/runs/corpus"


def test_a_variable_with_a_reference_in_it(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "${model.num_layers}")
    assert "output is '${model.num_layers}/x': ${ is allowed" in refused(write("output: ${oc.env:SCRATCH}/x\n"))


def test_a_blend_that_its_own_config_yaml_could_not_hold(write) -> None:
    blend = ", ".join("{weight: 1, path: p" + f"{number:0>135}" + "}" for number in range(800))
    assert "data.blend and data.validation have too many folders" in refused(write(f"data: {{blend: [{blend}]}}\n"))


@pytest.mark.parametrize(
    "override",
    [
        "a." * 5000 + "b=1",
        "output=" + "${oc.env:A," * 1000 + "x" + "}" * 1000,
        "output=" + "${" * 7000,
        "moe.topk=" + "[" * 1000,
        "output=" + "x" * 20_000,
        "moe.topk=0x" + "f" * 9999,
    ],
)
def test_overrides_that_are_bombs(override: str) -> None:
    assert refused(QUICKSTART, override).startswith("override '")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps=010", "010 is a number in base 8 to YAML 1.1"),
        ("training.steps=1:30", "1:30 is a number in base 60 to YAML 1.1"),
        ("logging.tensorboard=yes", "yes is a truth value to YAML 1.1: write true or false, or quote the text"),
        ("optimizer.lr=abc", "optimizer.lr is 'abc': it should be a number > 0"),
        ("optimizer.clip=[1]", "optimizer.clip is [1]: it should be a number > 0 or null"),
        ("optimizer.betas=[0.9,x]", "optimizer.betas.1 is 'x': it should be a number ≥ 0, < 1"),
        ("training.milestones=[x]", "training.milestones.0 is 'x': it should be an integer ≥ 1"),
        ("output=~nobody-has-this-name/x", "output is ~nobody-has-this-name/x: there is no such user"),
        ("model.num_layers=10000", "chain.iterations is 3: with 10000 layers it must be at most 2"),
        ("parallel.world_size=1000001", "parallel.world_size is 1000001: it should be less than or equal to 1000000"),
    ],
)
def test_words_of_ours(override: str, said: str) -> None:
    assert said in refused(QUICKSTART, override, *(["chain.iterations=3"] if "num_layers" in override else []))


def test_a_study_is_no_run_and_a_run_no_study() -> None:
    assert "it is a study, for launch/study.py" in refused(ROOT / "configs/studies/cpu/main-pair.yaml")
    with pytest.raises(ConfigError, match=r"for launch/pretrain_coe.py"):
        read_study(QUICKSTART)


def test_home_in_every_path(write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write("moe: {topk: 3}\n", "b.yaml")
    text = """base: ~/b.yaml
output: ~/o
data: {path: ~/p, blend: [{path: ~/q, weight: 1}], validation: {v: ~/v}}
training: {warm_start: ~/w}
"""
    config = load(write(text))
    assert config.moe.topk == 3 and config.output == f"{tmp_path}/o" and config.data.path == f"{tmp_path}/p"
    assert config.data.blend[0].path == f"{tmp_path}/q" and config.data.validation == {"v": f"{tmp_path}/v"}
    assert config.training.warm_start == f"{tmp_path}/w"
    assert load(write(text), ["output=~/other"]).output == f"{tmp_path}/other"
    assert load(write(text), ["parallel.network=~/check.json"]).parallel.network == f"{tmp_path}/check.json"
    (tmp_path / "ds.json").write_text("{}")
    assert load(write(text), ["zero.deepspeed=~/ds.json"]).zero.deepspeed == f"{tmp_path}/ds.json"


@pytest.fixture
def private() -> Iterator[Path]:
    with private_folder() as folder:
        yield folder


def test_files_that_may_not_be_read(write, private: Path) -> None:
    config = write(f"base: {private / 'f'}\n")
    os.chmod(config, 0o644)
    with as_nobody():
        assert "permission denied" in refused(private / "f")
        assert "zero.deepspeed is " in refused(QUICKSTART, f"zero.deepspeed={private / 'f'}")
    for path in (ROOT, "/dev/zero", "n" * 256):
        assert "the config file is " in refused(path)
        assert "zero.deepspeed is " in refused(QUICKSTART, f"zero.deepspeed={path}")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100 + "1" + "}" * 100, "[1]", "NaN", "", " " * 200_000])
def test_a_deepspeed_json_that_is_a_bomb_or_none(content: str, write) -> None:
    assert "zero.deepspeed is " in refused(QUICKSTART, f"zero.deepspeed={write(content, 'ds.json')}")


WORST = ["model.num_layers=10000", "chain.iterations=2", "moe.num_experts=2147483646"]
MANY_RANKS = ["parallel.world_size=1000000", "training.global_batch=1000000", "training.micro_batch=1"]
MANY_STAGES = ["model.num_layers=9984", "parallel.pipeline=256", "training.global_batch=256", "training.micro_batch=1"]


@pytest.mark.parametrize("settings", [WORST, MANY_RANKS, MANY_STAGES], ids=["layers", "ranks", "stages"])
def test_a_dry_run_of_the_largest_there_is_stays_small(settings: list[str]) -> None:
    code = f"""
import re, resource, runpy, sys
main = runpy.run_path({str(ROOT / "launch/pretrain_coe.py")!r})["main"]
assert main([{str(QUICKSTART)!r}, "--dry-run", "model.vocab_size=2048", "parallel.expert=1", *{settings!r}]) == 0
seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime
kilobytes = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])  # ru_maxrss has the parent's too
assert seconds < 20 and kilobytes < 300 * 1024, (seconds, kilobytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
