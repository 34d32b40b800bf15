"""examples/pretrain_megatron_lm.py from the weights of one of our checkpoints, and on the batches of our own program.

python tests/rehearsal/megatron_lm.py DATA TENSORS fp32|bf16 [ARGUMENT ...]; TENSORS is the checkpoint's folder of them
"""

import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.training import get_args

from coe_megatron.data.datasets import BlendedOrder, PreparedData
from coe_megatron.data.samples import Sample

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import pretrain_megatron_lm as example

DATA, TENSORS, PRECISION = sys.argv[1], sys.argv.pop(2), sys.argv.pop(2)


class InOurOrder(torch.utils.data.Dataset):
    """The samples as our program takes them, one after the other; Megatron's sampler gives them to the same ranks."""

    def __init__(self, seed: int, length: int, cache: Path) -> None:
        self.samples = PreparedData.open(DATA).packed("train", length, seed=seed, cache_dir=cache)
        self.order = BlendedOrder([len(self.samples)], [1.0], seed)

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, position: int) -> Sample:
        ((_, index),) = self.order.between(position, position + 1)
        return self.samples[index]


def datasets(*_sizes: object, **_stage: object) -> tuple[InOurOrder, None, None]:
    arguments = get_args()
    return InOurOrder(arguments.seed, arguments.seq_length, Path(f"{arguments.save}-index")), None, None


datasets.is_distributed = True  # type: ignore[attr-defined]


def begin(models: list[torch.nn.Module]) -> list[torch.nn.Module]:
    for model in models:
        weights = {name: shard for name, shard in model.sharded_state_dict().items() if "_extra_state" not in name}
        model.load_state_dict(dist_checkpointing.load(weights, TENSORS), strict=False)
    return models


if __name__ == "__main__":
    configure = example.gpt_config_from_args

    def from_checkpoint(arguments: object) -> object:
        config = configure(arguments)
        config.pre_wrap_hooks.append(begin)
        return config

    example.gpt_config_from_args = from_checkpoint
    if PRECISION == "fp32":
        example.ARGUMENTS = example.ARGUMENTS.replace("--bf16", "")
    example.main(datasets)
