"""What is the user's to mend, in one line; everything else keeps its traceback."""


class ConfigError(ValueError):
    """A mistake in a config, an option, a path or a file that the user names; its text is one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """The text with line breaks and other characters that no terminal shows (from names of files and keys) escaped."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
