"""Evaluates a checkpoint: losses on named sets, and the accuracy of final answers. It trains nothing.

  %(prog)s runs/quickstart
  %(prog)s runs/quickstart --data math=data/math other.jsonl
  torchrun --nproc-per-node 2 launch/evaluate.py runs/quickstart parallel.expert=2
  %(prog)s runs/quickstart --answers builtin --problems 200

RUN is the folder of a run (its most recent complete checkpoint), or a checkpoint in one; with --answers alone it may
also be a model that `coe-checkpoint export` wrote. Without --data and --answers the sets are those that the run itself
validates on, and the losses equal its own.

Losses come from the model of training on all ranks, without optimizer states. Their layout is data-parallel unless
parallel.* says otherwise, whatever the layout of the run was. chain.no_return=true and chain.gating=fixed are
interventions: other experts in each iteration of the trained chain, or the same. --answers generates greedily with the
exported model, on one device."""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coe_megatron.cli import language_model
from coe_megatron.cli.arguments import Parser, program_name, write_out
from coe_megatron.config import RunConfig
from coe_megatron.config.layout import SIZES
from coe_megatron.config.load import load
from coe_megatron.data.folders import validation_paths
from coe_megatron.data.records import Templates
from coe_megatron.distributed.environment import DistributedEnv
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import kind_of, require_file, user_path
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.run.output_check import CONFIG
from coe_megatron.text import aligned

if TYPE_CHECKING:
    from coe_megatron.convert.answers import Question
    from coe_megatron.convert.source import Source
    from coe_megatron.training.evaluation import SetLoss

EPILOG = "exit status: 0 done, 1 unexpected error, 2 invalid arguments or data (one line on stderr), 130 interrupted."
# What may differ from training without changing the model, and interventions that need no other weights.
_ALLOWED = (
    "parallel.", "moe.dispatcher=", "moe.overlap_chunks=", "model.backend=", "chain.no_return=", "chain.gating=fixed"
)  # fmt: skip
_PLAIN_LAYOUT = tuple(f"parallel.{name}=1" for name in (*SIZES, "virtual_pipeline"))
_MOST_PROBLEMS = 1_000_000


def make_parser() -> Parser:
    parser = Parser(prog=program_name("coe-evaluate", "evaluate.py"), description=__doc__, epilog=EPILOG)
    parser.add_argument("run", type=user_path, metavar="RUN")
    parser.add_argument("overrides", nargs="*", default=[], help="parallel.*=value and the like, for losses")
    sets = "prepared folders (their valid split; PATH:train for the other), JSONL, Parquet or text files"
    parser.add_argument("--data", nargs="+", default=[], metavar="[NAME=]PATH", help=sets)
    first = "the first N of each set (default: of --data all, of the run's own sets as many as in the run)"
    parser.add_argument("--samples", type=int, metavar="N", help=first)
    parser.add_argument("--micro-batch", type=int, metavar="N", help="samples in a forward pass (default: as trained)")
    documents = "how records of files become documents (default: as in the run's data, or the field text)"
    parser.add_argument("--template", action="append", default=[], metavar="TEXT", help=documents)
    parser.add_argument("--skip-malformed", action="store_true", help="leave out malformed records of files")
    answers = "accuracy of final answers: built-in problems that training has not seen, or those of a JSONL file"
    parser.add_argument("--answers", metavar="builtin|FILE", help=answers)
    several = "with --answers: how many (default: 100 built-in ones, all of a file)"
    parser.add_argument("--problems", type=int, metavar="N", help=several)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the built-in problems (default: 0)")
    limit = "with --answers: limit for a text (default: what model.seq_length leaves, at least 32)"
    parser.add_argument("--max-tokens", type=int, metavar="N", help=limit)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="with --answers: print the first N texts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    language_model.add_options(parser)
    return parser


def check(options: argparse.Namespace, env: DistributedEnv) -> None:
    """Check the options without torch.

    Raises:
        ConfigError: one is invalid.
    """
    language_model.check_options(options)
    for name in ("samples", "micro_batch", "problems", "max_tokens"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= _MOST_PROBLEMS:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be between 1 and {_MOST_PROBLEMS:,}")
    if options.show < 0:
        raise ConfigError(f"--show is {options.show}: it must be at least 0")
    if wrong := [each for each in options.overrides if not each.startswith(_ALLOWED)]:
        names = ", ".join(each.removesuffix("=") + "*" * each.endswith(".") for each in _ALLOWED)
        raise ConfigError(f"{wrong[0]} is not among the settings that an evaluation can change: {names}")
    Templates.of(options.template)
    if options.answers is None:
        for name in ("problems", "show", "max_tokens"):
            if getattr(options, name):
                raise ConfigError(f"--{name.replace('_', '-')} needs --answers")
    elif env.world_size > 1:
        raise ConfigError(f"--answers runs on one process: {env.world_size} ranks were started")
    elif options.answers != "builtin":
        require_file(user_path(options.answers), "--answers")
    if language_model.is_exported(options.run) and wants_losses(options):
        raise ConfigError(
            f"{options.run} is an exported model: losses need a run or a checkpoint, give --answers alone"
        )


def wants_losses(options: argparse.Namespace) -> bool:
    return bool(options.data) or options.answers is None


def read_config(options: argparse.Namespace, world_size: int) -> RunConfig:
    """The config of the run, with the layout and the micro-batch of these ranks.

    Raises:
        ConfigError: there is none, or the layout is not valid.
    """
    place = options.run.absolute()
    run = next((folder for folder in (place, *place.parents[:2]) if (folder / CONFIG).is_file()), None)
    if run is None:
        raise ConfigError(f"{options.run} is not a run and not a checkpoint in one: there is no {CONFIG}")
    rows = options.micro_batch or load(run / CONFIG).training.micro_batch
    batch = (f"training.micro_batch={rows}", f"training.global_batch={rows * world_size}")
    unused = ("parallel.world_size=null", "training.warm_start=null", "zero.deepspeed=null", "zero.stage=1")
    offload = ("zero.offload_optimizer=false", "zero.offload_parameters=false")
    return load(run / CONFIG, [*_PLAIN_LAYOUT, *batch, *unused, *offload, *options.overrides], world_size)


def read_sets(options: argparse.Namespace, config: RunConfig) -> list[tuple[str, Path, str]]:
    """Name, path and split of each set.

    Raises:
        ConfigError: a path does not exist, or two sets have the same name.
    """
    found = [_set_of(text) for text in options.data]
    if not found:
        found = [(name, Path(path), "valid") for name, path in validation_paths(config.data).items()]
    for index, (name, _, _) in enumerate(found):
        if name in [before for before, _, _ in found[:index]]:
            raise ConfigError(f"--data has two sets with the name {name}: name one as NAME=PATH")
    return found


def _set_of(text: str) -> tuple[str, Path, str]:
    """From `[NAME=]PATH[:train|:valid]`; a path that exists is taken as it is."""
    if kind_of(user_path(text), "--data") is not None:
        return user_path(text).name.partition(".")[0] or text, user_path(text), "valid"
    name, equals, rest = text.partition("=")
    rest = rest if equals else text
    start, _, split = rest.rpartition(":")
    path, split = (start, split) if split in ("train", "valid") and start else (rest, "valid")
    kind = kind_of(user_path(path), "--data")
    if kind is None or (equals and not name):
        raise ConfigError(f"--data is {text}: there is no such file or folder; it must be [NAME=]PATH or PATH:train")
    if kind != "folder" and split == "train":
        raise ConfigError(f"--data is {text}: only prepared folders have a train split")
    return (name if equals else Path(path).name.partition(".")[0]), user_path(path), split


def losses(options: argparse.Namespace, env: DistributedEnv) -> "tuple[Source, dict[str, SetLoss]]":
    """The losses on all sets, on all ranks; collective."""
    config = read_config(options, env.world_size)
    sets = read_sets(options, config)
    samples = options.samples or (None if options.data else config.data.validation_samples)

    from coe_megatron.lean_imports import import_megatron, without_collection
    from coe_megatron.training.console import quiet_libraries

    quiet_libraries()
    with without_collection():
        import_megatron()
        from coe_megatron.convert.source import Source
        from coe_megatron.distributed import process_groups
        from coe_megatron.distributed.rendezvous import RendezvousError, rendezvous
        from coe_megatron.model.build import require_backend
        from coe_megatron.training import checkpoint_losses, devices
    try:
        store = rendezvous(env)
    except RendezvousError as error:
        raise ConfigError(str(error)) from None
    if config.training.deterministic:
        devices.make_deterministic()
    require_backend(config)
    process_groups.start(config.parallel, config.training.seed, env, store=store)
    source = Source.find(options.run, options.tokenizer)
    text = checkpoint_losses.TextSettings(tuple(options.template), options.skip_malformed)
    named = [checkpoint_losses.DataSet(name, path, split) for name, path, split in sets]  # type: ignore[arg-type]
    with checkpoint_losses.common_folder(source.run, env.single_node) as folder:
        found = checkpoint_losses.checkpoint_losses(config, source, named, samples, text, folder)
    process_groups.stop()
    return source, found


def _as_dict(found: "SetLoss") -> dict[str, float]:
    return {"tokens": int(found.tokens), **found.values(), "perplexity": math.exp(min(found.loss, 700.0))}


def loss_table(sets: "Mapping[str, SetLoss]") -> str:
    """Loss in nats per token, bits per byte and perplexity of each set, and of all together."""
    rows: list[tuple[str, ...]] = [("set", "tokens", "loss", "bits/byte", "perplexity")]
    for name, found in _with_total(sets).items():
        values = _as_dict(found)
        numbers = (values.get(kind) for kind in ("loss", "bits_per_byte", "perplexity"))
        shown = ("unknown" if number is None else f"{number:.4f}" for number in numbers)
        rows.append((one_line(name), f"{values['tokens']:,}", *shown))
    return "\n".join(aligned(rows))


def _with_total(sets: "Mapping[str, SetLoss]") -> "dict[str, SetLoss]":
    first, *others = sets.values()
    return {**sets, "all together": sum(others, first)} if others else dict(sets)


def judge(options: argparse.Namespace) -> "tuple[Sequence[Question], list[bool], list[dict[str, Any]]]":
    """The problems, whether each final answer is right, and the texts to show."""
    model, tokenizer, source = language_model.open_model(options)
    from coe_megatron.convert import answers
    from coe_megatron.convert.generation import Sampling, generate

    config = source and source.config
    templates = Templates.of(options.template) if options.template else answers.run_templates(config)
    questions: Sequence[Question]
    if options.answers == "builtin":
        asked_of = templates, answers.run_task(config)
        questions = list(answers.builtin_questions(options.problems or 100, options.seed, *asked_of))
    else:
        questions = answers.file_questions(user_path(options.answers), templates, options.problems)
    rights: list[bool] = []
    shown: list[dict[str, Any]] = []
    for start in range(0, len(questions), options.batch):
        asked = questions[start : start + options.batch]
        found = generate(model, tokenizer, [each.prompt for each in asked], Sampling(max_tokens=options.max_tokens))
        for question, completion in zip(asked, found, strict=True):
            rights.append(answers.is_right(question, completion.text))
            if len(shown) < options.show:
                told = {"question": question.query, "text": completion.text, "answer": question.answer}
                shown.append({**told, "right": rights[-1]})
    return questions, rights, shown


def report(options: argparse.Namespace, env: DistributedEnv) -> None:
    """Evaluate, and print the result on rank 0."""
    parts: list[str] = []
    result: dict[str, Any] = {}
    if wants_losses(options):
        source, sets = losses(options, env)
        result |= {"checkpoint": str(source.checkpoint), "step": source.metadata.state.get("step")}
        result["sets"] = {name: _as_dict(found) for name, found in _with_total(sets).items()}
        parts += [one_line(f"{source.checkpoint}, step {result['step']}"), loss_table(sets)]
    if options.answers is not None:
        from coe_megatron.convert.answers import accuracies, by_group, fraction_line, interval

        questions, rights, shown = judge(options)
        groups = by_group(questions, rights)
        low, high = interval(sum(rights), len(rights))
        result["answers"] = {"right": sum(rights), "problems": len(rights), "accuracy": sum(rights) / len(rights)}
        result["answers"] |= {"low": low, "high": high, "shown": shown}
        if groups:
            result["answers"]["groups"] = accuracies(groups)
        for each in shown:
            verdict = "right" if each["right"] else "wrong"
            parts.append(f"{each['question']}\n{each['text']}\n[{verdict}: the answer is {each['answer']}]\n")
        parts += [fraction_line(rights), *(f"{one_line(name)}: {fraction_line(each)}" for name, each in groups.items())]
    if env.rank == 0:
        write_out(json.dumps(result, indent=2) if options.json else "\n".join(parts))


def main() -> int:
    parser = make_parser()
    options = parser.parse_intermixed_args()
    options.overrides += [each for each in options.data if each.startswith(_ALLOWED)]  # written after --data
    options.data = [each for each in options.data if not each.startswith(_ALLOWED)]
    try:
        env = DistributedEnv.from_environment(os.environ)
        check(options, env)
        report(options, env)
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(ExitStatus.INTERRUPTED, "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
