"""What has to outlive a power cut."""

import os
from pathlib import Path


def to_disk(path: Path) -> None:
    """Bring a file's content, or a folder's own entries (names, renames), to the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
