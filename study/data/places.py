"""Where things lie: stores, figures, the user's own data, and paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def runs_dir() -> Path:
    """Folder of the stores: TTSI_RUNS or ./runs."""
    return Path(os.environ.get("TTSI_RUNS") or "runs").expanduser()


def figures_dir() -> Path:
    """Folder of tables and figures: TTSI_FIGURES or ./figures; outputs go to its <profile>/."""
    return Path(os.environ.get("TTSI_FIGURES") or "figures").expanduser()


def found(path: str | Path, *folders: Path) -> Path:
    """A path as a user writes it: from the working directory, from one of the folders, or from the project.

    Jupyter's working directory is the notebook's. A path that is nowhere is given back as it is.
    """
    own = Path(path).expanduser()
    places = (Path.cwd(), *folders, Path(__file__).resolve().parents[2])
    return next((place / own for place in places if (place / own).exists()), own)


def data_dirs() -> list[Path]:
    """Folders where the user's own copies of benchmark files are looked for, first wins."""
    own = os.environ.get("TTSI_DATA")
    bases = dict.fromkeys((Path.cwd(), Path(__file__).resolve().parents[2]))
    return ([Path(own).expanduser()] if own else []) + [base.parent / "shared" / "data" for base in bases]
