"""Where the real networks and photos lie that are not part of the project; tests with them skip without."""

import os
from pathlib import Path

import pytest


def _find() -> Path | None:
    given = os.environ.get("CONVSCOPE_ASSETS")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "assets"
    return folder if folder.is_dir() else None


ASSETS = _find()
needs_assets = pytest.mark.skipif(ASSETS is None, reason="no assets: set CONVSCOPE_ASSETS to their folder")
