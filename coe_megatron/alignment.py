"""Alignment that torch's grouped matrix product requires of expert sizes."""

_ROW_BYTES = 16


def row_multiple(element_bytes: int) -> int:
    """Row sizes of weights and tokens must be multiples of this many elements, which aligns rows to 16 bytes."""
    return _ROW_BYTES // element_bytes
