"""What counts as a launch, and with how many bytes; on CPU tensors."""

from functools import partial

import pytest
import torch
from launches import Launches, Work, compiled

counting = partial(Launches, device="cpu")
ROWS, COLUMNS = 4, 8
FULL = ROWS * COLUMNS * 4  # bytes of a matrix in fp32


@compiled
def scaled(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return (x * row).exp()


SCALED = f"{__name__}.scaled"


@pytest.fixture
def x() -> torch.Tensor:
    return torch.ones(ROWS, COLUMNS)


def test_views_and_allocations_launch_nothing(x: torch.Tensor) -> None:
    with counting() as counted:
        x.t().reshape(-1)[3:].detach()
        x.view(-1).chunk(2)[0].unsqueeze(0).expand(3, -1)
        torch.empty_like(x).resize_(2)
        x.new_empty(3).data = x[0]
    assert counted.total.launches == 1 and list(counted.of) == ["clone"]  # reshape of a transposed matrix copies


def test_an_operator_reads_each_operand_once(x: torch.Tensor) -> None:
    with counting() as counted:
        x * x
    assert counted.total == (1, 2 * FULL)


def test_an_expanded_operand_is_as_large_as_its_memory(x: torch.Tensor) -> None:
    row = torch.ones(COLUMNS)
    with counting() as counted:
        x + row.expand(ROWS, -1)
    assert counted.total == (1, 2 * FULL + COLUMNS * 4)


def test_in_place_work_is_read_and_written_and_a_copy_only_written(x: torch.Tensor) -> None:
    other = torch.zeros(ROWS, COLUMNS)
    with counting() as counted:
        x.add_(other)
        x.copy_(other)
        x.zero_()
        torch.mul(other, other, out=x)
    assert counted.of == {"add_": (1, 3 * FULL), "copy_": (1, 2 * FULL), "zero_": (1, FULL), "mul": (1, 2 * FULL)}


def test_a_new_tensor_like_another_reads_nothing(x: torch.Tensor) -> None:
    with counting() as counted:
        torch.zeros_like(x)
        x.new_ones(ROWS, COLUMNS)
    assert counted.total == (2, 2 * FULL)


def test_nothing_is_launched_for_no_elements(x: torch.Tensor) -> None:
    with counting() as counted:
        x[:0] @ x.t()
    assert counted.total == (0, 0)


def test_a_read_by_the_host_counts(x: torch.Tensor) -> None:
    with counting() as counted:
        x[0, 0].item()
    assert counted.total == (1, 4)


def test_work_on_another_device_is_not_counted(x: torch.Tensor) -> None:
    with Launches() as counted:
        x * x
    assert counted.total == (0, 0)


def test_the_backward_pass_is_counted(x: torch.Tensor) -> None:
    out = x.requires_grad_().exp()
    with counting() as counted:
        out.backward(torch.ones(ROWS, COLUMNS))
    assert counted.of["mul"] == (1, 3 * FULL)


def test_a_named_function_is_one_launch(x: torch.Tensor) -> None:
    row = torch.ones(COLUMNS)
    with counting() as eager:
        scaled(x, row)
    with counting([SCALED]) as fused:
        scaled(x, row)
        x * x
    assert (eager.of["mul"].launches, eager.of["exp"].launches) == (1, 1)
    assert fused.of == {"scaled": Work(1, 2 * FULL + COLUMNS * 4), "mul": Work(1, 2 * FULL)}


def test_a_function_that_is_not_there_cannot_be_named() -> None:
    with pytest.raises(AttributeError):
        counting([f"{__name__}.skaled"])


def test_compiled_takes_what_torchs_takes(x: torch.Tensor) -> None:
    module = torch.nn.Linear(COLUMNS, 1)
    assert compiled(module, dynamic=True) is module
    assert torch.equal(compiled(fullgraph=True)(torch.exp)(x), x.exp())
    assert torch.equal(compiled(scaled)(x, row=x), scaled(x, x))
