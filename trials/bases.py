"""Valid files, made once and kept, which the generators damage."""

from __future__ import annotations

from pathlib import Path


def made(kinds: set[str]) -> Path:
    """The folder of the valid files that these kinds need."""
    return Path("/nonexistent")
