"""Final answers on the way (`training.evaluate_answers`): the fraction of word problems that the model gets right now.

Rank 0 gathers the weights of all ranks in its host memory and answers greedily with the exported model, whatever the
layout; the other ranks wait. A model that is too large for that is evaluated by `launch/evaluate.py`.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from coe_megatron import extras
from coe_megatron.checkpoint import sharding
from coe_megatron.config import RunConfig
from coe_megatron.convert import answers
from coe_megatron.convert.answers import Question
from coe_megatron.convert.fast_tokenizer import open_fast_tokenizer
from coe_megatron.convert.generation import Sampling, generate
from coe_megatron.convert.load import of_weights
from coe_megatron.convert.source import tokenizer_of
from coe_megatron.convert.weights import MemoryWeights
from coe_megatron.distributed.collectives import is_rank0, run_on_rank0
from coe_megatron.errors import ConfigError
from coe_megatron.zero import optimizer_states
from coe_megatron.zero.engine import Engine

_SEED, _TOGETHER = 0, 32  # the same problems in every run


class AnswerCheck:
    """The problems of a run, on rank 0.

    Raises:
        ConfigError: transformers is not installed, the data have no tokenizer, or the file of problems is malformed; on
            all ranks.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._tokenizer: Any = None
        self._questions: Sequence[Question] = ()
        run_on_rank0(self._prepare, shared=False)

    def _prepare(self) -> None:
        extras.require("transformers")
        training, templates = self._config.training, answers.run_templates(self._config)
        path = tokenizer_of(Path(self._config.output), self._config)
        if path is None:
            raise ConfigError(
                f"training.evaluate_answers is {training.evaluate_answers}: the data have no tokenizer; use 0"
            )
        self._tokenizer = open_fast_tokenizer(path, self._config.model.seq_length)
        count = training.evaluate_answers
        if training.answers_file is None:
            task = answers.run_task(self._config)
            self._questions = list(answers.builtin_questions(count, _SEED, templates, task))
        else:
            self._questions = answers.file_questions(Path(training.answers_file), templates, count)

    def values(self, engine: Engine) -> dict[str, Any]:
        """`answer_accuracy`, `answer_problems`, their number, and `answer_groups` if problems have groups: name ->
        `accuracy` and `problems`; for the metrics, on all ranks; collective. Changes no random state.
        """
        tensors = gather(engine)
        return run_on_rank0(partial(self._answered, tensors))

    def _answered(self, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        rights: list[bool] = []
        with torch.random.fork_rng():
            model = of_weights(
                MemoryWeights(tensors), self._config, {}, device=torch.device(torch.cuda.current_device())
            )
            for asked in _batches(self._questions):
                found = generate(model, self._tokenizer, [each.prompt for each in asked], self._sampling)
                pairs = zip(asked, found, strict=True)
                rights += [answers.is_right(question, completion.text) for question, completion in pairs]
        accuracy = {"answer_accuracy": sum(rights) / len(rights), "answer_problems": len(rights)}
        groups = answers.by_group(self._questions, rights)
        return {**accuracy, "answer_groups": answers.accuracies(groups)} if groups else accuracy

    @cached_property
    def _sampling(self) -> Sampling:
        """Greedy; for direct answers alone, no more tokens than these have."""
        if not all(question.direct for question in self._questions):
            return Sampling()
        texts = [f" {question.answer}" for question in self._questions]
        return Sampling(max_tokens=max(map(len, self._tokenizer(texts, add_special_tokens=False).input_ids)))


def _batches(questions: Sequence[Question]) -> Iterable[Sequence[Question]]:
    return (questions[start : start + _TOGETHER] for start in range(0, len(questions), _TOGETHER))


def gather(engine: Engine) -> dict[str, torch.Tensor]:
    """All weights and buffers of the model under their keys in checkpoints, on rank 0, else nothing; collective."""
    with torch.no_grad(), optimizer_states.gathered_weights(engine):
        parts = sharding.main_parts(engine.module)
        for part in parts:
            part.data = part.data.detach().to("cpu", copy=True)  # a view would be sent with all of its storage
    received: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(parts, received if is_rank0() else None)
    return assembled(received) if is_rank0() else {}


def assembled(ranks: Iterable[Sequence[ShardedTensor]]) -> dict[str, torch.Tensor]:
    """Complete tensors of the parts of all ranks."""
    found: dict[str, torch.Tensor] = {}
    for part in (part for parts in ranks for part in parts):
        whole = found.setdefault(part.key, torch.empty(part.global_shape, dtype=part.data.dtype))
        sizes = (*(1 for _ in range(part.prepend_axis_num)), *part.local_shape)
        place = tuple(slice(at, at + size) for at, size in zip(part.global_offset, sizes, strict=True))
        whole[place] = part.data.detach().view(whole[place].shape)
    return found
