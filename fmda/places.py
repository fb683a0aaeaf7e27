"""Where the package and its user keep files."""

import os
from pathlib import Path


def assets_folder() -> Path:
    """Returns the folder of the models that come with the package."""
    return Path(__file__).parent / "assets"


def data_root() -> Path | None:
    """Returns the folder that holds the datasets: the environment's FMDA_DATA, None where that is not set."""
    named = os.environ.get("FMDA_DATA")
    return Path(named).expanduser() if named else None


def below_data(path: str | Path) -> Path:
    """Returns a path that leads to nothing from the working folder as one below `data_root()`, any other as it is."""
    path, root = Path(path).expanduser(), data_root()
    return path if path.is_absolute() or path.exists() or root is None else root / path
