"""Models that the user's own code makes: `file.py:function` and `package.module:function`."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

from convscope.errors import UsageError, nearest, one_line

_FILE = re.compile(r"(?P<home>.+\.py):(?P<name>[A-Za-z_][\w.]*)(\?(?P<query>.*))?", re.DOTALL)
_MODULE = re.compile(r"(?P<home>[A-Za-z_]\w*(\.\w+)*):(?P<name>[A-Za-z_][\w.]*)(\?(?P<query>.*))?", re.DOTALL)


Made = Any  # what the user's code has under a name, or returns


def is_code(name: str) -> bool:
    """True if `name` is `file.py:function` or `package.module:function`, perhaps with `?argument=value`."""
    if os.path.exists(name):
        return False
    return bool(_FILE.fullmatch(name) or (_MODULE.fullmatch(name) and len(name.partition(":")[0]) > 1))


def build(name: str) -> Made:
    """The return value of the function `name`; or the object itself, if it can't be called or is a model.

    Raises:
        UsageError: no such file, module or function, arguments that it does not take, or an error in the user's code.
    """
    match = _FILE.fullmatch(name) or _MODULE.fullmatch(name)
    if match is None:
        raise UsageError(
            f"{name!r} is not understood; expected file.py:function or package.module:function.",
            code="name-not-understood",
            name=name,
        )
    arguments = {key: literal(text) for key, text in parse_qsl(match["query"] or "", keep_blank_values=True)}
    with _guarded(name):
        found = _member(_module(match["home"]), match["name"], match["home"])
    if not _is_maker(found):
        return found
    _check_arguments(found, match["name"], arguments)
    with _guarded(name), _importable(Path(match["home"]).parent):
        return found(**arguments)


def literal(text: str) -> object:
    """An argument of a query: `false`, `none`, `10`, `(64,64,3)`, else text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def describe_type(value: object) -> str:
    """The type of a value, for people."""
    return "nothing (None)" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"


def _module(home: str) -> ModuleType:
    if not home.endswith(".py"):
        try:
            return importlib.import_module(home)
        except ModuleNotFoundError as error:
            if error.name and (home == error.name or home.startswith(error.name + ".")):
                raise UsageError(
                    f"there is no module {home!r}; give its file as file.py:function.", code="module-missing", name=home
                ) from None
            raise
    path = Path(home)
    if not os.path.isfile(path):
        names = sorted(entry.name for entry in path.parent.glob("*.py")) if os.path.isdir(path.parent) else []
        raise UsageError(f"no file at {path}; {nearest(path.name, names)}", code="file-missing", path=str(path))
    spec = importlib.util.spec_from_file_location(f"_convscope_code_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(
            f"{path} can't be read as Python; expected file.py:function.", code="file-unreadable", path=str(path)
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look for their module there
    with _importable(path.parent):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules beside the user's file can be imported while it is being run."""
    real = os.path.realpath(folder)
    sys.path.insert(0, real)
    try:
        yield
    finally:
        sys.path.remove(real)


def _member(module: object, name: str, home: str) -> Made:
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            makers = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise UsageError(
                f"{home} has no {part!r}; {nearest(part, makers)} It has {', '.join(makers[:8]) or 'no function'}.",
                code="function-unknown",
                name=part,
            )
        found = getattr(found, part)
    return found


def _is_maker(found: object) -> bool:
    """Functions and classes are called; a model is callable too, and is returned itself."""
    if inspect.isclass(found) or inspect.isroutine(found):
        return True
    is_model = any(cls.__module__.startswith(("torch.nn.", "keras.")) for cls in type(found).__mro__)
    return callable(found) and not is_model


def _check_arguments(function: Callable, name: str, arguments: dict[str, object]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UsageError(
            f"{name}{signature} can't be called so ({error}); give its arguments as {name}?argument=value&other=value, "
            "or a function that takes none.",
            code="function-arguments",
            name=name,
        ) from None


@contextmanager
def _guarded(name: str) -> Iterator[None]:
    """An error in the user's code becomes one line, with the place in their file."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        own = [frame for frame in frames if Path(frame.filename).name == Path(name.rpartition(":")[0]).name]
        place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        raise UsageError(
            f"{name} raised {type(error).__name__}: {one_line(error)}{place}. Call it yourself to see the whole error.",
            code="code-failed",
            name=name,
        ) from error
