"""What a file's records become, for tests of all that reads them."""

from pathlib import Path

from coe_megatron.data.records import MalformedRecord, Templates
from coe_megatron.data.sources import DEFAULT_RECORD_BYTES, read_chunks

TEXT = Templates.of(["{text}"])


def documents(path: Path, most: int = DEFAULT_RECORD_BYTES) -> dict[str, str]:
    """By place the document, or in parentheses what is wrong with the record."""
    found = {}
    for chunk in read_chunks(path, TEXT, most):
        for place, record in chunk.records():
            try:
                if isinstance(record, MalformedRecord):
                    raise record
                found[place] = TEXT.render(record)
            except MalformedRecord as error:
                found[place] = f"({error})"
    return found
