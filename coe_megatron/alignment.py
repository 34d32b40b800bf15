"""What torch's grouped product asks of the sizes of experts."""

_ROW_BYTES = 16


def row_multiple(element_bytes: int) -> int:
    """A row of weights or tokens must have a multiple of so many elements, so that each begins at one of 16 bytes."""
    return _ROW_BYTES // element_bytes
