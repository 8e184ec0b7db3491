"""Where a trained model lies, found before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from dgsnet.config import CONFIG_FILE
from dgsnet.errors import UserError
from dgsnet.files import aside

WEIGHTS_FILE = "adapters.safetensors"


def model_folder(path: str | Path) -> Path:
    """The model folder that `path` means: itself, or the best model of a run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    for folder in (path / "best", path):
        for candidate in (
            folder,
            aside(folder),
        ):  # the latter after a kill between replace_folder's renames
            if (candidate / WEIGHTS_FILE).is_file():
                return candidate
    if not path.exists():
        raise UserError(f"no model at {path}: give the folder that `dgsnet train --out` wrote")
    if (path / CONFIG_FILE).is_file():
        raise UserError(
            f"{path} has no finished model yet ({WEIGHTS_FILE} is missing): finish its training with --resume"
        )
    raise UserError(
        f"{path} is no model: it holds no {WEIGHTS_FILE}; give the folder that `dgsnet train` wrote"
    )
