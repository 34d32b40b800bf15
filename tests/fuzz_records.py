"""Fuzz target: what a run has recorded in its folder."""

import time
from pathlib import Path
from typing import Any

import fuzz_values as values
import yaml
from fuzz_bounds import Case, attempt
from fuzz_targets import Target, finite, printable
from hypothesis import strategies as st

from coe_megatron.config import dump, parse
from coe_megatron.estimate.machine import machine
from coe_megatron.run import folder as run_folder
from coe_megatron.run.metrics_log import read_metrics
from coe_megatron.run.record import read_record
from coe_megatron.run.status import statuses, table
from coe_megatron.study.plan.calibration import calibrate
from coe_megatron.training.metrics import JsonLines


class Records(Target):
    """The records of a run, as status.py, a run that goes on, and --calibration read them."""

    names = ("run.json", "metrics.jsonl", "config.yaml", "--calibration", "output", "checkpoints")

    def prepare(self, folder: Path) -> None:
        (folder / "run/checkpoints").mkdir(parents=True)
        self.config = parse({"output": str(folder / "run"), "model": {"vocab_size": 512}, "training": {"steps": 30}})
        self.record = _record()
        self.lines = [_line(step) for step in (10, 20, 30)]
        for name, content in self._contents().items():
            (folder / "run" / name).write_bytes(content)

    def _contents(self) -> dict[str, bytes]:
        return {
            "run.json": values.json_indented(self.record),
            "metrics.jsonl": values.json_lines(self.lines),
            "config.yaml": dump(self.config).encode(),
        }

    def cases(self) -> st.SearchStrategy[Case]:
        config, contents = yaml.safe_load(dump(self.config)), {}
        writers = values.json_indented, values.json_lines, values.yaml_dump
        for (name, text), tree, write in zip(
            self._contents().items(), (self.record, self.lines, config), writers, strict=True
        ):
            contents[f"run/{name}"] = values.file_or_not(values.files([text], [tree], [write]))
        names = st.lists(st.sampled_from(sorted(contents)), min_size=1, max_size=2, unique=True)
        chosen = names.flatmap(lambda some: st.fixed_dictionaries({name: contents[name] for name in some}))
        return st.builds(Case, chosen)

    def act(self, folder: Path, case: Case) -> list[str]:
        run = folder / "run"
        rows = statuses([folder])
        assert printable(table(rows, time.time()))
        assert finite([row.as_dict() for row in rows]), "status.py --json has numbers that are no JSON"
        refusals = attempt(lambda: read_metrics(run / "metrics.jsonl")) + attempt(
            lambda: calibrate(run, machine("cpu"))
        )
        refusals += attempt(lambda: self._compare(run))
        before = {path: path.read_bytes() for path in run.iterdir() if path.is_file() and not path.is_symlink()}
        try:
            return refusals + attempt(lambda: self._go_on(run))
        finally:
            for path in run.iterdir():
                if path.is_file() and not path.is_symlink() and path not in before:
                    path.unlink()
            for path, content in before.items():
                path.unlink(missing_ok=True)
                path.write_bytes(content)

    def _compare(self, run: Path) -> None:
        assert printable(said := run_folder.check_same_run(run, self.config, 512)) and "\n" not in said

    def _go_on(self, run: Path) -> None:
        with run_folder.begin(self.config) as record:
            lines = JsonLines(run / "metrics.jsonl", 20)
            lines.write(_line(30))
            assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 30, "what a run goes on from cannot be read"
            record.end("interrupted")
        assert read_record(run)["attempts"][-1]["outcome"] == "interrupted"


def _record() -> dict[str, Any]:
    began, ended = "2026-01-02T03:04:05+00:00", "2026-01-02T03:14:05+00:00"
    attempt = {"outcome": "finished", "began": began, "ended": ended, "host": "a", "command": ["x"], "log": "/a.log"}
    parameters = {"embedding": 512 * 128, "total": 10**6, "active": 10**5}
    facts = {"ranks": 1, "model": "CoE-2", "unigram_entropy": 5.0, "rollbacks": [{"from_step": 7, "to_step": 4}]}
    return {"attempts": [{**attempt, "outcome": "died"}, attempt], "parameters": parameters, **facts}


def _line(step: int) -> dict[str, Any]:
    losses = {"train_loss": 5.0, "valid_loss": 5.5, "valid": {"valid": {"loss": 5.5}}, "grad_norm": 1.0}
    speed = {"step_seconds": 2.0, "tokens_per_second": 1e3, "eta_seconds": 60.0, "tflops": 1.0, "memory": {"peak": 1}}
    return {
        "step": step,
        "tokens": 10 * step,
        **losses,
        **speed,
        "rollbacks": 0,
        "routing": [{"layer": 1, "load": [1]}],
    }
