"""Finds the configs that are packaged with this project, in an installed wheel as in a checkout."""

import os
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def find(path: Path, folder: Path = Path()) -> Path:
    """The path of a config relative to `folder`; if nothing exists there, the packaged config of that name, if any.

    The name of a packaged config is its path in configs/ of this repository, with or without a leading `configs/`.
    """
    here = folder / path
    packaged = CONFIGS / (path.relative_to("configs") if path.parts[:1] == ("configs",) else path)
    inside = not path.is_absolute() and ".." not in path.parts
    return packaged if inside and not os.path.lexists(here) and os.path.isfile(packaged) else here
