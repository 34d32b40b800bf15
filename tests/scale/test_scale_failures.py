"""Simulated runs on nodes that fail: against what is known of such runs, and by hand."""

from dataclasses import replace
from math import exp

import pytest
from programs import python

from coe_megatron.estimate.machine import Failures, machine
from coe_megatron.scale.failures import Job, best_interval, between_stops, daly, replay, simulate, young

JOB = Job(steps=20_000, step=1.0, nodes=1, save=30.0, written=0.0, load=0.0, interval=600)
NEVER = 1e15
COSTS = {"notice": 300.0, "requeue": 0.0, "start": 0.0, "warm_up": 0.0, "repair": 0.0, "spare_nodes": 0}


def failing(between: float, **changes: object) -> Failures:
    return Failures(**({"between_failures": between, "between_preemptions": None, "elastic": False} | COSTS | changes))


@pytest.mark.parametrize(("between", "interval"), [(3600.0, 600), (1200.0, 200), (36_000.0, 2000)])
def test_the_mean_time_is_that_of_the_closed_form(between: float, interval: int) -> None:
    """Segments of interval and save take (M + R) (exp((interval + save) / M) - 1) on average."""
    found = simulate(replace(JOB, interval=interval), failing(between))
    segments = JOB.steps / interval
    assert found.seconds == pytest.approx(segments * (between + 300) * (exp((interval + 30) / between) - 1), rel=0.02)
    assert sum(found.lost.values()) + JOB.steps == pytest.approx(found.seconds)


def test_a_job_fails_while_it_starts_too() -> None:
    """Daly's closed form: a start of so many seconds after each failure makes a segment exp(start / M) times longer."""
    between, start, segments = 1200.0, 400.0, 100
    found = simulate(replace(JOB, interval=200), failing(between, start=start - 50, warm_up=50.0))
    first = (between + 300) * (exp((start + 230) / between) - 1)
    later = (between + 300) * exp(start / between) * (exp(230 / between) - 1)
    assert found.seconds == pytest.approx(first + (segments - 1) * later, rel=0.02)
    assert sum(found.lost.values()) + JOB.steps == pytest.approx(found.seconds)


def test_a_start_loads_what_was_saved() -> None:
    job, own = replace(JOB, steps=1000, interval=100, load=10.0, save=0.0), failing(NEVER, notice=0.0, start=20.0)
    assert replay(job, own, iter(())).seconds == 1020  # the first start counts
    assert replay(job, own, iter([70.0])).seconds == 70 + 1020  # 50 steps, which are lost
    found = replay(job, own, iter([270.0, 25.0, 15.0]))  # 250 steps, of which 200 are saved; then while it starts
    assert found.seconds == 270 + 25 + 15 + 30 + 800
    assert found.lost == {"saves": 0, "down": 20 + 25 + 15 + 30, "slower": 0, "repeated": 50} and found.failures == 3


def test_without_failures_only_saves_are_lost() -> None:
    found = simulate(JOB, failing(NEVER), runs=2)
    assert found.failures == 0
    assert found.lost == {"saves": pytest.approx(34 * 30), "down": 0, "slower": 0, "repeated": pytest.approx(0)}
    assert found.mean == found.quantile(0.5) == pytest.approx(20_000 / (20_000 + 34 * 30))


def test_preemptions_stop_a_job_but_no_node() -> None:
    found = simulate(JOB, failing(NEVER, between_preemptions=2000.0, requeue=100.0, repair=NEVER))
    assert found.failures > 5
    assert found.lost["down"] == pytest.approx(100 * found.failures)  # nothing is noticed late


def test_more_nodes_fail_more_often() -> None:
    assert between_stops(replace(JOB, nodes=100), failing(3600.0)) == pytest.approx(36)
    assert between_stops(JOB, failing(3600.0, between_preemptions=1200.0)) == pytest.approx(900)


def test_without_spare_nodes_a_job_waits_or_shrinks() -> None:
    job = replace(JOB, nodes=10)
    waits = simulate(job, failing(20_000.0, repair=5000.0))
    spare = simulate(job, failing(20_000.0, repair=5000.0, spare_nodes=20))
    elastic = simulate(job, failing(20_000.0, repair=5000.0, elastic=True))
    assert waits.lost["down"] == pytest.approx(5000 * waits.failures, rel=0.01)
    assert spare.lost["down"] == pytest.approx(300 * spare.failures)
    assert elastic.lost["slower"] > 0 == spare.lost["slower"]
    assert waits.mean < elastic.mean < spare.mean


def test_a_checkpoint_in_the_background_counts_when_it_is_written() -> None:
    before = simulate(JOB, failing(3600.0))
    background = simulate(replace(JOB, save=1.0, written=29.0), failing(3600.0))
    slow = simulate(replace(JOB, save=1.0, written=599.0), failing(3600.0))
    assert before.mean < background.mean and slow.mean < background.mean


def test_a_checkpoint_whose_writing_was_killed_never_counts() -> None:
    job, own = replace(JOB, steps=1000, interval=100, save=1.0, written=90.0), failing(NEVER, notice=0.0)
    rest = 900 + 9 + 90  # from step 100; the last checkpoint has to be written
    assert replay(job, own, iter([250.0])).seconds == 250 + rest  # step 200 was to be written at 292
    assert replay(job, own, iter([250.0, 60.0])).seconds == 250 + 60 + rest
    assert replay(job, own, iter([250.0, 150.0])).seconds == 250 + 150 + rest
    assert replay(job, own, iter([295.0])).seconds == 295 + rest - 101


def test_a_run_ends_when_its_last_checkpoint_is_written() -> None:
    job = replace(JOB, steps=200, interval=100, save=1.0, written=50.0)
    assert simulate(job, failing(NEVER), runs=1).seconds == pytest.approx(200 + 2 + 50)
    assert replay(job, failing(NEVER, notice=0.0), iter([240.0])).seconds == 240 + 100 + 1 + 50


def test_the_best_interval_is_near_the_rules_where_they_hold() -> None:
    job, failures = replace(JOB, steps=50_000, save=20.0), failing(10_000.0)
    assert young(20, 10_000) == pytest.approx(632, rel=0.01)
    assert daly(20, 10_000) == pytest.approx(619, rel=0.01)
    assert daly(100, 10) == 10
    best = best_interval(job, failures)
    assert 0.7 * 632 <= best <= 1.5 * 632
    at = {steps: simulate(replace(job, interval=steps), failures, 100).mean for steps in (best, 60, 6000)}
    assert max(at, key=lambda steps: at[steps]) == best


def test_a_run_that_cannot_end_is_given_up() -> None:
    found = simulate(replace(JOB, interval=20_000), failing(100.0), runs=3)
    assert found.mean == 0 and found.seconds > 100 * JOB.steps


def test_the_same_seed_fails_the_same_way() -> None:
    assert simulate(JOB, failing(3600.0), 20) == simulate(JOB, failing(3600.0), 20)
    assert simulate(JOB, failing(3600.0), 20, seed=2) != simulate(JOB, failing(3600.0), 20)


@pytest.mark.run
def test_the_option_prints_goodput_and_interval() -> None:
    found = python("launch/pretrain_coe.py", "1024-gpus.yaml", "--simulate", "--machine", "h100", "--gpus", 1024)
    assert found.returncode == 0, found.stderr
    assert "128 nodes" in found.stdout and "Young's rule" in found.stdout and "Daly's rule" in found.stdout
    needs = python("launch/pretrain_coe.py", "1024-gpus.yaml", "--simulate")
    assert needs.returncode == 2 and "--simulate needs --machine" in needs.stderr
    assert machine("h100").failures.between_failures > 0
