"""The learning rate: a closed form with the corners that matter."""

import pytest

from coe_megatron.config.settings import OptimizerSettings
from coe_megatron.training.schedule import learning_rate


def test_warm_up_rises_evenly_and_the_first_step_learns() -> None:
    rates = [learning_rate(OptimizerSettings(lr=1.0, warmup=0.1), step, 100) for step in range(12)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[9] == pytest.approx(10 / 11)
    assert rates[10:] == [1.0, 1.0]


def test_linear_decay_leads_to_the_least_rate() -> None:
    settings = OptimizerSettings(lr=1.0, min_lr=0.1, warmup=0.0, decay="linear")
    rates = [learning_rate(settings, step, 5) for step in range(5)]
    assert rates == pytest.approx([1.0, 0.82, 0.64, 0.46, 0.28])


@pytest.mark.parametrize("decay", ["constant", "linear"])
def test_a_run_of_one_step(decay: str) -> None:
    assert learning_rate(OptimizerSettings(lr=1.0, warmup=0.0, decay=decay), 0, 1) == 1.0
