"""The tasks on facts: every fact is in training, no held-out question is; and a token for each word."""

import runpy
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coe_megatron.corpus.fact_hops import CONTEXT_ENTITIES, MAX_HOPS, FactTask
from coe_megatron.data.datasets import PreparedData
from coe_megatron.data.manifest import Manifest
from coe_megatron.data.prepare import prepare
from coe_megatron.data.prepare_settings import PrepareSettings
from coe_megatron.errors import ConfigError

PROGRAM = Path(__file__).parents[2] / "launch" / "prepare_data.py"
SIZES = {"entities": st.integers(6, 20), "relations": st.integers(4, 9), "seed": st.integers(0, 5)}
HOPS = st.sets(st.integers(1, MAX_HOPS), min_size=1).map(tuple)


def facts_of(task: FactTask, seed: int) -> dict[tuple[str, str], str]:
    """(relation, entity) -> entity, of the documents that training states first."""
    stated = list(task.generate("train", task.facts, seed))
    facts = {tuple(each["prompt"].split()): each["answer"] for each in stated}
    assert len(facts) == len(stated) == task.entities * task.relations
    return facts


@settings(max_examples=25, deadline=None)
@given(hops=HOPS, **SIZES)
def test_answers_follow_from_the_facts_that_training_states(hops, entities, relations, seed) -> None:
    facts = facts_of(FactTask("recall", entities, relations, (1,)), seed)
    task = FactTask("recall", entities, relations, hops)
    for split in ("train", "valid"):
        for record in task.generate(split, 60 + task.facts, seed):
            *path, entity = record["prompt"].split()
            assert record["group"] == ("1 hop" if len(path) == 1 else f"{len(path)} hops") and len(path) in hops
            for relation in reversed(path):
                entity = facts[relation, entity]
            assert record["answer"] == entity


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(["recall", "lookup"]), asked=HOPS, **SIZES)
def test_no_held_out_question_is_in_training(kind, asked, entities, relations, seed) -> None:
    """Whatever numbers of hops the one or the other has."""
    training = FactTask(kind, entities, relations, (1, 2, 3)).generate("train", 2000, seed)
    stated = {each["prompt"] for each in training}
    held_out = list(FactTask(kind, entities, relations, asked).generate("valid", 200, seed))
    for record in held_out:
        is_fact = kind == "recall" and record["group"] == "1 hop"
        assert (record["prompt"] in stated) == is_fact
    assert len({each["prompt"] for each in held_out}) > 1


@given(start=st.integers(1, MAX_HOPS), seed=st.integers(0, 5), count=st.integers(0, 30))
def test_a_document_of_lookup_states_what_it_asks_for(start, seed, count) -> None:
    for record in FactTask("lookup", hops=(start,)).generate("train", count, seed):
        words = record["prompt"].split()
        stated, path, entity = words[: 2 * CONTEXT_ENTITIES], words[2 * CONTEXT_ENTITIES : -1], words[-1]
        successors = dict(zip(stated[::2], stated[1::2], strict=True))
        assert len(successors) == len(set(successors.values())) == CONTEXT_ENTITIES and path == ["r1"] * start
        for _ in path:
            entity = successors[entity]
        assert record["answer"] == entity != words[-1]


@pytest.mark.parametrize("kind", ["recall", "lookup"])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_seed_gives_the_same_documents_and_another_one_others(kind, split) -> None:
    task = FactTask(kind, 8, 4)
    first = list(task.generate(split, 150, 3))
    assert first == list(islice(task.generate(split, 300, 3), 150))
    assert first != list(task.generate(split, 150, 4)) and first[100:] != list(task.generate(split, 150, 3, 5))[100:]
    assert {each["answer"] for each in first} <= set(task.words)


def test_hops_are_equally_frequent() -> None:
    counts = Counter(each["group"] for each in FactTask("recall").generate("valid", 3000, 0))
    assert counts.keys() == {"1 hop", "2 hops", "3 hops"} and min(counts.values()) > 900


@pytest.mark.parametrize("kind", ["recall", "lookup"])
def test_each_word_is_a_token_and_folders_share_a_tokenizer(kind, tmp_path) -> None:
    task = FactTask(kind, 8, 4)
    manifest = prepare(PrepareSettings(tmp_path / "all", builtin=60, task=task, seed=2))
    other = prepare(PrepareSettings(tmp_path / "two", builtin=60, task=FactTask("recall", 8, 4, (2,))))
    assert manifest.tokenizer_sha256 == other.tokenizer_sha256 and manifest.vocab_size == 8 + 4 + 2
    assert FactTask.of(Manifest.read(tmp_path / "all").source) == task
    data = PreparedData.open(tmp_path / "all")
    rows = data.rows("train", 40, 1)
    for row, record in zip((rows[at] for at in range(60)), task.generate("train", 60, 2), strict=True):
        text = f"{record['prompt']} {record['answer']}"
        ids = data.tokenizer.encode(text)
        assert len(ids) == len(text.split()) and data.tokenizer.decode(ids.tolist()) == text
        assert row["tokens"][: len(ids)].tolist() == ids.tolist()
        counted = row["labels"][row["loss_mask"] == 1]
        assert data.tokenizer.decode(counted.tolist()) == record["answer"]


def test_a_manifest_with_another_task_is_refused() -> None:
    assert FactTask.of({"builtin": 5}) is None
    with pytest.raises(ConfigError, match="the manifest's task is not valid"):
        FactTask.of({"task": {"kind": "recall", "entities": "many"}})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--builtin", 500, "--task", "guess"), "argument --task: invalid choice: 'guess'"),
        (("--builtin", 500, "--task", "recall", "--hops", 0), "--hops is [0]: each must be at least 1, and at most 5"),
        (("--builtin", 500, "--task", "recall", "--hops", 2, 2), "--hops is [2, 2]: name each number once"),
        (("--builtin", 500, "--task", "recall", "--entities", 5), "--entities is 5: it must be at least 6"),
        (("--builtin", 500, "--task", "recall", "--relations", 3), "--relations is 3: it must be at least 4"),
        (("--builtin", 9, "--task", "recall"), "--builtin is 9: it must be at least 192, the number of facts"),
        (("--builtin", 2000, "--task", "recall", "--vocab-size", 300), "--vocab-size is 300: leave it out"),
        (("--builtin", 2000, "--task", "lookup", "--tokenizer", "x"), "--tokenizer is x: leave it out"),
        (("--builtin", 2000, "--task", "lookup", "--template", "{query}"), "built-in problems have prompt and answer"),
        (("--builtin", 500, "--vocab-size", 300, "--hops", 2), "--hops requires --task"),
        (("--input", "x.jsonl", "--task", "recall"), "--task is recall: it requires --builtin"),
    ],
)
def test_a_wrong_option_is_one_line(options, reason, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, options), "--output", "out", "--workers", "1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and reason in said[-1], said
    assert not list(tmp_path.iterdir())
