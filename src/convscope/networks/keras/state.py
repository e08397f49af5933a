"""Keras' state of the present call, for each thread: restored where a call is left in the middle."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any

import keras

# Keras' own names of what lives for the length of a call or of a `with`; the rest (names given, seeds) stays.
_OF_A_CALL = (
    *("autocast_scope", "current_call_ctx", "in_tf_graph_scope", "name_scope_stack", "remat_scope_stack"),
    *("stateless_scope", "symbolic_scope", "traceback_filtering", "torch_device", "dtype_policy"),
)


class _OfKeras:
    """Names of attributes that are Keras' own: those of its layers and models, and all with an underscore in front."""

    def __init__(self) -> None:
        self._names = frozenset([*vars(keras.layers.Layer()), *vars(keras.Model())])

    def __contains__(self, name: object) -> bool:
        return name in self._names or str(name).startswith("_")


OF_KERAS = _OfKeras()
Slot = Any  # Keras' state under a name


def keep_state(undo: ExitStack) -> None:
    """Put Keras' state of this thread back when `undo` is run; until then its errors keep their whole traceback."""
    state = vars(importlib.import_module("keras.src.backend.common.global_state").GLOBAL_STATE_TRACKER)
    kept = {name: (value, _content(value)) for name in _OF_A_CALL if (value := state.get(name)) is not None}
    missing = [name for name in _OF_A_CALL if name not in state]
    undo.callback(_put_back, state, kept, missing)
    state["traceback_filtering"] = False


def _content(value: Slot) -> list[Slot] | None:
    return list(value) if isinstance(value, list) else None


def _put_back(state: dict[str, object], kept: dict[str, tuple[Slot, list[Slot] | None]], missing: list[str]) -> None:
    for name, (value, content) in kept.items():
        state[name] = value
        if content is not None:
            value[:] = content
    for name in _OF_A_CALL:
        if name not in kept and name in state:
            state[name] = None
    for name in missing:
        state.pop(name, None)
