"""What can be combined, which combinations are refused, and cases that cover all pairs of the rest."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations, product
from random import Random
from typing import Any

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config.change import with_settings
from coe_megatron.config.checks import problems
from coe_megatron.config.layout import layout
from coe_megatron.config.settings import (
    MLASettings,
    ModelSettings,
    MoESettings,
    OptimizerSettings,
    RunConfig,
    TrainingSettings,
)

ROWS, SEQUENCE, VOCABULARY, EXPERTS, MOST_RANKS = 8, 16, 64, 8, 4
BASE = RunConfig(
    model=ModelSettings(
        4, 32, 4, seq_length=SEQUENCE, vocab_size=VOCABULARY, untied_embeddings=True, init_method_std=0.2
    ),
    # Large coefficients, so that a wrong factor shows.
    moe=MoESettings(EXPERTS, 2, 16, load_balancing="none", aux_loss_coeff=0.1, expert_bias_rate=0.1),
    chain=ChainSettings(1),
    # A large eps: AdamW's first steps are a gradient's sign where it is near zero, which is rounding.
    optimizer=OptimizerSettings(lr=1e-2, clip=0.1, eps=1e-4),
    training=TrainingSettings(precision="fp32", global_batch=ROWS, micro_batch=ROWS),
)
# By dimension its labels, the first of which is the base's, and what a label sets. `replicas` and `micro-batches` set
# the batch of a rank instead.
DIMENSIONS: dict[str, dict[str, dict[str, Any]]] = {
    "tensor": {"TP 1": {}, "TP 2": {"parallel.tensor": 2}},
    "context": {"CP 1": {}, "CP 2": {"parallel.context": 2}},
    "expert": {"EP 1": {}, "EP 2": {"parallel.expert": 2}},
    "expert tensor": {"ETP 1": {}, "ETP 2": {"parallel.expert_tensor": 2}},
    "pipeline": {
        "PP 1": {},
        "PP 2": {"parallel.pipeline": 2},
        "PP 2 interleaved": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
    },
    "replicas": {"replicas x 1": {}, "replicas x 2": {}},
    "micro-batches": {"2 micro-batches": {}, "1 micro-batch": {}, "4 micro-batches": {}},
    "zero": {
        **{f"ZeRO {stage}": {"zero.stage": stage} for stage in (1, 0, 2, 3)},
        "ZeRO 1 offloaded": {"zero.stage": 1, "zero.offload_optimizer": True},
        "ZeRO 3 offloaded": {"zero.stage": 3, "zero.offload_optimizer": True, "zero.offload_parameters": True},
    },
    "precision": {"fp32": {}, "bf16": {"training.precision": "bf16", "moe.topk": EXPERTS}},
    "iterations": {f"C = {count}": {"chain.iterations": count} for count in (1, 2, 3)},
    "layers": {"all layers MoE": {}, "half of them dense": {"moe.layer_freq": [0, 0, 1, 1]}},
    "norms": {name: {"chain.norm_placement": name} for name in ("prenorm", "reference", "iteration_norm")},
    "attention": {
        "MHA": {},
        "GQA": {"model.num_query_groups": 2},
        "MLA": {"model.mla": MLASettings(8, None, 8, 4, 6)},
    },
    "recompute": {
        f"recompute {name}" if name != "none" else "no recompute": {"moe.recompute": name}
        for name in ("none", "experts", "iteration", "layer")
    },
    "dispatcher": {name: {"moe.dispatcher": name} for name in ("alltoall", "deduplicated", "allgather")},
    "chunks": {"1 chunk": {}, "2 chunks": {"moe.overlap_chunks": 2}},
    "capacity": {
        "no capacity": {},
        "capacity": {"moe.capacity_factor": 1.0},
        "padded capacity": {"moe.capacity_factor": 1.0, "moe.pad_to_capacity": True},
    },
    "balancing": {
        "no balancing": {},
        **{name: {"moe.load_balancing": name} for name in ("seq_aux_loss", "aux_loss", "global_aux_loss")},
    },
    "z-loss": {"no z-loss": {}, "z-loss": {"moe.z_loss_coeff": 0.01}},
    "means": {"means of micro-batches": {}, "means of the step": {"moe.auxiliary_mean": "step"}},
    "bias": {"no expert bias": {}, "expert bias": {"moe.expert_bias": True, "moe.score_function": "sigmoid"}},
    "padding": {"no padding mask": {}, "padding mask": {}},
    "documents": {"one document": {}, "packed documents": {}},
}
DEFAULTS = {name: next(iter(labels)) for name, labels in DIMENSIONS.items()}
OF_LAYOUT = ("tensor", "context", "expert", "expert tensor", "pipeline", "replicas")
# What one process computes in another way, but computes too.
OF_TRAVEL = ("zero", "recompute", "dispatcher", "chunks")


@dataclass(frozen=True)
class Case:
    """One label of every dimension, in their order."""

    labels: tuple[str, ...]

    @classmethod
    def of(cls, *given: str) -> "Case":
        """The case with these labels, and the base's on all other dimensions."""
        chosen = DEFAULTS | {dimension_of(label): label for label in given}
        return cls(tuple(chosen.values()))

    def __getitem__(self, dimension: str) -> str:
        return self.labels[list(DIMENSIONS).index(dimension)]

    def __str__(self) -> str:
        return ", ".join(label for label in self.labels if label not in DEFAULTS.values()) or "base"

    def replaced(self, **labels: str) -> "Case":
        """With other labels, by dimension."""
        chosen = dict(zip(DIMENSIONS, self.labels, strict=True))
        return Case(tuple((chosen | labels).values()))

    @cached_property
    def config(self) -> RunConfig:
        """As a run's, with the batch of a rank."""
        found = with_settings(BASE, self._settings)
        parts = layout(found, self.ranks).data * int(self["micro-batches"][0])
        return with_settings(found, {"training.micro_batch": ROWS // parts})

    @property
    def has_rows(self) -> bool:
        """Whether there is a row for every micro-batch."""
        return self.config.training.micro_batch > 0

    @cached_property
    def ranks(self) -> int:
        """The number of ranks that it needs."""
        return layout(with_settings(BASE, self._settings)).world_size * int(self["replicas"][-1])

    @property
    def _settings(self) -> dict[str, Any]:
        given = zip(DIMENSIONS.values(), self.labels, strict=True)
        return {key: value for labels, label in given for key, value in labels[label].items()}

    @property
    def alone(self) -> "Case":
        """The same training in one process, with the same micro-batches one after the other."""
        same = {name: DEFAULTS[name] for name in (*OF_LAYOUT, *OF_TRAVEL)}
        return self.replaced(**same)

    @property
    def alone_config(self) -> RunConfig:
        """Of one process; a balancing loss of all replicas needs their micro-batches as one.

        If tokens weigh the same in all micro-batches, one micro-batch has to do as well.
        """
        size = self.config.training.micro_batch
        if self["means"] == "means of the step" and self["capacity"] == "no capacity":
            size = size if self["balancing"] == "aux_loss" else ROWS
        if self["balancing"] == "global_aux_loss":
            size = ROWS // int(self["micro-batches"][0])
        return with_settings(self.alone.config, {"training.micro_batch": size})

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """All pairs of its labels."""
        return combinations(self.labels, 2)

    def is_exact(self, labels: tuple[str, ...]) -> bool:
        """Whether the case tests some of its labels as exactly as can be."""
        return self["precision"] == "fp32" or "bf16" in labels

    @property
    def number(self) -> str:
        """Names what it is compared with."""
        content = self.alone_config, self.is_padded, self.has_documents
        return hashlib.sha256(repr(content).encode()).hexdigest()[:12]

    @property
    def is_padded(self) -> bool:
        """Whether the model gets a padding mask."""
        return self["padding"] == "padding mask"

    @property
    def has_documents(self) -> bool:
        """Whether attention stays in one of several documents of a row."""
        return self["documents"] == "packed documents"

    @cached_property
    def refusal(self) -> str:
        """The line that refuses it; empty if none does."""
        return next(problems(self.config, self.ranks), "")

    @property
    def another(self) -> str:
        """Why it does not compute what one process does, which is no mistake; empty if it does."""
        if self["capacity"] != "no capacity":
            for dimension, divided in {"tensor": "TP 2", "context": "CP 2"}.items():
                if self[dimension] == divided:
                    return f"a capacity is that of a rank's tokens, and {divided[:2]} divides these"
        has_replicas = layout(self.config, self.ranks).data > 1
        if self["balancing"] == "global_aux_loss" and has_replicas:
            of_each = "a capacity" if self["capacity"] != "no capacity" else ""
            if self.is_padded and self["z-loss"] == "z-loss" and self["means"] == "means of micro-batches":
                of_each = "a z-loss with padding"
            if of_each:
                return f"global_aux_loss takes the micro-batches of all replicas as one, {of_each} each by itself"
        return ""


@cache
def dimension_of(label: str) -> str:
    """The dimension that has a label; labels differ."""
    (found,) = (name for name, labels in DIMENSIONS.items() if label in labels)
    return found


@dataclass(frozen=True)
class Pairs:
    """All pairs of labels of two dimensions: those that are refused or compute something else, with the reason."""

    refused: Mapping[tuple[str, str], str]
    another: Mapping[tuple[str, str], str]
    tested: Sequence[tuple[str, str]]


@cache
def pairs() -> Pairs:
    """Sort all pairs, each with the base's labels on all other dimensions."""
    refused, another, tested = {}, {}, []
    for first, second in combinations(DIMENSIONS, 2):
        for pair in ((a, b) for a in DIMENSIONS[first] for b in DIMENSIONS[second]):
            case = Case.of(*pair)
            if case.refusal:
                refused[pair] = case.refusal
            elif case.another:
                another[pair] = case.another
            elif case.ranks <= MOST_RANKS:
                tested.append(pair)
    return Pairs(refused, another, tested)


@cache
def triples() -> list[tuple[str, ...]]:
    """Those that can be tested, of labels that are not the base's."""
    others = {name: list(labels)[1:] for name, labels in DIMENSIONS.items()}
    all_of_them = (found for three in combinations(others, 3) for found in product(*(others[name] for name in three)))
    return [found for found in all_of_them if _is_valid(found)]


def covering_cases(wanted: Sequence[tuple[str, ...]] | None = None) -> list[Case]:
    """Few cases in which every wanted pair or triple occurs; None for all tested pairs.

    Each begins with one that is left, and takes labels greedily. Rounding in bf16 hides much, so all but those with
    bf16 occur in fp32.
    """
    wanted = pairs().tested if wanted is None else wanted
    size, left = len(wanted[0]), dict.fromkeys(frozenset(labels) for labels in wanted)
    found = []
    while left:
        row = list(next(iter(left)))
        if "bf16" not in row:
            row = list(dict.fromkeys([*row, "fp32"]))
        for dimension in DIMENSIONS:
            if dimension not in map(dimension_of, row):
                fitting = [label for label in DIMENSIONS[dimension] if _is_valid([*row, label])]
                others = list(combinations(row, size - 1))
                row.append(max(fitting, key=lambda label: sum(frozenset((label, *some)) in left for some in others)))
        case = Case.of(*row)
        for labels in combinations(case.labels, size):
            if case.is_exact(labels):
                left.pop(frozenset(labels), None)
        found.append(case)
    return found


def drawn_cases(count: int, seed: int) -> list[Case]:
    """Random ones of those that can be tested, each label as likely as the others of its dimension."""
    generator, found = Random(seed), []
    while len(found) < count:
        labels = [generator.choice(list(each)) for each in DIMENSIONS.values()]
        if _is_valid(labels):
            found.append(Case(tuple(labels)))
    return found


def _is_valid(labels: Sequence[str]) -> bool:
    case = Case.of(*labels)
    return case.ranks <= MOST_RANKS and case.has_rows and not (case.refusal or case.another)


def fixed_cases() -> list[Case]:
    """Cases on at most two ranks whose losses are kept: everything that divides or sends in another way, by itself."""
    layouts = ["TP 2", "CP 2", "EP 2", "ETP 2", "PP 2", "PP 2 interleaved", "replicas x 2"]
    stages = [("replicas x 2", stage) for stage in DIMENSIONS["zero"] if stage not in DEFAULTS.values()]
    ways = [("EP 2", label) for name in ("recompute", "dispatcher", "chunks") for label in list(DIMENSIONS[name])[1:]]
    chains = [
        (label,) for name in ("iterations", "norms", "attention", "precision") for label in list(DIMENSIONS[name])
    ]
    given = [(), *((label,) for label in layouts), ("PP 2 interleaved", "4 micro-batches"), *stages, *ways, *chains]
    return list(dict.fromkeys(Case.of(*each) for each in given))


def labels() -> Iterator[tuple[str, str]]:
    """All labels with their dimension."""
    for dimension, found in DIMENSIONS.items():
        for label in found:
            yield dimension, label
