"""Parses command lines: a mistake is one line on stderr, only on rank 0, with exit status 2."""

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
    """argparse without the usage before an error; under torchrun, ranks other than 0 print nothing.

    For an option with `type=user_path`, the error says what is wrong with the path.
    """

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, epilog, formatter_class=formatter, allow_abbrev=False)
        for kind in (user_path, expand_user):
            self.register("type", kind, partial(_checked, kind))
        self._silent = rank_of(os.environ) != 0

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Like argparse's, but `--option=--` is an error; argparse would parse it as an empty list."""
        words = list(sys.argv[1:] if args is None else args)
        options = words[: words.index("--")] if "--" in words else words
        if wrong := next((word for word in options if re.fullmatch(r"-[^=]*=--", word)), None):
            self.error(f"argument {wrong.partition('=')[0]}: -- is not a value")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> Never:
        if setting := _DASHED.search(message):
            message = (
                f"{setting[0]} is not an option: give settings without --, as {setting[1]}={setting[2] or 'VALUE'}"
            )
        self.refuse(ExitStatus.MISTAKE, message)

    def refuse(self, status: ExitStatus, message: str, aloud: bool = False) -> Never:
        """Exit with a line on stderr, which is also written to the error file for torchrun.

        Args:
            aloud: print on ranks other than 0 too, since the error concerns this rank only.
        """
        write_error_file(status, one_line(message), environment=os.environ)
        silent = self._silent and not aloud
        if silent:  # torchrun kills all ranks when the first one exits, perhaps before rank 0 has printed the line
            time.sleep(_SECONDS_FOR_RANK_0)
        self.exit(status, None if silent else f"{self.prog}: error: {one_line(message)}\n")


def program_name(script: str, file: str) -> str:
    """The name of a program in its messages: `file` if it was started as that file of launch/, else `script`."""
    return file if Path(sys.argv[0]).name == file else script


def _checked(kind: Callable[[str], Path | str], text: str) -> Path | str:
    try:
        return kind(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def write_out(text: str) -> bool:
    """Print a result to stdout; False if its reader has ended, as `head` does, which is not an error.

    Raises:
        SystemExit: it cannot be written, for example to a full disk: status 1, with a line on stderr.
    """
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # a terminal or a locale without these characters
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        return write_out(text)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing stdout causes no error
        if isinstance(error, BrokenPipeError):
            return False
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None
    return True
