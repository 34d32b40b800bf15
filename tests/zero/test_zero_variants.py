"""Variants of the chain under ZeRO on two ranks, against one process: gradients, weights, checkpoints between them."""

from pathlib import Path

import pytest
from engine_build import Trace, joined, make_engine, take_steps, use_groups
from model_build import errors
from ranks import run_ranks

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.checkpoint import save_load
from coe_megatron.config.settings import OptimizerSettings

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
CHAINS = {
    "gains": ChainSettings(3, learned_scale=1.0, conditioned=True),
    "no return": ChainSettings(3, no_return=True, aux_loss_reduction="mean"),
    "streams": ChainSettings(3, streams=2, latent=8, modulation_rank=2),
    "some layers": ChainSettings(2, norm_placement="iteration_norm", learned_scale=1.0, layers=(2,)),
}
LAYOUTS = {"ep2": (1, {"expert": 2}), "dp2, stage 3": (3, {}), "pp2": (1, {"pipeline": 2})}


def trained(name: str, stage: int = 1, seed: int = 1, folder: Path | None = None) -> Trace:
    """Two steps from the start, or a third one from a checkpoint of two."""
    # A large eps: AdamW's first steps are a gradient's sign where it is near zero, which is rounding.
    optimizer = OptimizerSettings(lr=1e-2, clip=0.1, eps=1e-4)
    engine = make_engine(2, chain=CHAINS[name], stage=stage, seed=seed, optimizer=optimizer)
    if folder is None:
        return take_steps(engine, 0, 2)
    assert save_load.load_latest(folder / name, engine) == {"step": 2}
    return take_steps(engine, 2, 1)


def saved(folder: Path, name: str) -> Trace:
    engine = make_engine(2, chain=CHAINS[name], optimizer=OptimizerSettings(lr=1e-2, clip=0.1, eps=1e-4))
    trace = take_steps(engine, 0, 2)
    save_load.save(folder / name, 2, engine, {"step": 2}, keep=1)
    return trace


def on_two_ranks(folder: Path) -> dict[tuple[str, str], tuple[Trace, Trace]]:
    found = {}
    for layout, (stage, sizes) in LAYOUTS.items():
        use_groups(**sizes)
        for name in CHAINS:
            found[layout, name] = trained(name, stage), trained(name, stage, seed=9, folder=folder)
    return found


@pytest.fixture(scope="module")
def runs(megatron_groups: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    folder = tmp_path_factory.mktemp("variants")
    whole = {name: (saved(folder, name), trained(name, seed=9, folder=folder)) for name in CHAINS}
    return whole, run_ranks(on_two_ranks, 2, folder, seconds=300)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("layout", ["ep2", "dp2, stage 3"])
def test_two_ranks_train_as_one_process_does(runs: tuple[dict, list[dict]], layout: str, name: str) -> None:
    whole, ranks = runs[0][name][0], [found[layout, name][0] for found in runs[1]]
    found = joined(ranks, layout)
    worst = errors(found.gradients, whole.gradients)
    assert max(worst.values()) < 1e-5, worst
    assert found.norms == pytest.approx(whole.norms, rel=1e-5)
    assert found.losses == pytest.approx(whole.losses, rel=1e-5)
    if layout == "ep2":  # the weights of stage 3 lie in parts
        assert max(errors(found.weights, whole.weights).values()) < 1e-3


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_one_process_is_taken_up(runs: tuple[dict, list[dict]], layout: str, name: str) -> None:
    whole, ranks = runs[0][name][1], [found[layout, name][1] for found in runs[1]]
    assert ranks[0].norms == pytest.approx(whole.norms, rel=1e-5)
    assert ranks[-1].losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.parametrize("name", CHAINS)
def test_every_parameter_learns(runs: tuple[dict, list[dict]], name: str) -> None:
    gradients = runs[0][name][0].gradients
    waiting = {parameter for parameter, gradient in gradients.items() if not gradient.any()}
    assert waiting == {parameter for parameter in gradients if "modulation_down" in parameter}, "W2 starts at 0"
    gains = [parameter for parameter in gradients if "_gains." in parameter]
    assert len(gains) == {"gains": 2 * 2 * 3, "some layers": 2}.get(name, 0)
