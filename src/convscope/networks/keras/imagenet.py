"""ImageNet's class names, as Keras knows them."""

from __future__ import annotations

import os
from pathlib import Path

import keras
import numpy as np

CLASSES = 1000


def models_folder() -> Path:
    """The folder of Keras' downloads."""
    return Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models"


def imagenet_names(download: bool) -> tuple[str, ...] | None:
    """ImageNet's class names as Keras decodes them; None where its list is neither at hand nor to be had."""
    if not os.path.exists(models_folder() / "imagenet_class_index.json") and not download:
        return None
    try:
        decoded = keras.applications.imagenet_utils.decode_predictions(np.eye(CLASSES, dtype=np.float32), top=1)
    except Exception:  # offline: Keras raises a bare Exception; numbers will do
        return None
    return tuple(name for ((_, name, _),) in decoded)
