"""The learning rate: a closed form with the corners that matter."""

from itertools import pairwise

import pytest

from coe_megatron.config.settings import OptimizerSettings
from coe_megatron.training.lr_schedule import learning_rate


def test_warm_up_rises_evenly_and_the_first_step_learns() -> None:
    rates = [learning_rate(OptimizerSettings(lr=1.0, warmup=0.1), step, 100) for step in range(12)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[9] == pytest.approx(10 / 11)
    assert rates[10:] == [1.0, 1.0]


def test_linear_decay_leads_to_the_least_rate() -> None:
    settings = OptimizerSettings(lr=1.0, min_lr=0.1, warmup=0.0, decay="linear")
    rates = [learning_rate(settings, step, 5) for step in range(5)]
    assert rates == pytest.approx([1.0, 0.82, 0.64, 0.46, 0.28])


def test_cosine_falls_slowly_fast_slowly() -> None:
    settings = OptimizerSettings(lr=1.0, min_lr=0.1, warmup=0.0, decay="cosine")
    rates = [learning_rate(settings, step, 4) for step in range(4)]
    assert rates == pytest.approx([1.0, 0.1 + 0.9 * 0.853553, 0.55, 0.1 + 0.9 * 0.146447], rel=1e-5)


def test_wsd_is_constant_and_then_cools_down() -> None:
    settings = OptimizerSettings(lr=1.0, warmup=0.1, decay="wsd", cooldown=0.4)
    rates = [learning_rate(settings, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, *[1.0] * 6, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "wsd"])
def test_every_schedule_warms_up_to_the_rate_and_never_rises_again(decay: str) -> None:
    settings = OptimizerSettings(lr=1.0, min_lr=0.0, warmup=0.2, decay=decay, cooldown=0.3)
    rates = [learning_rate(settings, step, 50) for step in range(50)]
    assert rates[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))
    assert (rates[-1] < 0.07) is (decay != "constant")


@pytest.mark.parametrize("decay", ["linear", "cosine", "wsd"])
def test_every_decay_is_continuous_at_its_start(decay: str) -> None:
    settings = OptimizerSettings(lr=1.0, decay=decay)
    rates = [learning_rate(settings, step, 1000) for step in range(1000)]
    assert max(abs(a - b) for a, b in pairwise(rates)) < 0.011


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "wsd"])
def test_a_run_of_one_step(decay: str) -> None:
    assert learning_rate(OptimizerSettings(lr=1.0, warmup=0.0, decay=decay), 0, 1) == 1.0
