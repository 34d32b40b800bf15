"""All pairs of what can be combined train as one process does, but for what is refused."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from combination_design import (
    DIMENSIONS,
    Case,
    covering_cases,
    dimension_of,
    drawn_cases,
    fixed_cases,
    pairs,
    triples,
)
from combination_mistakes import MISTAKES
from combination_page import LOSSES, PAGE, page, read
from combination_training import fixed_runs, is_wrong, measure

pytestmark = pytest.mark.ranks


def test_every_pair_is_tested_or_has_a_reason() -> None:
    found, cases = pairs(), covering_cases()
    assert not [case for case in cases if case.refusal or case.another]
    assert {pair for case in cases for pair in case.pairs if case.is_exact(pair)} >= set(found.tested)


def test_the_page_is_what_was_measured_of_these_cases() -> None:
    """After a change of the cases, or of what is refused: make combinations, with both releases."""
    records = read()
    assert {one["megatron-core"] for one in records} == {"0.16.1", "0.19.2"}
    assert PAGE.read_text() == page(records) and "ranks, 0 of them wrong." in PAGE.read_text()


@pytest.mark.timeout(600)
def test_fixed_runs_have_the_losses_that_they_had() -> None:
    """A change of them needs a line in the changelog; `make combinations` writes the new ones."""
    known, found = json.loads(LOSSES.read_text())[version("megatron-core")], fixed_runs(fixed_cases())
    assert known.keys() == found.keys()
    for case, traces in found.items():  # the last bits depend on the CPU
        assert traces[0][0].losses == pytest.approx(known[case], rel=2e-3 if "bf16" in case else 1e-5), case


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_run_again_has_the_same_bits() -> None:
    for case, traces in fixed_runs(fixed_cases(), times=2).items():
        for first, second in traces:
            assert (first.losses, first.norms) == (second.losses, second.norms), case
            for kind in ("gradients", "weights"):
                ours, theirs = getattr(first, kind), getattr(second, kind)
                assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), case


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pairs_are_the_training_of_one_process(tmp_path: Path) -> None:
    found = measure(tmp_path, [(case, "") for case in covering_cases()])
    assert {str(case): worst for (case, _), worst in found.items() if is_wrong(case, worst)} == {}


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_triples_are_the_training_of_one_process(tmp_path: Path) -> None:
    found = measure(tmp_path, [(case, "") for case in covering_cases(triples())])
    assert {str(case): worst for (case, _), worst in found.items() if is_wrong(case, worst)} == {}


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(8))
def test_random_combinations_are_the_training_of_one_process(tmp_path: Path, seed: int) -> None:
    found = measure(tmp_path, [(case, "") for case in drawn_cases(25, seed)])
    assert {str(case): worst for (case, _), worst in found.items() if is_wrong(case, worst)} == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_mistake_in_any_of_them_is_noticed(tmp_path: Path) -> None:
    planted = [(Case.of(*labels), name) for name, (labels, _) in MISTAKES.items()]
    found = measure(tmp_path, planted)
    unnoticed = [name for (case, name), worst in found.items() if not is_wrong(case, worst)]
    assert unnoticed == [""]  # without a mistake


def test_every_dimension_has_a_mistake() -> None:
    """But precision and attention, whose arithmetic is Megatron's and torch's, and chains, whose parts the rest are."""
    touched = {dimension_of(label) for labels, _ in MISTAKES.values() for label in labels}
    assert touched | {"precision", "iterations", "norms"} == set(DIMENSIONS)
