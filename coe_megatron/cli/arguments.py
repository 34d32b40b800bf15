"""Command lines: rank 0 reports a mistake in one line on stderr; all ranks exit with status 2."""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Never

from coe_megatron.distributed.environment import rank_of
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import expand_user, user_path
from coe_megatron.run.exit_status import ExitStatus, write_error_file

_SECONDS_FOR_RANK_0 = 10
_DASHED = re.compile(r"(?<=unrecognized arguments: )--(output|[a-z_]+(?:\.\w+)+)(?:[= ](\S+))?")


class Parser(argparse.ArgumentParser):
    """argparse without the usage text before an error; under torchrun only rank 0 prints.

    The error of an option with `type=user_path` includes the reason.
    """

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, epilog, formatter_class=formatter, allow_abbrev=False)
        for kind in (user_path, expand_user):
            self.register("type", kind, partial(_checked, kind))
        self._silent = rank_of(os.environ) != 0

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's, but refuses `--option=--`, which argparse reads as an empty list."""
        words = list(sys.argv[1:] if args is None else args)
        options = words[: words.index("--")] if "--" in words else words
        if wrong := next((word for word in options if re.fullmatch(r"-[^=]*=--", word)), None):
            self.error(f"argument {wrong.partition('=')[0]}: -- is not a value")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> Never:
        if setting := _DASHED.search(message):
            message = (
                f"{setting[0]} is not an option: give a setting without --, as {setting[1]}={setting[2] or 'VALUE'}"
            )
        self.refuse(ExitStatus.MISTAKE, message)

    def refuse(self, status: ExitStatus, message: str, all_ranks: bool = False) -> Never:
        """Exit with a line on stderr, which is also written to torchrun's error file.

        Args:
            all_ranks: print on ranks other than 0 too, because the error concerns this rank only.
        """
        write_error_file(status, one_line(message), environment=os.environ)
        silent = self._silent and not all_ranks
        if silent:  # when the first rank exits, torchrun kills the others: rank 0 must have time to print
            time.sleep(_SECONDS_FOR_RANK_0)
        self.exit(status, None if silent else f"{self.prog}: error: {one_line(message)}\n")


def program_name(script: str, file: str) -> str:
    """A program's name in its messages: `file` if started as that file of launch/, otherwise `script`."""
    return file if Path(sys.argv[0]).name == file else script


def _checked(kind: Callable[[str], Path | str], text: str) -> Path | str:
    try:
        return kind(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def write_out(text: str, end: str = "\n") -> bool:
    """Print a program's output; returns False if the reader has closed the pipe (`head`), which is not an error.

    Raises:
        SystemExit: it cannot be written, for example on a full disk: status 1, with a line on stderr.
    """
    try:
        print(text, end=end, flush=True)
    except UnicodeEncodeError:  # a terminal or a locale without these characters
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        return write_out(text, end)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing it raises no error
        if isinstance(error, BrokenPipeError):
            return False
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None
    return True
