"""Errors that the user can fix are reported in one line; all others keep their traceback."""


class ConfigError(ValueError):
    """A mistake in a config, an option, a path or a file that the user names; the message is one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """Escape line breaks and other unprintable characters (in names of files and keys)."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
