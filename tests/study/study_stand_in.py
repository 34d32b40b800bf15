"""Stands in for a run: study_stand_in.py CONFIG.yaml HOW. Writes what a run writes, and notes when it began and ended.

HOW is `done`, `fail`, `refused`, `silent` (fails without a word), `busy` (once, then done), `obeys` (waits for what
stdin says), `stubborn` (ends for nothing but `end`), `slow` (done after a while), `with N` (done after N have begun),
`diverged`, or `loss L` (done with this validation loss).
"""

import fcntl
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path


def main(config: Path, how: str) -> int:
    folder = config.with_suffix("")
    note(folder, f"begins on {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}")
    if how == "refused":
        print("coe-pretrain: error: data.path is nowhere", file=sys.stderr)
        return 2
    if how == "busy" and not folder.exists():
        folder.mkdir()
        return 6
    folder.mkdir(exist_ok=True)
    shutil.copy(config, folder / "config.yaml")
    with (folder / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, outcome = act(folder, how)
        (folder / "run.json").write_text(json.dumps({"attempts": [{"outcome": outcome}]}))
    note(folder, outcome)
    return status


def act(folder: Path, how: str) -> tuple[int, str]:
    if how == "fail":
        print("coe-one-host: ended with status 4 (DIVERGED), rank 0: the loss is nan", file=sys.stderr)
        return 4, "failed: the loss is nan"
    if how == "diverged":
        return 4, "failed: Diverged('the loss is nan')"
    if how.startswith("loss "):
        step = int(re.search(r"^  steps: (\d+)$", (folder / "config.yaml").read_text(), re.MULTILINE)[1])
        line = {"step": step, "valid_loss": float(how.removeprefix("loss "))}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    if how == "silent":
        return 1, "running"
    if how == "slow":
        note(folder, "works")
        time.sleep(0.5)
    if how.startswith("with "):
        while (folder.parents[1] / "events").read_text().count(" begins ") < int(how.removeprefix("with ")):
            time.sleep(0.01)
    if how in ("obeys", "stubborn"):
        note(folder, "waits")
        while (word := sys.stdin.readline().strip()) == "stop" and how == "stubborn":
            pass
        return (130, "running") if word == "end" else (3, "interrupted")
    time.sleep(0.1)
    return 0, "finished"


def note(folder: Path, what: str) -> None:
    with (folder.parents[1] / "events").open("a") as file:
        print(f"{folder.parent.name}/{folder.name} {what}", file=file)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
