"""Alignment that torch's grouped matrix product requires of expert sizes."""

ALIGNMENT = 16  # bytes


def row_multiple(element_bytes: int) -> int:
    """Row sizes of weights and tokens must be multiples of this many elements, which aligns rows to 16 bytes."""
    return ALIGNMENT // element_bytes
