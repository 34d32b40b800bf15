"""What --dry-run says, against facts of the paper and against what a run measures."""

from pathlib import Path

import pytest

from coe_megatron.config import load
from coe_megatron.estimate.run_estimate import RunEstimate, estimate, vocabulary
from coe_megatron.estimate.run_shape import RunShape

PAPER = Path(__file__).parents[2] / "configs" / "paper"


def _of(name: str, *overrides: str, ranks: int = 1) -> RunEstimate:
    config = load(PAPER / f"{name}.yaml", overrides)
    return estimate(RunShape.of(config, vocabulary(config), ranks))


def test_the_papers_model_has_the_papers_parameters() -> None:
    counted = _of("moe_8-64", "moe.num_experts=63").parameters
    assert counted.without_embeddings - counted.final_norm == 570_955_776
    assert counted.total == 780_672_000
    more = _of("coe-2_8-64", "moe.num_experts=63").parameters
    assert more.total - counted.total == 258_048


def test_the_savings_the_paper_prints() -> None:
    """17.6 % by fewer experts (its own counts give 17.7 %) and 42 % by half the layers."""
    totals = {
        name: _of(*arguments).parameters.total
        for name, arguments in {
            "63+1": ("moe_8-64", "moe.num_experts=63"),
            "47+1": ("moe_8-64", "moe.num_experts=47"),
            "8 layers": ("moe_8-64_8-layers", "moe.num_experts=63"),
        }.items()
    }
    assert 1 - totals["47+1"] / totals["63+1"] == pytest.approx(0.177, abs=0.0005)
    assert 1 - totals["63+1"] / totals["8 layers"] == pytest.approx(0.422, abs=0.0005)


def test_experts_and_states_are_cut_as_the_layout_says() -> None:
    one, eight = _of("moe_8-64", ranks=1), _of("moe_8-64", "parallel.expert=8", ranks=8)
    dense = one.parameters.total - one.parameters.experts
    assert one.memory["weights"] == 2 * one.parameters.total
    assert eight.memory["weights"] == 2 * (dense + one.parameters.experts // 8)
    assert eight.memory["optimizer"] == 12 * (-(-dense // 8) + one.parameters.experts // 8)
    assert {kind.total for kind in one.communication.values()} == {0}


def test_the_all_to_all_of_a_chain_is_that_of_a_moe_with_as_many_choices() -> None:
    moe, chain = (_of(name, "parallel.expert=8", ranks=8) for name in ("moe_8-64", "coe-2_4-64"))
    tokens, layers, choices, hidden, two_bytes = 64 * 512 // 8, 4, 8, 1024, 2
    sent = 4 * tokens * layers * choices * hidden * two_bytes * 7 // 8
    assert moe.communication["all_to_all"].total == chain.communication["all_to_all"].total == sent


@pytest.mark.parametrize("dispatcher", ["alltoall", "deduplicated", "allgather"])
def test_a_chain_in_a_latent_space_sends_as_much_less_as_it_is_narrower(dispatcher: str) -> None:
    own = ("parallel.expert=8", f"moe.dispatcher={dispatcher}")
    plain, latent = (_of("coe-2_4-64", *own, *more, ranks=8) for more in ((), ("chain.latent=256",)))
    assert latent.communication["all_to_all"].total == plain.communication["all_to_all"].total // 4
    assert latent.parameters.experts == plain.parameters.experts // 4


def test_activations_of_every_mode_are_shown_and_the_runs_own_is_in_the_memory() -> None:
    plain, iteration = (_of("coe-2_4-64", f"moe.recompute={mode}") for mode in ("none", "iteration"))
    assert plain.activations == iteration.activations
    peaks = {mode: each.peak for mode, each in plain.activations.items()}
    # The whole step's peak has the gradient of the last hidden states beside them.
    assert plain.memory["activations"] == pytest.approx(peaks["none"], rel=0.005)
    assert iteration.memory["activations"] == pytest.approx(peaks["iteration"], rel=0.005)
    assert peaks["iteration"] < 0.85 * peaks["none"]
    assert sum(plain.as_dict()["recompute"]["none"]["kept"].values()) <= peaks["none"]
    chain = sum(getattr(plain.flops_per_token, kind) for kind in ("routers", "experts", "shared"))
    assert plain.extra_flops == {"none": 0, "experts": 0, "iteration": chain // 3, "layer": chain // 3}
    shown = iteration.table()
    for part in (
        f"activations {iteration.memory['activations'] / 2**20:,.1f}",
        f"none {peaks['none'] / 2**20:,.1f} MiB",
        "+14% FLOPs",
    ):
        assert part in shown


def test_activations_grow_with_the_micro_batch_and_not_with_the_ranks() -> None:
    one, two = (_of("coe-2_4-64", f"training.micro_batch={size}") for size in (16, 32))
    assert sum(two.activations["layer"].kept.values()) == pytest.approx(
        2 * sum(one.activations["layer"].kept.values()), rel=0.001
    )
    eight = _of("coe-2_4-64", "training.micro_batch=8", "parallel.expert=8", ranks=8)
    same = _of("coe-2_4-64", "training.micro_batch=8")
    assert eight.activations["layer"].kept == same.activations["layer"].kept


def test_without_data_the_vocabulary_must_be_given() -> None:
    config = load(PAPER / "moe_8-64.yaml", ["model.vocab_size=null", "data.path=nowhere"])
    with pytest.raises(ValueError, match=r"model\.vocab_size is null: without prepared data it must be set"):
        vocabulary(config)


def test_broken_data_is_told_even_if_the_vocabulary_is_given(tmp_path: Path) -> None:
    config = load(PAPER / "moe_8-64.yaml", [f"data.path={tmp_path}"])
    with pytest.raises(ValueError, match=r"data\.path: .* has no manifest\.json"):
        vocabulary(config)


def test_what_a_rank_sends_to_reduce_and_to_gather() -> None:
    """A ring of n sends (n-1)/n of the data; twice to reduce, in fp32, and once to gather the bf16 weights."""
    said = _of("moe_8-64", "parallel.expert=2", ranks=8)
    experts = said.parameters.experts // 2
    dense = said.parameters.total - said.parameters.experts
    assert said.communication["gradients"].total == 2 * 4 * (dense * 7 // 8 + experts * 3 // 4)
    assert said.communication["weights"].total == 2 * (dense * 7 // 8 + experts * 3 // 4)
    assert said.tokens_per_step == 64 * 512
