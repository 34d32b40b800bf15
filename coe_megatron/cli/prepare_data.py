"""Prepares text for training: trains or loads a tokenizer, writes Megatron indexed datasets and a manifest."""

import argparse
import os
import sys
import warnings
from typing import Any, get_args

from coe_megatron.cli.arguments import Parser, program_name, write_out
from coe_megatron.corpus.fact_hops import FactTask, Kind
from coe_megatron.data.manifest import Manifest
from coe_megatron.data.options import add_document_options, templates
from coe_megatron.data.prepare import prepare, resumable_progress
from coe_megatron.data.prepare_settings import MAX_WORKERS, PrepareSettings
from coe_megatron.data.records import InputError
from coe_megatron.data.sources import DEFAULT_RECORD_BYTES
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import user_path

EPILOG = """examples:
  %(prog)s --builtin 20000 --vocab-size 2048 --output data/problems
  %(prog)s --builtin 100000 --task recall --hops 1 2 3 --output data/recall
  %(prog)s --input train.jsonl.xz --template 'query : {query} response : {response}' \\
                  --valid valid.jsonl.xz --vocab-size 16384 --output data/math
  %(prog)s --input wiki.parquet --tokenizer data/math/tokenizer.model --output data/wiki

files: .jsonl and .ndjson (one object per line), .parquet, .txt, .text and .md (blank lines separate documents, the
field is "text"); all except Parquet may be compressed as .gz, .xz or .zst. All text is UTF-8. A record is malformed if
it contains no document, is not strict JSON (NaN, a repeated key, more than 256 levels) or not UTF-8, or is larger than
--max-record-bytes. Messages about it give its line or row.

exit status: 0 done, 1 the input could not be prepared, 2 an invalid argument, 130 interrupted; each failure is one line
on stderr, and --output does not change. After an interruption the same command resumes, once the tokenizer is finished.
The finished parts are in the hidden folder .NAME.partial next to --output; delete it to discard them."""


def make_parser() -> Parser:
    parser = Parser(prog=program_name("coe-prepare", "prepare_data.py"), description=__doc__, epilog=EPILOG)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", type=user_path, nargs="+", default=[], metavar="FILE", dest="inputs", help="files with documents"
    )
    source.add_argument("--builtin", type=int, metavar="COUNT", help="number of problems of the built-in corpus")
    _add_task_options(parser)
    parser.add_argument("--output", type=user_path, required=True, metavar="DIR", help="the folder to create")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="number of pieces of the tokenizer to train")
    tokenizer = "a SentencePiece model, tokenizer.json or .tiktoken file, or a folder with one, to use instead"
    parser.add_argument("--tokenizer", type=user_path, metavar="FILE", help=tokenizer)
    eos = "the token that ends a document (default: that of tokenizer_config.json beside tokenizer.json, <|endoftext|>)"
    parser.add_argument("--eos", metavar="TOKEN", help=eos)
    encoding = "name of a .tiktoken file's encoding, which has the pattern that splits text (default: the file's name)"
    parser.add_argument("--encoding", metavar="NAME", help=encoding)
    add_document_options(parser)
    valid = parser.add_mutually_exclusive_group()
    valid.add_argument(
        "--valid",
        type=user_path,
        nargs="+",
        default=[],
        metavar="FILE",
        dest="valid_inputs",
        help="files with documents for validation",
    )
    valid.add_argument(
        "--valid-fraction",
        type=float,
        default=0.02,
        metavar="FRACTION",
        help="hold out this share of the documents, by their hash (default: 0.02)",
    )
    seed = "seed of the held-out share and of the built-in corpus (default: 0)"
    parser.add_argument("--seed", type=int, default=0, help=seed)
    parser.add_argument("--skip-malformed", action="store_true", help="skip and count malformed records")
    parser.add_argument(
        "--max-record-bytes",
        type=int,
        default=DEFAULT_RECORD_BYTES,
        metavar="N",
        help="a larger line, block of text or Parquet cell is malformed (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(len(os.sched_getaffinity(0)), MAX_WORKERS),
        metavar="N",
        help="processes that parse and encode (default: the CPUs available to this process, %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace data prepared earlier")
    return parser


def _add_task_options(parser: Parser) -> None:
    task = "of the built-in corpus: facts that training stores, or that the text states (default: word problems)"
    parser.add_argument("--task", choices=get_args(Kind), help=task)
    hops = f"with --task: numbers of hops of the questions (default: {' '.join(map(str, FactTask.hops))})"
    parser.add_argument("--hops", type=int, nargs="+", metavar="N", help=hops)
    for name in ("entities", "relations"):
        text = f"with --task: number of {name} (default: {getattr(FactTask, name)})"
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)


def _take_task(values: dict[str, Any]) -> FactTask | None:
    """Replace the options of a task by the task.

    Raises:
        ConfigError: one is invalid, or given without --task.
    """
    given = {name: values.pop(name) for name in ("entities", "relations", "hops")}
    given = {name: value for name, value in given.items() if value is not None}
    if (kind := values.pop("task")) is None:
        if given:
            raise ConfigError(f"--{min(given)} requires --task")
        return None
    if "hops" in given:
        given["hops"] = tuple(given["hops"])
    return FactTask(kind, **given)


def settings_from(arguments: argparse.Namespace) -> PrepareSettings:
    """The settings from the arguments, checked as far as possible without reading a file.

    Raises:
        ConfigError: one is invalid.
    """
    values = vars(arguments)
    values["template"] = templates(arguments)
    del values["field"]
    values["inputs"], values["valid_inputs"] = tuple(values["inputs"]), tuple(values["valid_inputs"])
    values["task"] = _take_task(values)
    return PrepareSettings(**values)


def report(manifest: Manifest) -> None:
    for name, split in manifest.splits.items():
        write_out(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes_per_token:.2f} bytes per "
            f"token, unigram entropy {split.unigram_entropy_nats:.3f} nats"
        )
    if manifest.malformed:
        write_out(f"skipped {manifest.malformed:,} malformed records")


def main() -> int:
    parser = make_parser()
    try:
        settings = settings_from(parser.parse_args())
    except ConfigError as error:
        parser.error(str(error))
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    try:
        report(prepare(settings, progress=True))
    except ConfigError as error:
        parser.error(str(error))
    except (InputError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {one_line(str(error))}\n")
    except KeyboardInterrupt:
        done = resumable_progress(settings.output)
        resumes = f"the same command resumes: {done}" if done else "the same command starts over"
        parser.exit(130, f"{parser.prog}: interrupted; {resumes}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
