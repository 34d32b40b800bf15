"""Command lines: a mistake is one line on stderr, from rank 0 alone, and exit status 2."""

import argparse
import os
from typing import Never


class Parser(argparse.ArgumentParser):
    """argparse without the usage before an error; under torchrun ranks other than 0 stay silent."""

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, epilog, formatter_class=formatter, allow_abbrev=False)
        self._silent = os.environ.get("RANK", "0") != "0"

    def error(self, message: str) -> Never:
        self.exit(2, None if self._silent else f"{self.prog}: error: {message}\n")
