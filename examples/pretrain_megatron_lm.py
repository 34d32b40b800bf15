"""Pretrains a Chain-of-Experts with Megatron-LM's own loop, optimizer, data and checkpoints, on GPUs (0.19.2 only).

    python launch/prepare_data.py --builtin 2000 --vocab-size 2048 --output data/builtin
    torchrun --nproc-per-node 2 examples/pretrain_megatron_lm.py data/builtin --expert-model-parallel-size 2

Our prepared data are Megatron's .bin and .idx. Any argument of Megatron-LM's, and any `--coe-*`, may follow the folder.
Saving is to `runs/megatron-lm`; the same command resumes there. A chain needs only `add_coe_arguments` and a `--coe-*`
option; all else is a short `pretrain_gpt.py`, which the wheel of Megatron-Core does not have.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from coe_megatron.megatron_lm import add_coe_arguments

ARGUMENTS = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32
    --moe-router-pre-softmax --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.001
    --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --coe-iterations 2
    --micro-batch-size 2 --global-batch-size 8 --train-iters 10 --lr 1e-3 --lr-decay-style constant --bf16
    --adam-beta2 0.95 --weight-decay 0.01 --clip-grad 1
    --tokenizer-type SentencePieceTokenizer --save runs/megatron-lm --load runs/megatron-lm --save-interval 5
    --eval-interval 10 --eval-iters 2 --log-interval 1
    --transformer-impl local --no-rope-fusion --no-gradient-accumulation-fusion
"""


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    """Run one micro-batch through this stage; returns its output and the loss function of the last stage."""
    batch = {name: value.cuda(non_blocking=True) for name, value in next(batches).items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(token_loss, batch["loss_mask"])


def token_loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum and number of a micro-batch's losses [b, S], and both again to report the mean."""
    total, number = (losses.float() * mask).sum(), mask.sum().int()
    return total, number, {"lm loss": torch.stack([total.detach(), number.float()])}


def datasets(samples: tuple[int, int, int], vp_stage: int | None = None) -> list[Any]:
    """Megatron's GPTDatasets for training and validation; there is no test set."""
    arguments = get_args()
    config = GPTDatasetConfig(
        random_seed=arguments.seed,
        sequence_length=arguments.seq_length,
        blend_per_split=[(arguments.train_data_path, None), (arguments.valid_data_path, None), None],
        tokenizer=build_tokenizer(arguments),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, samples, lambda: True, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank reads


def main(datasets: Callable = datasets) -> None:
    """Train as the command line says."""
    data = Path(sys.argv[1])
    paths = {
        "train-data-path": data / "train",
        "valid-data-path": data / "valid",
        "tokenizer-model": data / "tokenizer.model",
    }
    sys.argv[1:] = [*ARGUMENTS.split(), *(f"--{name}={path}" for name, path in paths.items()), *sys.argv[2:]]
    dataset_utils.compile_helpers = lambda: None  # the wheel has them compiled, and has no Makefile to do it again
    arguments = parse_and_validate_args(extra_args_provider=add_coe_arguments)
    config = pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
