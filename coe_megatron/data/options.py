"""Command-line options that say how a record becomes a document, shared by all programs that read text."""

import argparse


def add_document_options(parser: argparse.ArgumentParser) -> None:
    """Add --field and --template, which exclude each other."""
    document = parser.add_mutually_exclusive_group()
    document.add_argument("--field", metavar="NAME", help="the field that is the document (default: text)")
    document.add_argument(
        "--template",
        action="append",
        default=[],
        help=r"the document as text with field names in braces; \n is a new line, \t a tab; if given several times, a "
        "record uses the first template whose fields it has",
    )


def templates(options: argparse.Namespace) -> tuple[str, ...]:
    """The value for `PrepareSettings.template`; empty if neither option was given."""
    if options.field is not None:
        return ("{" + options.field + "}",)
    return tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in options.template)
