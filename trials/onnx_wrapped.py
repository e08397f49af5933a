"""`onnx_files` as a kind of tries."""

from __future__ import annotations

from trials import onnx_files
from trials.models import tried
from trials.outcomes import Case, Place


def generate(place: Place) -> Case:
    """A malformed ONNX file."""
    return tried(place, onnx_files.generate(place.rng, place.folder), "malformed ONNX")
