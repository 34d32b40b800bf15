"""New folders of models, which appear only when they are complete."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coe_megatron.checkpoint import listing
from coe_megatron.errors import ConfigError


@contextmanager
def new_folder(out: Path, overwrite: bool, has: str, source: Path) -> Iterator[Path]:
    """A folder to fill, which then gets the name `out`; after an error nothing is left behind.

    Args:
        has: a file of folders of this kind; one that lacks it is not replaced.
        source: what the folder is made from, which is neither inside it nor around it.

    Raises:
        ConfigError: `out` exists and `overwrite` is False, or it is of another kind, or contains the source.
    """
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise ConfigError(f"{out} exists: name another folder, or use --overwrite")
        if out.is_symlink() or not (out / has).exists():
            raise ConfigError(f"{out} has no {has} and will not be replaced: name another folder")
    place, inner = out.resolve(), source.resolve()
    if place == inner or place in inner.parents or inner in place.parents:
        raise ConfigError(f"{out} and {source} contain each other: name another folder")
    with listing.unpublished(out) as folder:
        yield folder
