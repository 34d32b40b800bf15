"""How large DeepSpeed's buckets are: shares of the model, DeepSpeed's own at most, and what its JSON says first."""

import json
from pathlib import Path
from typing import Any

import pytest

from coe_megatron.config.native import read_native
from coe_megatron.config.zero_sizes import ZeroSizes


@pytest.mark.parametrize(
    ("parameters", "reduced"), [(20_001, 20_001), (1_000_003, 2**17), (20_000_000, 2_500_000)], ids=str
)
def test_sizes_follow_the_model_but_small_gradients_are_reduced_together(parameters: int, reduced: int) -> None:
    sizes = ZeroSizes.of(parameters, {})
    assert sizes.reduce_bucket == reduced and sizes.prefetch_bucket == pytest.approx(parameters / 8, abs=2)
    assert sizes.allgather_bucket % 2 == 0  # DeepSpeed asserts it
    assert (sizes.max_live, sizes.persistence_threshold) == (parameters // 4, parameters // 1000)


def test_of_the_largest_models_they_are_deepspeeds() -> None:
    assert ZeroSizes.of(10**12, {}) == ZeroSizes(*[50_000_000] * 4, 1_000_000_000, 100_000, overlap=True)


def test_deepspeeds_json_goes_first_under_either_name() -> None:
    own = {"reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": 0, "max_live_parameters": 7}
    sizes = ZeroSizes.of(1000, {"zero_optimization": own})
    assert (sizes.reduce_bucket, sizes.prefetch_bucket, sizes.max_live) == (500_000_000, 0, 7)
    said = sizes.as_native()
    assert (said["reduce_bucket_size"], said["stage3_max_live_parameters"]) == (500_000_000, 7)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            {"reduce_bucket_size": "auto"},
            "zero_optimization.reduce_bucket_size is 'auto': it must be a whole number of",
        ),
        ({"reduce_bucket_size": 0}, "reduce_bucket_size is 0: it must be a whole number of at least 1"),
        ({"reduce_bucket_size": True}, "reduce_bucket_size is True: it must be a whole number"),
        ({"stage3_prefetch_bucket_size": 0.5}, "stage3_prefetch_bucket_size is 0.5: it must be a whole number of at"),
        ({"allgather_bucket_size": 3}, "zero_optimization.allgather_bucket_size is 3: it must be even"),
        ([1], "zero_optimization must hold an object"),
    ],
)
def test_a_size_that_is_none_is_one_line(own: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": own}))
    with pytest.raises(ValueError) as refused:
        read_native(str(path))
    assert str(refused.value).startswith(f"zero.deepspeed is {path}: ") and said in str(refused.value)
