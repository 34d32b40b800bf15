"""DeepSpeed's own JSON: what it may say, and what settings decide."""

from pathlib import Path

import pytest

from coe_megatron.config import RunConfig
from coe_megatron.config.checks import problems
from coe_megatron.config.native import merged, read_native
from coe_megatron.config.settings import ParallelSettings, ZeroSettings


def test_objects_are_merged_key_by_key() -> None:
    ours = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "steps_per_print": 9}
    native = {"zero_optimization": {"overlap_comm": True}, "steps_per_print": 1, "comms_logger": {"enabled": True}}
    assert merged(ours, native) == {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5, "overlap_comm": True},
        "steps_per_print": 1,
        "comms_logger": {"enabled": True},
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"train_batch_size": 8}', "it sets train_batch_size, which training.global_batch decides; remove it"),
        ('{"zero_optimization": {"stage": 3}}', "it sets zero_optimization.stage, which zero.stage decides"),
        ('{"bf16": {"enabled": true}}', "it sets bf16, which training.precision decides"),
        ('{"tensor_parallel": {"autotp_size": 2}}', "it sets tensor_parallel, which parallel.tensor decides"),
        (
            '{"zero_optimization": {"cpu_offload": true}}',
            "it sets zero_optimization.cpu_offload, which zero.offload_opt",
        ),
        ('{"zero_optimization": {"overlap_comm": "no"}}', "overlap_comm is 'no': it must be true or false"),
        ("[]", "it must hold a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_what_settings_decide_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(text)
    with pytest.raises(ValueError) as refused:
        read_native(str(path))
    assert str(refused.value).startswith(f"zero.deepspeed is {path}: ") and said in str(refused.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"^zero.deepspeed is nowhere.json: there is no such file$"):
        read_native("nowhere.json")


@pytest.mark.parametrize(("overlap", "found"), [("true", 1), ("false", 0)])
def test_reductions_do_not_overlap_in_a_pipeline(overlap: str, found: int, tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(f'{{"zero_optimization": {{"overlap_comm": {overlap}}}}}')
    config = RunConfig(parallel=ParallelSettings(pipeline=2), zero=ZeroSettings(deepspeed=str(path)))
    said = [
        each for each in problems(config) if "overlap_comm true, which parallel.pipeline (2) does not support" in each
    ]
    assert len(said) == found
