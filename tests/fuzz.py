"""Fuzzes what reads users' files: configs, studies, claims, node reports, data, text, Parquet, checkpoints, records.

    python tests/fuzz.py config --minutes 30 --seed 1     goes on through findings; a JSON summary at the end
    python tests/fuzz.py --replay FILE ...                saved inputs again

Inputs are valid ones changed by Hypothesis. A try may be accepted, or refused in one printable line that names
something; another error, a hang, or memory beyond bounds is a finding. The first of a kind is made smaller and saved in
--findings, with its traceback beside it. The same seed gives the same tries. They run in a process of their own, which
may die. Ctrl-C ends it with the summary. Exit status: 0 nothing found, 1 something was, 2 a mistake. A few seconds of
it are in tests/test_fuzz.py.
"""

import argparse
import faulthandler
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import chdir, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hypothesis
from fuzz_bounds import Case, Verdict, changed, judge, memory_limit
from hypothesis import HealthCheck, Phase

TARGETS = {
    "config": "fuzz_targets:Config",
    "overrides": "fuzz_targets:Overrides",
    "study": "fuzz_targets:Study",
    "claims": "fuzz_targets:Claims",
    "command": "fuzz_targets:Command",
    "network": "fuzz_targets:Network",
    "manifest": "fuzz_data:Manifest",
    "tokenizer": "fuzz_data:OtherTokenizer",
    "indexed": "fuzz_data:Indexed",
    "text": "fuzz_data:Text",
    "parquet": "fuzz_data:Parquet",
    "checkpoint": "fuzz_checkpoint:Checkpoint",
    "prompts": "fuzz_prompts:Prompts",
    "records": "fuzz_records:Records",
}
BATCH = 100  # tries between two reports
SPARE_MEMORY = 2 << 30  # bytes that a try can have at all
SHRINK_SECONDS = 60
Tried = Callable[[Case, Verdict], None]


class Enough(KeyboardInterrupt):
    """Ends a search: Hypothesis lets it through."""


class Reproduced(Exception):
    """Tells Hypothesis that a case is of the kind to be made smaller."""


@dataclass
class Summary:
    """What a soak came to; `findings`: of each kind the file of the first."""

    target: str
    seed: int
    seconds: float = 0.0
    tries: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        share = self.ended["accepted"] / max(self.tries, 1)
        rate = self.tries / max(self.seconds, 1e-9)
        return {
            **vars(self),
            "ended": dict(self.ended),
            "tries_per_second": round(rate, 1),
            "accepted_share": round(share, 3),
        }


class Fuzzed:
    """A target with its folder, in this process; the input of the try at hand is in `current`."""

    def __init__(self, name: str, place: Path) -> None:
        module, _, cls = TARGETS.get(name, name).partition(":")
        self.target = getattr(import_module(module), cls)()
        self.folder, self.current = place / "folder", place / "current"
        self.folder.mkdir()
        os.mkfifo(self.folder / "pipe")  # that links may lead to
        self.target.prepare(self.folder)
        if refused := self.target.act(self.folder, Case()):  # also loads what is loaded but once
            raise AssertionError(f"{name} refuses its own valid input: {refused}")

    def judge(self, case: Case) -> Verdict:
        """One try."""
        self.current.write_text(json.dumps(case.as_dict()))
        with changed(self.folder, case):
            return judge(
                lambda: self.target.act(self.folder, case), (*self.target.names, str(self.folder)), self.target.bounds
            )

    def search(self, seed: int, tried: Tried, shrink: str | None = None) -> None:
        """Draw a batch of cases and try them; with `shrink` smaller ones follow on the first of that kind."""

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=BATCH, database=None, deadline=None, print_blob=False, report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck), verbosity=hypothesis.Verbosity.quiet,
        )  # fmt: skip
        @hypothesis.given(self.target.cases())
        def attempt(case: Case) -> None:
            verdict = self.judge(case)
            tried(case, verdict)
            if verdict.kind == shrink:
                raise Reproduced

        with suppress(Enough, Reproduced, hypothesis.errors.Flaky):
            attempt()


def work(
    reports: Connection, name: str, seed: int, first: int, seconds: float, place: Path, known: set[str], minimise: bool
) -> None:
    """Try batch after batch, from the `first`; a process of its own does it, and may die.

    Args:
        reports: takes ("ready",); after each batch ("tried", counts, seconds), then of each new kind
            ("found", kind, text, case), and again when it is smaller; at last ("done",).
        place: a folder of its own.
        known: kinds that are not new.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with (
        (place / "stderr").open("w", buffering=1) as error,
        (place / "stdout").open("w") as said,
        redirect_stdout(said),
    ):
        os.dup2(error.fileno(), 2)
        faulthandler.enable(error)
        faulthandler.register(signal.SIGXCPU, error, chain=True)
        os.chdir(place)
        fuzzed = Fuzzed(name, place)
        reports.send(("ready",))
        until = time.monotonic() + seconds
        with memory_limit(SPARE_MEMORY):
            for batch in itertools.count(first):
                until += _batch(fuzzed, reports, seed * 1_000_000 + batch, known, minimise, until)
                if time.monotonic() >= until:
                    break
    reports.send(("done",))


def _batch(fuzzed: Fuzzed, reports: Connection, seed: int, known: set[str], minimise: bool, until: float) -> float:
    """Seconds that went into making findings smaller."""
    ended, new, began = Counter[str](), dict[str, tuple[Case, Verdict]](), time.monotonic()

    def tried(case: Case, verdict: Verdict) -> None:
        ended[verdict.kind] += 1
        if verdict.is_finding and verdict.kind not in known:
            known.add(verdict.kind)
            new[verdict.kind] = case, verdict
        if time.monotonic() > until:
            raise Enough

    fuzzed.search(seed, tried)
    reports.send(("tried", ended, (tries_end := time.monotonic()) - began))
    for case, verdict in new.values():
        reports.send(("found", verdict.kind, verdict.text, case.as_dict()))
    for case, verdict in new.values() if minimise else ():
        if not verdict.kind.startswith("too"):
            case, verdict = _smaller(fuzzed, seed, case, verdict)
            reports.send(("found", verdict.kind, verdict.text, case.as_dict()))
    return time.monotonic() - tries_end


def _smaller(fuzzed: Fuzzed, seed: int, case: Case, verdict: Verdict) -> tuple[Case, Verdict]:
    """The smallest case of a kind that Hypothesis comes to in the time it has."""
    best, until = (case, verdict), time.monotonic() + SHRINK_SECONDS

    def tried(other: Case, its: Verdict) -> None:
        nonlocal best
        if its.kind == verdict.kind and other.size < best[0].size:
            best = other, its
        if time.monotonic() > until:
            raise Enough

    fuzzed.search(seed, tried, shrink=verdict.kind)
    return best


@dataclass
class Soak:
    """Tries of a target, in processes that are replaced when they die."""

    summary: Summary
    findings: Path
    minimise: bool = True
    batches: int = 0
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)

    def run(self, seconds: float) -> Summary:
        """Until tries have taken so many seconds in all, start-up and shrinking not counted; Ctrl-C ends it as well."""
        with suppress(KeyboardInterrupt):
            while self.summary.seconds < seconds:
                self._one_process(seconds - self.summary.seconds)
                self.batches += 1  # the one it has not come to the end of
        return self.summary

    def _one_process(self, seconds: float) -> None:
        spawn = multiprocessing.get_context("spawn")
        reports, its_end = spawn.Pipe(duplex=False)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            known = set(self.summary.findings)
            what = self.summary.target, self.summary.seed, self.batches
            process = spawn.Process(target=work, args=(its_end, *what, seconds, Path(place), known, self.minimise))
            process.start()
            its_end.close()
            try:
                self._listen(reports, process, Path(place))
            finally:
                process.kill()
                process.join()

    def _listen(self, reports: Connection, process: Any, place: Path) -> None:
        heard = told = time.monotonic()
        while (report := _next(reports)) != ("done",):
            match report:
                case ("tried", ended, took):
                    self.batches += 1
                    self.summary.ended += ended
                    self.summary.tries += ended.total()
                    self.summary.seconds += took
                case ("found", kind, text, case):
                    self._save(kind, text, case)
                case None:
                    process.join()
                    self.summary.seconds += time.monotonic() - heard
                    self._note_death(process.exitcode, place)
                    break
            heard = time.monotonic()
            if heard - told > 10:
                told = heard
                self.say(self._progress())

    def _note_death(self, status: int, place: Path) -> None:
        error = (place / "stderr").read_text(errors="replace")[-20_000:]
        if status >= 0 and "Timeout (" not in error:  # of the harness itself
            raise RuntimeError(f"{self.summary.target} cannot be fuzzed:\n{error}")
        died = f"by {signal.Signals(-status).name}" if status < 0 else "as it waited in native code"
        where = re.search(r'/(coe_megatron/\S+)", line \d+ in (\w+)', error)
        kind = f"the process was ended {died}" + (f", {where[1]}: {where[2]}" if where else "")
        self.summary.ended[kind] += 1
        self.summary.tries += 1
        if kind not in self.summary.findings:
            self._save(kind, error, json.loads((place / "current").read_text()))

    def _save(self, kind: str, text: str, case: dict[str, Any]) -> None:
        saved = {"target": self.summary.target, "kind": kind, "seed": self.summary.seed, **case}
        name = hashlib.sha256(f"{self.summary.target} {kind}".encode()).hexdigest()[:12]
        path = self.findings / f"{self.summary.target.replace(':', '-')}-{name}.json"
        self.findings.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(saved, indent=1) + "\n")
        path.with_suffix(".txt").write_text(text)
        if kind not in self.summary.findings:
            self.say(f"found: {kind}: {path}")
        self.summary.findings[kind] = str(path)

    def _progress(self) -> str:
        now = self.summary.as_dict()
        found = {kind: self.summary.ended[kind] for kind in self.summary.findings} or "nothing"
        rates = f"{now['tries_per_second']} a second, {now['accepted_share']:.0%} accepted"
        return f"{self.summary.seconds:.0f} s, {self.summary.tries} tries, {rates}; found: {found}"


def replay(paths: Sequence[Path]) -> dict[Path, Verdict]:
    """Saved inputs once more, in this process."""
    saved = {path.absolute(): json.loads(path.read_text()) for path in paths}
    verdicts = {}
    for target in sorted({each["target"] for each in saved.values()}):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place, chdir(place):
            fuzzed = Fuzzed(target, Path(place))
            with memory_limit(SPARE_MEMORY):
                its = {path: each for path, each in saved.items() if each["target"] == target}
                verdicts |= {path: fuzzed.judge(Case.of(each)) for path, each in its.items()}
    return verdicts


def _next(reports: Connection) -> Any:
    """What the process reports next; None where it has ended."""
    try:
        return reports.recv()
    except EOFError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("target", nargs="?", choices=TARGETS)
    what.add_argument("--replay", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("runs/fuzz"), metavar="FOLDER")
    options = parser.parse_args()
    if options.replay:
        verdicts = replay(options.replay)
        for path, verdict in verdicts.items():
            print(f"{path.name}: {verdict.kind}\n{verdict.text}")
        return any(verdict.is_finding for verdict in verdicts.values())
    summary = Soak(Summary(options.target, options.seed), options.findings).run(60 * options.minutes)
    print(json.dumps(summary.as_dict(), indent=1))
    return bool(summary.findings)


if __name__ == "__main__":
    sys.exit(main())
