"""Collectives that deliver late: correct programs do not notice, and the others do, on two gloo ranks."""

import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from early_reads import COLLECTIVES, late_delivery
from ranks import run_ranks

pytestmark = pytest.mark.ranks
Tensors = list[torch.Tensor]
COPIED = dist.all_reduce  # as Megatron-Core's modules keep some


def on_two_ranks(program: Callable, *args: object) -> list:
    return run_ranks(program, 2, *args)


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors, tuple]:
    """Outputs, inputs and arguments of a collective of two ranks; all inputs differ."""
    rank = dist.get_rank()
    a, b = torch.arange(4).to(dtype) + 10 * rank, torch.arange(4).to(dtype) - 10 * rank - 5
    empty = [torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=dtype)]
    match name:
        case "all_reduce":
            return [a], [a], (a,)
        case "all_gather":
            return empty, [a], (empty, a)
        case "all_to_all":
            return empty, [a, b], (empty, [a, b])
        case "reduce_scatter":
            return empty[:1], [a, b], (empty[0], [a, b])
        case "all_gather_into_tensor" | "all_gather_single":
            gathered = torch.zeros(8, dtype=dtype)
            return [gathered], [a], (gathered, a)
        case "reduce_scatter_tensor" | "reduce_scatter_single":
            given = torch.cat([a, b])
            return empty[:1], [given], (empty[0], given)
        case "all_to_all_single":
            rows = [1, 3] if rank == 0 else [3, 1]
            return empty[:1], [b], (empty[0], b, rows, rows)
    raise AssertionError(name)


def use_correctly() -> list[str]:
    """The collectives that gave something else than without late delivery."""
    right = {}
    for name in COLLECTIVES:
        right[name], _, args = make(name)
        getattr(dist, name)(*args)
    wrong = []
    with late_delivery():
        for name in COLLECTIVES:
            late, inputs, args = make(name)
            work = getattr(dist, name)(*args, async_op=True)
            assert all(t.isnan().all() for t in late)
            assert work.wait() and work.wait()
            for t in {*inputs} - {*late}:
                t.zero_()
            if not all(torch.equal(*pair) for pair in zip(right[name], late, strict=True)):
                wrong.append(name)
    return wrong


def test_collectives_that_are_waited_for_give_what_they_give() -> None:
    assert on_two_ranks(use_correctly) == [[], []]


def read_early(name: str, dtype: torch.dtype) -> tuple[float, float]:
    with late_delivery():
        outputs, _, args = make(name, dtype)
        work = getattr(dist, name)(*args, async_op=True)
        early = outputs[0].sum().item()
        work.wait()
        return early, outputs[0].sum().item()


def test_an_early_read_gives_nan() -> None:
    for early, late in on_two_ranks(read_early, "all_to_all_single", torch.bfloat16):
        assert early != early and late == late


def test_an_early_read_of_integers_gives_their_largest() -> None:
    for early, late in on_two_ranks(read_early, "all_gather_into_tensor", torch.int32):
        assert early == 8 * torch.iinfo(torch.int32).max and late == 2 * 6 + 40


def train_on_rows_too_early(waits: bool) -> float:
    """A loss of exchanged rows, as of a layer that exchanges them while it works on others."""
    with late_delivery():
        rows = torch.ones(4, 2, requires_grad=True)
        came = torch.empty(4, 2)
        work = dist.all_to_all_single(came, rows.detach(), async_op=True)
        if waits:
            work.wait()
        loss = (came * rows).sum()
        loss.backward()
        work.wait()
        return loss.item()


def test_a_loss_of_rows_that_were_not_waited_for_is_nan() -> None:
    assert on_two_ranks(train_on_rows_too_early, True) == [8, 8]
    assert all(loss != loss for loss in on_two_ranks(train_on_rows_too_early, False))


def overwrite(which: str) -> dict[str, str]:
    """What is said of each collective whose input or output is written before the wait."""
    said = {}
    with late_delivery():
        for name in COLLECTIVES:
            outputs, inputs, args = make(name)
            work = getattr(dist, name)(*args, async_op=True)
            (inputs if which == "input" else outputs)[-1][0] = 7.0
            try:
                work.wait()
            except AssertionError as error:
                said[name] = str(error)
    return said


@pytest.mark.parametrize("which", ["input", "output"])
def test_an_overwritten_input_or_output_is_reported(which: str) -> None:
    for said in on_two_ranks(overwrite, which):
        assert [*said] == [*COLLECTIVES]
        for name, message in said.items():
            written = "output" if name == "all_reduce" else which  # one tensor is both
            assert message.startswith(f"{name} (test_early_reads.py:")
            assert message.endswith(f"the {written} was written before wait()")


def parts_of_one_buffer() -> tuple[Tensors, Tensors]:
    """Megatron's way with gradients: a rank's output is its part of the input, and the other way round."""
    rank = dist.get_rank()
    summed, gathered = torch.arange(8.0), torch.arange(8.0) + 10 * rank
    with late_delivery():
        part = summed.view(2, 4)[rank]
        dist.reduce_scatter_tensor(part, summed, async_op=True).wait()
        work = dist.all_gather_into_tensor(gathered, gathered.view(2, 4)[rank], async_op=True)
        assert gathered.isnan().all()
        work.wait()
    return [part], [gathered]


def test_an_output_may_be_a_part_of_the_input_and_the_input_of_the_output() -> None:
    for rank, ((part,), (gathered,)) in enumerate(on_two_ranks(parts_of_one_buffer)):
        assert part.tolist() == [2.0 * (i + 4 * rank) for i in range(4)]
        assert gathered.tolist() == [0, 1, 2, 3, 14, 15, 16, 17]


def forget(*names: str) -> str:
    try:
        with late_delivery():
            for name in names:
                getattr(dist, name)(*make(name)[2], async_op=True)
            dist.barrier()
            dist.all_reduce(torch.ones(1), async_op=True).wait()
            dist.all_reduce(torch.ones(1))
    except AssertionError as error:
        return str(error)
    return "not noticed"


def test_forgotten_collectives_are_reported_by_name() -> None:
    assert on_two_ranks(forget) == ["not noticed"] * 2
    for message in on_two_ranks(forget, "all_reduce", "all_to_all_single"):
        first, second = message.removeprefix("never waited for: ").split(", ")
        assert first.startswith("all_reduce (test_early_reads.py:") and second.startswith("all_to_all_single (")


def fail_with_a_collective_in_flight() -> str:
    try:
        with late_delivery():
            dist.all_reduce(torch.ones(1), async_op=True)
            raise KeyError("first")
    except KeyError as error:
        return str(error)


def test_another_error_is_not_hidden_by_a_forgotten_collective() -> None:
    assert on_two_ranks(fail_with_a_collective_in_flight) == ["'first'"] * 2


def replace_copies() -> bool:
    before, module = dist.all_reduce, sys.modules[__name__]
    with late_delivery():
        assert module.COPIED is dist.all_reduce is not before
    return module.COPIED is dist.all_reduce is before


def test_copies_in_modules_are_replaced_and_put_back() -> None:
    assert on_two_ranks(replace_copies) == [True, True]
