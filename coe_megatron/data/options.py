"""Options that say how a record becomes a document, for every program that reads text."""

import argparse


def add_document_options(parser: argparse.ArgumentParser) -> None:
    """Add --field and --template, of which one can be given."""
    document = parser.add_mutually_exclusive_group()
    document.add_argument("--field", metavar="NAME", help="the field that is the document (default: text)")
    document.add_argument(
        "--template",
        action="append",
        default=[],
        help=r"the document made of several fields in braces; \n stands for a new line, \t for a tab; given several "
        "times, a record takes the first whose fields it has",
    )


def templates(options: argparse.Namespace) -> tuple[str, ...]:
    """What `PrepareSettings.template` is to be; empty where neither option was given."""
    if options.field is not None:
        return ("{" + options.field + "}",)
    return tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in options.template)
