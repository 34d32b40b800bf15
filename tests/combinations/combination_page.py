"""Measures all pairs with the installed Megatron-Core, and writes docs/combinations.md from what is measured.

    make combinations                                         # Megatron-Core 0.16.1
    make combinations PYTHON=python3.12 VENV=.venv-3.12       # 0.19.2

The numbers are in docs/combinations/RELEASE.json; the page shows the worst of all releases. It also writes the losses
of fixed tiny runs, with which a test compares them.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from combination_design import DEFAULTS, Case, covering_cases, fixed_cases, labels, pairs  # noqa: E402
from combination_training import LIMITS, fixed_runs, is_wrong, measure  # noqa: E402

FOLDER = ROOT / "docs/combinations"
PAGE = FOLDER.with_suffix(".md")
LOSSES = Path(__file__).with_name("losses.json")  # by release and case, of `fixed_runs`


def _short(deviation: float) -> str:
    return f"{deviation:.0e}".replace("e-0", "e-") if deviation else "0"


_GRADIENTS, _WEIGHTS = (_short(LIMITS["fp32"][kind]) for kind in ("gradients", "weights"))
_INTRODUCTION = f"""# Combinations

For every pair of settings and layouts: the worst deviation of a gradient, a loss, the gradient norm or a weight from
the training of one process without sharding, recomputation or exchanges, relative to a tensor's largest element. A few
cases cover all pairs. Each begins with the weights of the one process and takes three steps, with rows of different
length and large auxiliary losses. A pair's number is the worst of all fp32 cases that contain it, so another part of a
case may be what deviates; the numbers of bf16 are from its own cases. Limits are {_GRADIENTS} for gradients, losses and
norms and {_WEIGHTS} for weights, and in bf16 {LIMITS["bf16"]["gradients"]} for gradients.

`make combinations` writes this page; nothing in it is written by hand. A loss per token (`calculate_per_token_loss`) is
a setting of Megatron's own loop, whose losses are compared with
[Megatron's](megatron-releases.md#gradients-that-are-wrong-in-megatron-core). The full tier of tests has triples
and random combinations (`pytest -m full tests/combinations`)."""


def record(cases: Sequence[Case], found: Mapping[Case, Mapping[str, float]]) -> dict[str, Any]:
    """What is measured, for JSON."""
    return {
        "megatron-core": version("megatron-core"),
        "torch": torch.__version__,
        "cases": [{"labels": list(case.labels), "ranks": case.ranks, "worst": found[case]} for case in cases],
    }


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """The page as Markdown, from the records of releases."""
    found = pairs()
    measured = [(Case(tuple(each["labels"])), max(each["worst"].values())) for one in records for each in one["cases"]]
    worst: dict[tuple[str, str], float] = {}
    for case, deviation in measured:
        for pair in case.pairs:
            if case.is_exact(pair):
                worst[pair] = max(worst.get(pair, 0.0), deviation)
    reasons = list(dict.fromkeys([*found.refused.values(), *found.another.values()]))
    releases = " and ".join(f"Megatron-Core {one['megatron-core']} with torch {one['torch']}" for one in records)
    wrong = sum(is_wrong(Case(tuple(each["labels"])), each["worst"]) for one in records for each in one["cases"])
    parts = [
        _INTRODUCTION,
        f"{releases}: {len(records[0]['cases'])} cases on up to {max(each['ranks'] for each in records[0]['cases'])} "
        f"ranks, {wrong} of them wrong. Of {len(found.tested) + len(found.refused) + len(found.another)} pairs "
        f"{len(found.tested)} are tested, {len(found.refused)} are refused, and {len(found.another)} are another "
        "computation by definition.",
        "\n".join(_matrix(worst, {**found.refused, **found.another}, reasons)),
        "## Reasons",
        "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
        "## Cases",
        "\n".join(_cases(records)),
    ]
    return "\n\n".join(parts) + "\n"


def _matrix(
    worst: Mapping[tuple[str, str], float], excluded: Mapping[tuple[str, str], str], reasons: Sequence[str]
) -> Iterator[str]:
    """A row and a column for everything that is not the base's; a reason's number in brackets for pairs not tested."""
    shown = [label for dimension, label in labels() if label != DEFAULTS[dimension]]
    yield f"| | {' | '.join(map(str, range(1, len(shown))))} |"
    yield f"|---|{'---|' * (len(shown) - 1)}"
    for row, label in enumerate(shown, 1):
        cells = []
        for other in shown[: row - 1]:
            pair = (other, label)
            if pair in excluded:
                cells.append(f"[{reasons.index(excluded[pair]) + 1}]")
            else:
                cells.append(_short(worst[pair]) if pair in worst else "")  # none of one dimension
        cells += [""] * (len(shown) - 1 - len(cells))
        yield f"| {row} {label} | {' | '.join(cells)} |"


def _cases(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"| ranks | case | {' | '.join(one['megatron-core'] for one in records)} |"
    yield f"|---:|---|{'---:|' * len(records)}"
    for number, each in enumerate(records[0]["cases"]):
        deviations = (_short(max(one["cases"][number]["worst"].values())) for one in records)
        yield f"| {each['ranks']} | {Case(tuple(each['labels']))} | {' | '.join(deviations)} |"


def read() -> list[dict[str, Any]]:
    """The records of all releases that have the cases of today."""
    records = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    cases = [list(case.labels) for case in covering_cases()]
    return [one for one in records if [each["labels"] for each in one["cases"]] == cases]


def write_losses(release: str) -> None:
    """Write the losses of fixed runs, beside those of other releases."""
    known = json.loads(LOSSES.read_text()) if LOSSES.exists() else {}
    known[release] = {case: traces[0][0].losses for case, traces in fixed_runs(fixed_cases()).items()}
    LOSSES.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def main() -> None:
    """Measure, and write everything."""
    cases, release = covering_cases(), version("megatron-core")
    with tempfile.TemporaryDirectory() as folder:
        found = {case: worst for (case, _), worst in measure(Path(folder), [(case, "") for case in cases]).items()}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{release}.json").write_text(json.dumps(record(cases, found), indent=1) + "\n")
    PAGE.write_text(page(read()))
    wrong = sum(is_wrong(*each) for each in found.items())
    print(f"{len(cases)} cases, {wrong} of them wrong: {PAGE.relative_to(ROOT)}")
    write_losses(release)


if __name__ == "__main__":
    main()
