"""The configs that come with the package, by name: from an installed wheel as from a checkout."""

import os
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def find(path: Path, folder: Path = Path()) -> Path:
    """A config's path, relative to `folder`; where nothing is, the packaged config of that name, if there is one.

    A packaged config's name is its path below configs/ in this repository, with or without `configs/` before it.
    """
    here = folder / path
    packaged = CONFIGS / (path.relative_to("configs") if path.parts[:1] == ("configs",) else path)
    inside = not path.is_absolute() and ".." not in path.parts
    return packaged if inside and not os.path.lexists(here) and os.path.isfile(packaged) else here
