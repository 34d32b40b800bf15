"""A user's folder on a cluster, whose name nobody should have to quote twice, and the jobs submitted there."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from programs import ROOT
from slurm_cluster import Cluster, wait_for

from coe_megatron.run.metrics_log import read_metrics

UGLY = """it's a "folder" $(touch executed); touch `touch executed` & co"""
CONFIG = f"""
base: {ROOT}/configs/quickstart.yaml
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 2
  seq_length: 32
  vocab_size: null
  hidden_dropout: 0
  attention_dropout: 0
moe: {{num_experts: 8, topk: 2, ffn_hidden_size: 16}}
data: {{path: prepared data, validation_samples: 8}}
parallel: {{expert: 2}}
training:
  {{steps: 12, global_batch: 16, micro_batch: 4, log_every: 1, evaluate_every: 6, save_every: 4, deterministic: true}}
"""


@dataclass
class Place:
    """A user's folder on a cluster, from which jobs are submitted.

    Attributes:
        home: a copy of the project (links) whose program notes where its ranks run.
    """

    cluster: Cluster
    folder: Path
    home: Path
    jobs: list[str] = field(default_factory=list)

    def environment(self, more: dict[str, str]) -> dict[str, str]:
        return {"COE_HOME": str(self.home), "COE_PYTHON": sys.executable, "COE_CHECK_NODES": "0", **more}

    def submit(self, *options: str, output: str, overrides: tuple[str, ...] = (), **environment: str) -> str:
        """Submit a job of two nodes (others by option); returns its number."""
        script = self.home / "launch" / "slurm" / "pretrain.sbatch"
        words = ["--parsable", "--nodes=2", *options, script, "a config.yaml", f"output={output}", *overrides]
        done = self.cluster.run("sbatch", *words, env=self.environment(environment), cwd=self.folder)
        assert done.returncode == 0, done.stderr
        self.jobs.append(done.stdout.strip())
        return self.jobs[-1]

    def finish(self, job: str, seconds: float = 300, code: str = "0:0") -> None:
        """Wait for the end of a job, which is as expected; otherwise its log is shown."""
        found = self.cluster.wait(job, seconds)
        assert found["ExitCode"] == code, f"{found['JobState']} {found['ExitCode']}\n{self.log(job)}"

    def let_go(self, name: str) -> None:
        """Make the file for which ranks wait that were told to."""
        (self.folder / name).touch()

    def log(self, job: str) -> str:
        path = self.folder / f"slurm-{job}.log"
        return path.read_text() if path.exists() else ""

    def attempts(self, job: str) -> list[dict[str, Any]]:
        return json.loads((self.folder / "logs" / job / "attempts.json").read_text())

    def seen(self, job: str, attempt: int) -> list[dict[str, Any]]:
        """What each rank of an attempt has noted, by rank."""
        folder = self.folder / "logs" / job / f"attempt-{attempt}"
        return [json.loads((folder / f"seen-by-{rank}.json").read_text()) for rank in range(len(_notes(folder)))]

    def nodes(self, job: str, attempt: int) -> list[str]:
        """Where the ranks of an attempt ran, by rank."""
        return [rank["environment"]["SLURMD_NODENAME"] for rank in self.seen(job, attempt)]

    def wait_for_step(self, output: str, step: int) -> None:
        """Until a step of a run is logged."""

        def logged() -> bool:
            path = self.folder / output / "metrics.jsonl"
            return path.exists() and any(line["step"] >= step for line in read_metrics(path))

        wait_for(logged, 120, lambda: f"step {step} of {output}\n{[self.log(job) for job in self.jobs]}")

    def losses(self, output: str) -> list[tuple[Any, ...]]:
        lines = read_metrics(self.folder / output / "metrics.jsonl")
        return [tuple(line.get(name) for name in ("step", "train_loss", "valid_loss", "grad_norm")) for line in lines]


def _notes(folder: Path) -> list[Path]:
    return list(folder.glob("seen-by-*.json"))
