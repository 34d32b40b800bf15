"""Generates text with a trained model, on one device.

RUN is the folder of a run (its most recent complete checkpoint), a checkpoint in one, or a model that
`coe-checkpoint export` wrote. A run is trained to continue the documents of its data: a prompt has to look like the
start of one. For the built-in word problems that is

  %(prog)s runs/quickstart --prompt "query : Tom has 3 apples and buys 4 more. How many apples does he have? response :"

without a space at the end. Several prompts, or those of --file, are printed in order with their completions, separated
by blank lines. A text ends with its document, a --stop text, or after --max-tokens."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coe_megatron.cli import language_model
from coe_megatron.cli.arguments import Parser, program_name, write_out
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import read_limited, require_file, user_path
from coe_megatron.parsing import parse_json

if TYPE_CHECKING:
    from coe_megatron.convert.generation import Completion

_MOST_BYTES = 1 << 28  # of --file
EPILOG = "exit status: 0 done, 2 invalid arguments or model (one line on stderr), 130 interrupted."


class _Closed(Exception):
    """Nobody reads standard output any more."""


def make_parser() -> Parser:
    parser = Parser(prog=program_name("coe-generate", "generate.py"), description=__doc__, epilog=EPILOG)
    parser.add_argument("run", type=user_path, metavar="RUN")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="one is printed while it is generated")
    source.add_argument("--file", type=user_path, metavar="FILE", help="a prompt per line, or JSONL with --field")
    source.add_argument("--chat", action="store_true", help="each line of standard input is a prompt of its own")
    seeded = "a built-in word problem that training has not seen: its question, the model's text, the right answer"
    source.add_argument("--problem", type=int, nargs="?", const=0, metavar="SEED", help=seeded)
    parser.add_argument("--field", metavar="NAME", help="with --file: the field of a JSON object that is the prompt")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="least probability to sample from")
    left = "limit for a text (default: what model.seq_length leaves, at least 32)"
    parser.add_argument("--max-tokens", type=int, metavar="N", help=left)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; can be repeated")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")
    parser.add_argument("--json", action="store_true", help="print a JSON object per text, when it is complete")
    language_model.add_options(parser)
    return parser


def check(options: argparse.Namespace) -> None:
    """Check the options without torch.

    Raises:
        ConfigError: one is invalid.
    """
    language_model.check_options(options)
    if options.file is not None:
        require_file(options.file, "--file")
    elif options.field is not None:
        raise ConfigError("--field needs --file")
    if not 0 <= options.temperature <= 100:
        raise ConfigError(f"--temperature is {options.temperature}: it must be between 0 and 100")
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p is {options.top_p}: it must be above 0 and at most 1")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ConfigError(f"--max-tokens is {options.max_tokens}: it must be at least 1")
    if not 0 <= options.seed < 1 << 63:
        raise ConfigError(f"--seed is {options.seed}: it must be at least 0 and below 2^63")
    if "" in options.stop:
        raise ConfigError("--stop is empty: it must be a text")
    for name, texts in (("--prompt", options.prompt or []), ("--stop", options.stop)):
        for text in texts:
            _require_text(text, name)


def _require_text(text: str, name: str) -> None:
    if not text:
        raise ConfigError(f"{name} is empty: the model needs at least one token")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is {one_line(ascii(text))}: it is not UTF-8") from None


def read_prompts(path: Path, field: str | None) -> list[str]:
    """The prompts of a file: its lines, or a field of its JSON objects.

    Raises:
        ConfigError: it cannot be read, or a line has no prompt.
    """
    try:
        lines = read_limited(path, "--file", _MOST_BYTES).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--file is {path}: it is not UTF-8 ({error.reason})") from None
    lines = [line.removesuffix("\r") for line in lines]
    lines = lines[: len(lines) - (lines[-1] == "")]
    found = [_prompt(line, field, f"--file {path}, line {number}") for number, line in enumerate(lines, 1)]
    if not found:
        raise ConfigError(f"--file is {path}: it has no line")
    return found


def _prompt(line: str, field: str | None, place: str) -> str:
    if field is not None:
        try:
            record = parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{place} is not valid JSON ({error})") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise ConfigError(f"{place} has no text {field!r}: each line must be a JSON object with it")
        line = record[field]
    _require_text(line, place)
    return line


def run(options: argparse.Namespace) -> None:
    """Generate what the options say.

    Raises:
        ConfigError: the model cannot be opened.
    """
    prompts = options.prompt or (read_prompts(options.file, options.field) if options.file is not None else [])
    model, tokenizer, source = language_model.open_model(options)

    import torch

    from coe_megatron.convert.generation import Sampling, generate

    torch.manual_seed(options.seed)
    sampling = Sampling(options.temperature, options.top_p, options.max_tokens, tuple(options.stop))

    def complete(texts: Sequence[str], streams: bool = False, **more: Any) -> "list[Completion]":
        show = _write if streams and not options.json else None
        return generate(model, tokenizer, texts, sampling, show=show, warn=_warn, **more)

    if options.problem is not None:
        _answer_problem(options, source, complete)
    elif options.chat:
        for line in _lines():
            text, template = line, getattr(tokenizer, "chat_template", None)
            if template is not None:
                message = [{"role": "user", "content": line}]
                text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            (found,) = complete([text], streams=True, special_tokens=template is None)
            _write_end(options, found)
    elif len(prompts) == 1:
        (found,) = complete(prompts, streams=True)
        _write_end(options, found)
    else:
        for start in range(0, len(prompts), options.batch):
            for number, found in enumerate(complete(prompts[start : start + options.batch]), start):
                if options.json:
                    _write_end(options, found)
                else:
                    _write(f"{chr(10) * (number > 0)}{found.prompt}{found.text}\n")


def _answer_problem(options: argparse.Namespace, source: Any, complete: "Callable[..., list[Completion]]") -> None:
    from coe_megatron.convert import answers

    config = source and source.config
    asked = answers.run_templates(config), answers.run_task(config)
    (question,) = answers.builtin_questions(1, options.problem, *asked)
    if not options.json:
        _write(f"{question.query}\n")
    (found,) = complete([question.prompt], streams=True)
    right = answers.is_right(question, found.text)
    _write_end(options, found, answer=question.answer, right=right)
    if not options.json:
        _write(f"The right answer is {question.answer}: the model is {'right' if right else 'wrong'}.\n")


def _lines() -> Iterator[str]:
    """The lines of standard input that are not empty; on a terminal with a prompt."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    shows = sys.stdin.isatty()
    while True:
        if shows:
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            break
        if line := line.rstrip("\r\n"):
            yield line
    if shows:
        print(file=sys.stderr)


def _write_end(options: argparse.Namespace, found: "Completion", **more: Any) -> None:
    """End a text that was shown while it was generated, or write it as JSON."""
    _write(f"{json.dumps({**asdict(found), **more})}\n" if options.json else "\n")


def _write(text: str) -> None:
    if not write_out(text, end=""):
        raise _Closed


def _warn(line: str) -> None:
    print(one_line(f"warning: {line}"), file=sys.stderr, flush=True)


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    try:
        check(options)
        run(options)
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    except _Closed:
        pass
    except KeyboardInterrupt:
        parser.exit(130, "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
