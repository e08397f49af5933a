"""Which frameworks are installed, and the one backend that Keras has in a process."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

from convscope.errors import BackendError, UsageError, one_line, option

# Keras' backends in the order in which they are tried, the fastest on a processor first (docs/benchmarks.md),
# with the extra of this package that brings each.
BACKENDS = {"tensorflow": "tensorflow", "torch": "keras-torch", "jax": "jax"}


def check_installed(module: str, extra: str, what: str) -> None:
    """Raise an error where a framework is missing.

    Args:
        module: its name.
        extra: of this package, that brings it.
        what: needs it, for the message.

    Raises:
        BackendError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise BackendError(
            f"{what} needs {module}, which is not installed. Run: pip install 'convscope[{extra}]'",
            code="backend-missing",
            name=module,
            extra=extra,
        )


def name_backend_for_code(requested: str | None) -> None:
    """Name the backend that a user's code will get if it imports Keras; nothing is imported here."""
    if requested is not None and "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = requested
    elif "KERAS_BACKEND" not in os.environ and "keras" not in sys.modules and _installed():
        os.environ["KERAS_BACKEND"] = _at_hand()


def choose_backend(requested: str | None) -> str:
    """Make sure that Keras runs on the requested backend; import nothing else.

    Raises:
        BackendError: it is unknown or not installed, or Keras already runs on another one in this process.

    Example:
        >>> from convscope.networks import BACKENDS
        >>> choose_backend(None) in BACKENDS
        True
    """
    if requested is not None and requested not in BACKENDS:
        raise UsageError(
            f"backend {requested!r} is not known; expected one of {', '.join(BACKENDS)}.",
            code="backend-unknown",
            name=requested,
        )
    if "keras" in sys.modules:
        current = _keras().config.backend()
        if requested not in (None, current):
            raise BackendError(
                f"asked for the backend {requested!r}, but Keras already runs on {current!r} in this process, "
                f"and a process has one backend. Set KERAS_BACKEND={requested} before Keras is imported.",
                code="backend-in-use",
                expected=requested,
                found=current,
            )
        return _supported(current)
    name = requested or os.environ.get("KERAS_BACKEND")
    if name is None and importlib.util.find_spec("keras") is None:
        raise BackendError(
            "a Keras model needs Keras, which is not installed. Run: " + _pip("tensorflow"),
            code="backend-missing",
            name="keras",
        )
    name = name or _at_hand()
    _supported(name)
    for needed in (name, "keras"):
        if importlib.util.find_spec(needed) is None:
            raise BackendError(
                f"the backend {name!r} needs {needed}, which is not installed. Run: {_pip(name)}",
                code="backend-missing",
                name=needed,
            )
    os.environ["KERAS_BACKEND"] = name
    try:
        _keras()
    except ImportError as error:
        raise BackendError(
            f"the backend {name!r} is installed but can't be imported ({one_line(error)}). "
            f"Run: {_pip(name)} --force-reinstall",
            code="backend-broken",
            name=name,
        ) from error
    return name


def _keras() -> ModuleType:
    """Keras, which has to be of version 3."""
    keras = importlib.import_module("keras")
    if not hasattr(keras, "config"):
        version = getattr(keras, "__version__", "of unknown version")
        raise BackendError(
            f"expected Keras 3, found Keras {version}. Run: pip install --upgrade keras",
            code="backend-version",
            expected=3,
            found=str(version),
        )
    return keras


def _pip(name: str) -> str:
    return f"pip install 'convscope[{BACKENDS[name]}]'"


def _supported(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(
            f"Keras is set to the backend {name!r}; convscope needs gradients and knows {', '.join(BACKENDS)}. "
            f"Choose one with {option('backend')} or KERAS_BACKEND.",
            code="backend-unknown",
            name=name,
        )
    return name


def _installed() -> list[str]:
    return [name for name in BACKENDS if importlib.util.find_spec(name) is not None]


def _at_hand() -> str:
    """The first backend that is imported already, else the first that is installed."""
    imported = [name for name in BACKENDS if name in sys.modules]
    if imported or _installed():
        return (imported + _installed())[0]
    raise BackendError(
        "no backend for Keras models is installed. Run one of: " + ", ".join(map(_pip, BACKENDS)),
        code="backend-missing",
        name="keras",
    )
