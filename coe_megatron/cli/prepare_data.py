"""Prepare text for training: train or take a tokenizer, write Megatron indexed datasets and a manifest."""

import argparse
import os
import sys
import warnings

from coe_megatron.cli.arguments import Parser, program_name, write_out
from coe_megatron.data.manifest import Manifest
from coe_megatron.data.options import add_document_options, templates
from coe_megatron.data.prepare import MAX_WORKERS, PrepareSettings, prepare, resumable_progress
from coe_megatron.data.records import InputError
from coe_megatron.data.sources import DEFAULT_RECORD_BYTES
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import user_path

EPILOG = """examples:
  %(prog)s --builtin 20000 --vocab-size 2048 --output data/problems
  %(prog)s --input train.jsonl.xz --template 'query : {query} response : {response}' \\
                  --valid valid.jsonl.xz --vocab-size 16384 --output data/math
  %(prog)s --input wiki.parquet --tokenizer data/math/tokenizer.model --output data/wiki

files: .jsonl and .ndjson (an object a line), .parquet, .txt, .text and .md (blank lines separate documents, the
field is "text"); all but Parquet also compressed as .gz, .xz or .zst. All text is UTF-8. A record is malformed, and
named with its line or row, if it gives no document, is no strict JSON (NaN, a key twice, more than 256 levels), no
UTF-8, or larger than --max-record-bytes.

exit status: 0 done, 1 the input could not be prepared, 2 a bad argument, 130 interrupted; each failure is one line
on stderr and leaves --output as it was. When the tokenizer is there, an interrupted command goes on where it stopped;
what it has done stands in the hidden folder .NAME.partial beside --output, and deleting that discards it."""


def parser() -> Parser:
    made = Parser(prog=program_name("coe-prepare", "prepare_data.py"), description=__doc__, epilog=EPILOG)
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", type=user_path, nargs="+", default=[], metavar="FILE", dest="inputs", help="documents"
    )
    source.add_argument("--builtin", type=int, metavar="COUNT", help="so many problems of the built-in corpus")
    made.add_argument("--output", type=user_path, required=True, metavar="DIR", help="the folder to make")
    made.add_argument("--vocab-size", type=int, metavar="N", help="pieces of the tokenizer to train")
    made.add_argument("--tokenizer", type=user_path, metavar="MODEL", help="a SentencePiece model to take instead")
    add_document_options(made)
    valid = made.add_mutually_exclusive_group()
    valid.add_argument(
        "--valid", type=user_path, nargs="+", default=[], metavar="FILE", dest="valid_inputs", help="for validation"
    )
    valid.add_argument(
        "--valid-fraction",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="hold out this share of the documents, by their hash (default: 0.02)",
    )
    made.add_argument("--seed", type=int, default=0, help="of the held-out share and the built-in corpus (default: 0)")
    made.add_argument("--skip-malformed", action="store_true", help="count malformed records instead of stopping")
    made.add_argument(
        "--max-record-bytes",
        type=int,
        default=DEFAULT_RECORD_BYTES,
        metavar="N",
        help="a larger line, block of text or Parquet cell is malformed (default: %(default)s)",
    )
    made.add_argument(
        "--workers",
        type=int,
        default=min(len(os.sched_getaffinity(0)), MAX_WORKERS),
        metavar="N",
        help="processes that parse and encode (default: the CPUs this one may use, %(default)s)",
    )
    made.add_argument("--overwrite", action="store_true", help="replace data prepared earlier")
    return made


def settings_from(arguments: argparse.Namespace) -> PrepareSettings:
    """The settings the arguments ask for, checked as far as can be without looking at a file."""
    values = vars(arguments)
    values["template"] = templates(arguments)
    del values["field"]
    values["inputs"], values["valid_inputs"] = tuple(values["inputs"]), tuple(values["valid_inputs"])
    return PrepareSettings(**values)


def report(manifest: Manifest) -> None:
    for name, split in manifest.splits.items():
        write_out(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes_per_token:.2f} bytes a "
            f"token, unigram entropy {split.unigram_entropy_nats:.3f} nats"
        )
    if manifest.malformed:
        write_out(f"skipped {manifest.malformed:,} malformed records")


def main() -> int:
    program = parser()
    try:
        settings = settings_from(program.parse_args())
    except ConfigError as error:
        program.error(str(error))
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    try:
        report(prepare(settings, progress=True))
    except ConfigError as error:
        program.error(str(error))
    except (InputError, OSError) as error:
        program.exit(1, f"{program.prog}: error: {one_line(str(error))}\n")
    except KeyboardInterrupt:
        done = resumable_progress(settings.output)
        goes_on = f"the same command goes on from there: {done}" if done else "the same command begins anew"
        program.exit(130, f"{program.prog}: interrupted; {goes_on}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
