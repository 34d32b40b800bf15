"""What the iterations of each arm do, in a table: directions and norms of increments, and choices of experts.

All numbers are of the last logged step (docs/metrics.md), as means over the chains of the model and over seeds. Runs
from before a key was recorded leave their cells empty.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from coe_megatron.study.report.markdown_text import number
from coe_megatron.study.report.results import Result

_EXPLANATION = (
    "cos is the mean over tokens of the cosine between the first and the last increment of a layer, with its lowest "
    "and highest layer. A single scale is R² of the best fit Δ = s F₁, where Δ is what the chain adds to its input and "
    "s one number per layer: at 1 the iterations only scale the first increment. Overlap is the fraction of choices of "
    "an expert that the token has visited in an earlier iteration of the layer. Norms are root mean squares."
)


@dataclass(frozen=True)
class IterationSummary:
    """What one chain does with its tokens, of the last logged step of one run; None where the run did not record it.

    Attributes:
        cosine: mean over tokens of cos(F_1, F_C).
        single_scale: R² of the best fit Δ = s F_1 with one number s.
        overlap: mean over iterations 2 .. C of the fraction of repeated experts.
        first_norm, last_norm: root mean squares of F_1 and F_C.
    """

    cosine: float | None
    single_scale: float | None
    overlap: float | None
    first_norm: float | None
    last_norm: float | None


def iteration_summaries(result: Result) -> list[IterationSummary]:
    """The chains of a finished run with more than one iteration, by layer."""
    layers: dict[int, list[Mapping[str, Any]]] = {}
    for place in result.steps[-1]["routing"]:
        layers.setdefault(place["layer"], []).append(place)
    return [_summary(places) for places in layers.values() if len(places) > 1]


def iterations_table(finished: Sequence[Result], titles: Mapping[str, str]) -> tuple[str, list[str], list[list[str]]]:
    """The explanation, the columns, and a row for each arm with chains.

    Args:
        titles: what to call each arm, by its name.
    """
    chains: dict[str, list[IterationSummary]] = {}
    for result in finished:
        if found := iteration_summaries(result):
            chains.setdefault(result.run.arm, []).extend(found)
    columns = ["arm", "cos(F₁, F_C)", "lowest to highest", "a single scale", "overlap", "norm of F₁", "norm of F_C"]
    return _EXPLANATION, columns, [[titles[arm], *_cells(found)] for arm, found in chains.items()]


def _summary(places: Sequence[Mapping[str, Any]]) -> IterationSummary:
    first, *later = sorted(places, key=lambda place: place["iteration"])
    cosines = later[-1].get("increment_cosines")
    return IterationSummary(
        cosine=cosines[0] if cosines else None,
        single_scale=later[-1].get("single_scale"),
        overlap=_mean(place.get("overlap") for place in later),
        first_norm=first.get("increment_norm"),
        last_norm=later[-1].get("increment_norm"),
    )


def _cells(chains: Sequence[IterationSummary]) -> list[str]:
    cosines = [chain.cosine for chain in chains if chain.cosine is not None]
    return [
        number(_mean(cosines), "+.2f"),
        f"{min(cosines):+.2f} to {max(cosines):+.2f}" if cosines else "-",
        number(_mean(chain.single_scale for chain in chains), ".2f"),
        number(_mean(chain.overlap for chain in chains), ".2f"),
        number(_mean(chain.first_norm for chain in chains), ".3g"),
        number(_mean(chain.last_norm for chain in chains), ".3g"),
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None
