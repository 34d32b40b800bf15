"""Command lines: a mistake is one line on stderr, from rank 0 alone, and exit status 2."""

import argparse
import os
import re
import sys
import time
from typing import Never

from coe_megatron.exit_status import ExitStatus, leave_error_file

_SECONDS_FOR_RANK_0 = 10
_DASHED = re.compile(r"(?<=unrecognized arguments: )--(output|[a-z_]+(?:\.\w+)+)(?:[= ](\S+))?")


class Parser(argparse.ArgumentParser):
    """argparse without the usage before an error; under torchrun ranks other than 0 stay silent."""

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, epilog, formatter_class=formatter, allow_abbrev=False)
        self._silent = os.environ.get("RANK", "0") != "0"

    def error(self, message: str) -> Never:
        if setting := _DASHED.search(message):
            message = (
                f"{setting[0]} is no option: a setting is given without --, as {setting[1]}={setting[2] or 'VALUE'}"
            )
        self.refuse(ExitStatus.MISTAKE, message)

    def refuse(self, status: ExitStatus, message: str) -> Never:
        """End the program with a line on stderr, also for torchrun's report."""
        leave_error_file(status, one_line(message), environment=os.environ)
        if self._silent:  # the first rank to end makes torchrun kill the others, rank 0 before it has spoken
            time.sleep(_SECONDS_FOR_RANK_0)
        self.exit(status, None if self._silent else f"{self.prog}: error: {one_line(message)}\n")


def one_line(text: str) -> str:
    """The text with line breaks and whatever else no terminal shows (from names of files and keys) as escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def write_out(text: str) -> bool:
    """Print what was asked for; False if the reader has gone away, as `head` does, which is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing it is none either
        return False
    return True
