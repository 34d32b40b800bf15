"""The built-in tasks on facts: questions of one or several hops, each answered by the next token.

Every relation r1 ... rR is a random permutation of the entities e1 ... eN. A question ends in an entity, before which
are its relations, the first to apply closest to it: "r2 r5 e7" asks for r2(r5(e7)). So what has to be computed one
after the other is computed at one token, the entity, and the token after it is the answer.

    recall   "r2 r5 e7"   The documents of training state every fact (questions of one hop), and a part of the questions
                          of more hops. Validation asks facts, which training has stated, and held-out questions of more
                          hops, whose single facts training has stated too. Facts have to be stored in the weights.
    lookup   "e4 e9 e1 e4 ... r1 r1 e1"   The control. The document itself states in pairs the successors of
                          CONTEXT_ENTITIES entities on a random cycle, and r1 asks for the successor. Nothing is stored;
                          tokens have to be combined. Validation has held-out documents.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from coe_megatron.data.manifest import Split
from coe_megatron.errors import ConfigError
from coe_megatron.parsing import first_of
from coe_megatron.text import shortened

Kind = Literal["recall", "lookup"]

HELD_OUT_FRACTION = 0.2  # of the questions that validation may ask
CONTEXT_ENTITIES = 6  # of a document of `lookup`
MAX_HOPS = CONTEXT_ENTITIES - 1  # more hops lead back to the first entity
# With fewer, no question of two hops might be held out.
_BOUNDS = {"entities": (CONTEXT_ENTITIES, 10_000), "relations": (4, 1_000)}


@dataclass(frozen=True)
class FactTask:
    """A task, its sizes, and the questions that are asked.

    Attributes:
        kind: `recall` or `lookup`.
        entities: N.
        relations: R; `lookup` uses one of them, but has the same words.
        hops: numbers of relations of a question, all equally frequent.

    Raises:
        ConfigError: a field is not valid; the message names the option of launch/prepare_data.py.
    """

    kind: Kind
    entities: int = 6
    relations: int = 32
    hops: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"--task is {self.kind!r}: it must be one of {', '.join(get_args(Kind))}")
        for name, (least, most) in _BOUNDS.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise ConfigError(f"--{name} is {value}: it must be at least {least}, and at most {most}")
        hops = shortened(str(list(self.hops)), 100)
        if not self.hops or not all(1 <= each <= MAX_HOPS for each in self.hops):
            raise ConfigError(f"--hops is {hops}: each must be at least 1, and at most {MAX_HOPS}")
        if len(set(self.hops)) < len(self.hops):
            raise ConfigError(f"--hops is {hops}: name each number once")

    @classmethod
    def of(cls, source: Mapping[str, Any]) -> "FactTask | None":
        """The task of a manifest's `source`; None if the data are of none.

        Raises:
            ConfigError: it is not valid.
        """
        if "task" not in source:
            return None
        try:
            return TypeAdapter(cls).validate_python(source["task"])
        except ValidationError as error:
            raise ConfigError(f"the manifest's task is not valid: {first_of(error)}") from None

    @property
    def words(self) -> list[str]:
        """All words of the documents: entities, then relations."""
        return [*self._entities, *self._relations]

    @property
    def facts(self) -> int:
        """The number of documents that state every fact once; 0 if training states none."""
        return self.entities * self.relations if self.kind == "recall" and 1 in self.hops else 0

    def generate(self, split: Split, count: int, seed: int, documents: int | None = None) -> Iterator[dict[str, str]]:
        """Yield `count` documents; with the same seed, a longer sequence starts with the shorter one.

        In training the first ones of `recall` are all facts, if it has questions of one hop.

        Args:
            split: "train", or "valid" for facts and held-out questions.
            seed: of the facts and of what is held out, which the numbers of hops do not change.
            documents: seed of the choice and order of documents; None for `seed`.

        Yields:
            {"prompt": question, "answer": an entity, "group": such as "2 hops"}.

        Raises:
            ValueError: there is no such split.
            ConfigError: `count` is too small for all facts.
        """
        if split not in get_args(Split):
            raise ValueError(f"split is {split!r}: it must be one of {', '.join(get_args(Split))}")
        if split == "train" and count < self.facts:
            raise ConfigError(f"--builtin is {count}: it must be at least {self.facts}, the number of facts")
        draw = random.Random(f"{split} {seed if documents is None else documents} {self.kind}")
        return (
            self._recall(split, count, seed, draw) if self.kind == "recall" else self._lookup(split, count, seed, draw)
        )

    def _recall(self, split: Split, count: int, seed: int, draw: random.Random) -> Iterator[dict[str, str]]:
        successors = self._successors(seed)
        facts = [(relation, first) for relation in range(self.relations) for first in range(self.entities)]
        stated = facts if split == "train" and self.facts else []
        yield from (self._question([relation], first, successors) for relation, first in stated)
        for _ in range(count - len(stated)):
            hops = draw.choice(self.hops)
            while True:
                path = [draw.randrange(self.relations) for _ in range(hops)]
                record = self._question(path, draw.randrange(self.entities), successors)
                if hops == 1 or _is_held_out(record["prompt"], seed) == (split == "valid"):
                    break
            yield record

    def _question(self, path: list[int], first: int, successors: list[list[int]]) -> dict[str, str]:
        """A question of `recall` about the relations of a path, in the order in which they apply."""
        last = first
        for relation in path:
            last = successors[relation][last]
        relations = [self._relations[relation] for relation in reversed(path)]
        return _record([*relations, self._entities[first]], self._entities[last], len(path))

    def _successors(self, seed: int) -> list[list[int]]:
        """`[relation][entity]`: the entity that follows."""
        draw = random.Random(f"facts {seed}")
        return [draw.sample(range(self.entities), self.entities) for _ in range(self.relations)]

    def _lookup(self, split: Split, count: int, seed: int, draw: random.Random) -> Iterator[dict[str, str]]:
        for _ in range(count):
            hops = draw.choice(self.hops)
            while True:
                record = self._stated_question(hops, draw)
                if _is_held_out(record["prompt"], seed) == (split == "valid"):
                    break
            yield record

    def _stated_question(self, hops: int, draw: random.Random) -> dict[str, str]:
        """A question of `lookup`, with the pairs that answer it in any order."""
        cycle = draw.sample(self._entities, CONTEXT_ENTITIES)
        pairs = list(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
        draw.shuffle(pairs)
        stated = [entity for pair in pairs for entity in pair]
        return _record([*stated, *[self._relations[0]] * hops, cycle[0]], cycle[hops], hops)

    @cached_property
    def _entities(self) -> list[str]:
        return [f"e{number}" for number in range(1, self.entities + 1)]

    @cached_property
    def _relations(self) -> list[str]:
        return [f"r{number}" for number in range(1, self.relations + 1)]


def _record(prompt: list[str], answer: str, hops: int) -> dict[str, str]:
    return {"prompt": " ".join(prompt), "answer": answer, "group": f"{hops} hop{'s' * (hops > 1)}"}


def _is_held_out(prompt: str, seed: int) -> bool:
    digest = sha256(f"{seed} {prompt}".encode()).digest()
    return int.from_bytes(digest[:8]) < HELD_OUT_FRACTION * 2**64
