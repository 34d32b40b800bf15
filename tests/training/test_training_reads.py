"""What a run reads when it goes on: rank 0 alone what all ranks need, and its errors are everybody's."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from attempts import attempt, small
from ranks import run_ranks

from coe_megatron.checkpoint.integrity import MANIFEST
from coe_megatron.config import RunConfig
from coe_megatron.config.settings import ZeroSettings

pytestmark = pytest.mark.ranks
COMMON = (MANIFEST, "state.json", "tensors/.metadata")


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> RunConfig:
    """Of a run with DeepSpeed's own JSON in its folder, so that all it reads lies in one place."""
    native = tmp_path / "run" / "native.json"
    native.parent.mkdir()
    native.write_text(json.dumps({"wall_clock_breakdown": False}))
    made = small(prepared, tmp_path / "run", steps=4)
    return replace(made, zero=ZeroSettings(deepspeed=str(native)))


def test_rank_0_alone_reads_what_all_need_and_its_errors_are_everybodys(config: RunConfig) -> None:
    (first, *refusals), (second, *same) = run_ranks(on_a_rank, 2, config)

    checkpoint = Path("checkpoints", "step-00000004")
    assert {"native.json", "config.yaml", *(str(checkpoint / name) for name in COMMON)} <= first.keys()
    listed = sorted(json.loads(Path(config.output, checkpoint, MANIFEST).read_text())["files"])
    verified = Counter(str(checkpoint / name) for name in listed[1::2])  # each of two ranks takes every other file
    own = second - verified
    assert own and all(name.endswith((".distcp", "random/00001.pt")) for name in own), own

    assert refusals == same
    assert refusals[0].startswith("ConfigError: optimizer.lr is 0.5: the checkpoints in")
    assert refusals[1].startswith("ConfigError: zero.deepspeed is ") and "not valid JSON" in refusals[1]


def on_a_rank(config: RunConfig) -> tuple[Counter[str], str, str]:
    attempt(config)
    read = read_when_it_goes_on(config)
    other = refusal(replace(config, optimizer=replace(config.optimizer, lr=0.5)))
    Path(str(config.zero.deepspeed)).write_text("[")
    return read, other, refusal(config)


def read_when_it_goes_on(config: RunConfig) -> Counter[str]:
    """How often this rank opens or lists what lies in the run's folder, until the first step."""
    opened: Counter[str] = Counter()
    over = []

    def note(event: str, arguments: tuple) -> None:
        if event in ("open", "os.listdir", "os.scandir") and not over and isinstance(arguments[0], str | bytes | Path):
            path = Path(str(arguments[0]))
            if path.is_relative_to(config.output):
                opened[str(path.relative_to(config.output))] += 1

    sys.addaudithook(note)
    longer = replace(config, training=replace(config.training, steps=5))
    attempt(longer, lambda _run, _step: over.append(1))
    return opened


def refusal(config: RunConfig) -> str:
    try:
        attempt(config)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "none"
