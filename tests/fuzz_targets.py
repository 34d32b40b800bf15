"""What is fuzzed: each target makes a folder of valid inputs, draws changes to it, and uses it as the programs do."""

import io
import json
import math
import shutil
from collections.abc import Collection
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import fuzz_values as values
import yaml
from fuzz_bounds import Bounds, Case
from hypothesis import strategies as st
from megatron_commands import DEEPSEEK, MIXTRAL, QWEN

from coe_megatron.cli.from_megatron import page
from coe_megatron.config import RunConfig, dump, load
from coe_megatron.config.from_megatron import checked, translate, words
from coe_megatron.config.load import flat, read, resolve
from coe_megatron.estimate.dispatch import resolved
from coe_megatron.estimate.run_estimate import estimate, vocabulary
from coe_megatron.study.plan.cost_table import make_plan
from coe_megatron.study.report.claims_file import read_claims
from coe_megatron.study.report.claims_page import as_dict, as_markdown
from coe_megatron.study.report.verdict import judge

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SIZED = "model.vocab_size=512"  # where there is no data to tell
SETTINGS = sorted(flat(RunConfig()))


class Target:
    """Something that reads what users write, or what a disk has kept.

    Attributes:
        names: every refusal holds one of them.
        bounds: of a try.
    """

    names: Collection[str] = ()
    bounds = Bounds()

    def prepare(self, folder: Path) -> None:
        """Make the valid inputs."""

    def cases(self) -> st.SearchStrategy[Case]:
        """Changes to these; `Case()` is none."""
        raise NotImplementedError

    def act(self, folder: Path, case: Case) -> list[str]:
        """Use the changed folder; returns refusals in a line each, or raises a declared error."""
        raise NotImplementedError


class Config(Target):
    """YAML of run configs with the bases that they name, read and costed; now and then by the program itself."""

    names = (*{part for name in SETTINGS for part in name.split(".")}, "configs/")
    run = "configs/cpu/run.yaml"

    def prepare(self, folder: Path) -> None:
        shutil.copytree(CONFIGS, folder / "configs")
        shutil.copyfile(CONFIGS / "quickstart.yaml", folder / self.run)

    def cases(self) -> st.SearchStrategy[Case]:
        paths = [path for path in CONFIGS.rglob("*.yaml") if "studies" not in path.parts]
        texts = [path.read_bytes() for path in sorted(paths)]
        trees = [yaml.safe_load(text) for text in texts]
        trees += [yaml.safe_load(dump(load(CONFIGS / name))) for name in ("quickstart.yaml", "cpu/blend.yaml")]
        trees += [{"base": "a.yaml", **tree} for tree in trees[:5]] + [{"base": ["a.yaml", "b.yaml", "run.yaml"]}]
        content = values.files(texts, trees, [values.yaml_dump, values.json_dump])
        bases = {"configs/cpu/a.yaml": content, "configs/cpu/b.yaml": content}
        changed = st.fixed_dictionaries({self.run: content}, optional=bases)
        options = st.fixed_dictionaries({"by": st.sampled_from(("load",) * 5 + ("dump", "dump", "program"))})
        return st.builds(Case, changed, options)

    def act(self, folder: Path, case: Case) -> list[str]:
        path = folder / self.run
        if (by := case.options.get("by")) == "program":
            return program("pretrain", "--dry-run", str(path), SIZED)
        config = load(path)
        use(config)
        if by == "dump":
            (folder / "dumped.yaml").write_text(dump(config))
            assert load(folder / "dumped.yaml") == config, "what is dumped is read as something else"
        return []


class Overrides(Target):
    """`key.sub=value` on the command line."""

    names = (*{part for name in SETTINGS for part in name.split(".")}, "override", "has no value", "a reference is")

    def prepare(self, folder: Path) -> None:
        self.base = read(CONFIGS / "quickstart.yaml")

    def cases(self) -> st.SearchStrategy[Case]:
        configs = [load(path) for path in sorted(CONFIGS.glob("*.yaml"))]
        given = sorted({f"{name}={json.dumps(value)}" for each in configs for name, value in flat(each).items()})
        keys = [*SETTINGS, "data.blend.0.path", "data.blend[0].weight", "model.mla.kv_lora_rank", "parallel", "base"]
        keys += [*values.TEXTS, "a." * 60 + "a", "data.blend.9999999999999999999.path", "training.milestones.0", "moe["]
        value = st.one_of(values.ANYTHING.map(json.dumps), st.sampled_from(values.TEXTS))
        made = st.tuples(st.sampled_from(keys), value).map("=".join)
        text = values.damaged(st.one_of(st.sampled_from(given), st.sampled_from(given), made).map(_encoded))
        texts = st.lists(text.map(lambda content: content.decode(errors="surrogateescape")), min_size=1, max_size=3)
        return st.builds(Case, st.just({}), st.fixed_dictionaries({"overrides": texts}))

    def act(self, folder: Path, case: Case) -> list[str]:
        use(resolve(self.base, case.options.get("overrides", [])))
        return []


class Study(Target):
    """Study files with their bases, planned."""

    names = (*Config.names, "axes", "axis", "arm", "seeds", "baseline", "budget", "skip", "set", "solve", "base")
    bounds = Bounds(cpu_seconds=20.0)  # a study of the project takes up to 3 s, and one may be larger
    study = "configs/studies/cpu/study.yaml"

    def prepare(self, folder: Path) -> None:
        shutil.copytree(CONFIGS, folder / "configs")
        shutil.copyfile(CONFIGS / "studies/cpu/main-pair.yaml", folder / self.study)

    def cases(self) -> st.SearchStrategy[Case]:
        paths = (CONFIGS / "studies").rglob("*.yaml")
        parts = "search", "common", "topologies", "claims"  # the first is slow, the others are no studies
        texts = [path.read_bytes() for path in sorted(paths) if path.stem not in parts]
        content = values.files(texts, [yaml.safe_load(text) for text in texts], [values.yaml_dump])
        common = (CONFIGS / "studies/cpu/common.yaml").read_bytes()
        base = {"configs/studies/cpu/common.yaml": values.files([common], [yaml.safe_load(common)], [values.yaml_dump])}
        own = {self.study: content}
        changed = values.rarely(st.fixed_dictionaries(own | base), st.fixed_dictionaries(own), 4)
        device = st.sampled_from((None, None, "h100", "cpu"))
        overrides = st.sampled_from(([], [], [SIZED], ["training.steps=1"]))
        return st.builds(Case, changed, st.fixed_dictionaries({"device": device, "overrides": overrides}))

    def act(self, folder: Path, case: Case) -> list[str]:
        plan = make_plan(folder / self.study, case.options.get("overrides", []), case.options.get("device"))
        assert finite(plan.as_dict()) and printable(plan.table())
        return []


class Claims(Target):
    """Claims files, and the CSV files of the report that they name."""

    names = ("claims", "the report", "base", *Config.names)
    bounds = Bounds(cpu_seconds=20.0)
    file, results, timings = "claims.yaml", "report/results.csv", "report/timings.csv"

    def prepare(self, folder: Path) -> None:
        (folder / "report").mkdir()
        for name, content in self._valid().items():
            (folder / name).write_bytes(content)

    def _valid(self) -> dict[str, bytes]:
        rows = [
            (arm, design, seed, 4.0 + seed / 10 - shift * seed)
            for arm, design, shift in (("moe", "MoE", 0), ("coe", "CoE", 0.03))
            for seed in (1, 2, 3)
        ]
        results = "arm,axis_design,seed,state,flops,valid_loss,largest_rise\n"
        results += "".join(f"{arm},{design},{seed},finished,100,{loss},0.0\n" for arm, design, seed, loss in rows)
        timings = "arm,seed,memory_measured\n" + "".join(f"{arm},{seed},1000\n" for arm, _, seed, _ in rows)
        found = {self.file: values.yaml_dump(self._claims()), self.results: results, self.timings: timings}
        return {name: content.encode() if isinstance(content, str) else content for name, content in found.items()}

    def _claims(self) -> dict[str, Any]:
        loss = {"measure": "loss", "relation": "equal", "margin": 0.03}
        memory = {"measure": "memory", "relation": "less", "by": 0.1, "margin": None}
        spread = {"measure": "loss_sd", "relation": "greater", "than_in": None}
        front = {"measure": "loss_at_equal_memory", "relation": "not_less", "other": ["MoE", {"design": "CoE"}]}
        listed = [{"id": "a", "statement": "It is so.", "all": [loss, memory]}]
        listed += [{"id": str(number), "statement": "So.", **each} for number, each in enumerate((spread, front))]
        return {"report": "report", "arm": "CoE", "other": "MoE", "where": {}, "claims": listed}

    def cases(self) -> st.SearchStrategy[Case]:
        valid = self._valid()
        file = values.files([valid[self.file]], [self._claims()], [values.yaml_dump])
        tables = {name: values.damaged(st.just(valid[name])) for name in (self.results, self.timings)}
        changed = st.one_of(st.fixed_dictionaries({self.file: file}), st.fixed_dictionaries({}, optional=tables))
        return st.builds(Case, changed)

    def act(self, folder: Path, case: Case) -> list[str]:
        claims = read_claims(folder / self.file)
        verdicts = judge(claims.claims)
        assert finite([as_dict(each) for each in verdicts])
        assert printable(as_markdown(claims.title, self.file, verdicts, folder))
        return []


class Command(Target):
    """Commands of Megatron-LM as configs."""

    names = ("--", "the command", *Config.names)
    script = "pretrain.sh"

    def prepare(self, folder: Path) -> None:
        (folder / self.script).write_text(MIXTRAL)

    def cases(self) -> st.SearchStrategy[Case]:
        texts = [MIXTRAL, QWEN, DEEPSEEK]
        content = values.files([text.encode() for text in texts], [words(text) for text in texts], [_joined])
        return st.builds(Case, st.fixed_dictionaries({self.script: content}))

    def act(self, folder: Path, case: Case) -> list[str]:
        found = translate(words((folder / self.script).read_bytes().decode(errors="replace")))
        checked(found.nested())
        (folder / "config.yaml").write_text(page(found))
        load(folder / "config.yaml")
        return []


class Network(Target):
    """The node check's report, from which a run takes its dispatch."""

    names = ("parallel.network",)
    report = "check.json"

    def prepare(self, folder: Path) -> None:
        (folder / self.report).write_bytes(values.json_indented(self._content()))

    def _content(self) -> dict[str, Any]:
        speeds = {"all_to_all": 0.02, "all_reduce": 0.03, "latency": 5e-3}
        nodes = {
            name: {"host": name, "devices": ["cpu, 2 cores"], "problems": [], **speeds} for name in ("a", "b", "c")
        }
        return {"nodes": nodes, "bad": {"c": "slow"}, "all_nodes": speeds}

    def cases(self) -> st.SearchStrategy[Case]:
        content = values.files([values.json_dump(self._content())], [self._content()], [values.json_indented])
        return st.builds(Case, st.fixed_dictionaries({self.report: values.file_or_not(content)}))

    def act(self, folder: Path, case: Case) -> list[str]:
        auto = ["moe.dispatcher=auto", "moe.overlap_chunks=auto", "parallel.expert=2", "parallel.ranks_per_node=1"]
        use(load(CONFIGS / "quickstart.yaml", [SIZED, *auto, f"parallel.network={folder / self.report}"]))
        return []


def _joined(command: Any) -> bytes:
    parts = command if isinstance(command, list) else [command]
    return " ".join(map(str, parts)).encode(errors="surrogatepass")


def use(config: RunConfig) -> None:
    """What `--dry-run` says of a config."""
    vocab_size = vocabulary(config) if config.model.vocab_size else 512
    cost = estimate(resolved(config, vocab_size))
    assert finite(cost.as_dict()) and printable(cost.table())


def program(name: str, *arguments: str) -> list[str]:
    """A program of coe_megatron/cli/ in this process: its one line of error."""
    said, error = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(error):
        try:
            status = import_module(f"coe_megatron.cli.{name}").main(list(arguments))
        except SystemExit as end:
            status = end.code
    assert status in (0, 2), f"exit status {status}"
    lines = error.getvalue().splitlines()
    assert len(lines) == (status == 2), f"exit status {status} with {len(lines)} lines on stderr"
    assert printable(said.getvalue()), "what is printed is not printable"
    return [line.partition(": error: ")[2] or line for line in lines]


def finite(value: Any) -> bool:
    """Whether all numbers in a value are, so that it is JSON."""
    if isinstance(value, dict | list | tuple):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def printable(text: str) -> bool:
    """Whether all lines of a text are."""
    return all(line.isprintable() for line in text.split("\n"))


def _encoded(text: str) -> bytes:
    """As the command line hands it over; half a character as any other bytes."""
    return text.encode(errors="surrogatepass")
