"""Write the list of the public interface, api.md, from the docstrings: `python docs/make_api.py`.

With `--check` nothing is written; the exit status is 1 where the page is not up to date.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "api.md"

# What a program may use, module by module. The public names of a module are its `__all__`, or what it defines without
# an underscore, less these, which are there for other modules of the package.
_INTERNAL = {
    "convscope": "",
    "convscope.objectives": "number_text",
    "convscope.measures": "Own Scored ScoredBeside answer described_own own text_of",
    "convscope.networks": "Named",
    "convscope.networks.ops": "namespace",
    "convscope.techniques.activations": "memory_bytes",
    "convscope.techniques.filters": "",
    "convscope.techniques.filters.recipes": "",
    "convscope.techniques.filters.parameterizations": "colour_logits generator inverse_transform "
    "logits_of natural_magnitudes spectrum_scale",
    "convscope.techniques.filters.optimizers": "",
    "convscope.techniques.filters.transforms": "resampled",
    "convscope.techniques.heatmaps": "",
    "convscope.techniques.heatmaps.methods": "Own as_method labels results_of",
    "convscope.techniques.heatmaps.options": "check_options listed options_of parsed",
    "convscope.results": "",
    "convscope.render": "",
    "convscope.store": "",
    "convscope.images.source": "hold report_failures",
    "convscope.images.decode": "decode_bytes decode_file decoded_files read_entries read_readable_images",
    "convscope.requests": "",
    "convscope.session": "",
    "convscope.events": "",
    "convscope.errors": "bulleted nearest one_line",
    "convscope.limits": "how_to_raise most_unpacked shown",
    "convscope.demo": "",
}
MODULES = {module: frozenset(names.split()) for module, names in _INTERNAL.items()}

HEAD = """# The public interface

Written by `python docs/make_api.py` from the docstrings; `help(convscope.heatmap)` shows each of them whole. The
examples in them are tests (`tests/test_examples.py`) and begin after these lines:

```python
import numpy as np
import convscope
from convscope.demo import CLASSES, MODEL, PHOTOS

network = convscope.open_model(MODEL, classes=CLASSES)
```

In a docstring of a module, the names of that module are imported too.
"""


def public_names(module: str) -> list[str]:
    """The public names of a module, as they stand on the page."""
    found = importlib.import_module(module)
    names = getattr(found, "__all__", None) or [
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and inspect.isroutine(value) | inspect.isclass(value)
        if getattr(value, "__module__", None) == module
    ]
    return [name for name in names if name not in MODULES[module]]


def objects() -> dict[str, Any]:
    """Every public function and class by its full name, each once, under the first module that has it."""
    seen: dict[int, str] = {}
    found = {}
    for module in MODULES:
        for name in public_names(module):
            value = getattr(importlib.import_module(module), name)
            if (inspect.isroutine(value) or inspect.isclass(value)) and id(value) not in seen:
                seen[id(value)] = found_name = f"{module}.{name}"
                found[found_name] = value
    return found


def page() -> str:
    """The whole page."""
    known = {id(value): name for name, value in objects().items()}
    return HEAD + "".join(_section(module, known) for module in MODULES)


def _section(module: str, known: dict[int, str]) -> str:
    found = importlib.import_module(module)
    lines = ["", f"## {module}", "", _first(found), ""]
    for name in public_names(module):
        value = getattr(found, name)
        full = f"{module}.{name}"
        if inspect.ismodule(value):
            lines.append(f"- `{name}`: a module. {_first(value)}")
        elif not (inspect.isroutine(value) or inspect.isclass(value)):
            lines.append(f"- `{name}`: a constant ({type(value).__name__}).")
        elif known[id(value)] != full:
            lines.append(f"- `{name}`: see `{known[id(value)]}`.")
        else:
            lines += _entry(name, value)
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any) -> list[str]:
    lines = [f"- `{name}{_signature(value)}`: {_first(value)}"]
    if inspect.isclass(value):
        for own, member in _members(value):
            lines.append(f"  - `{own}{_signature(member)}`: {_first(member)}")
    return lines


def _members(value: type) -> list[tuple[str, Any]]:
    """The public methods and properties that a class adds to those of its parents."""
    inherited = {name for parent in value.__mro__[1:] for name in vars(parent)}
    shown = []
    for name, member in vars(value).items():
        member = getattr(member, "__func__", member)
        if name.startswith("_") or name in inherited or not (inspect.isroutine(member) or isinstance(member, property)):
            continue
        shown.append((name, member))
    return shown


def _signature(value: Any) -> str:
    """Names and defaults of the parameters; their types and meaning are in the docstring."""
    if isinstance(value, property):
        return ""
    if is_dataclass(value):
        return f"({', '.join(map(_field, (one for one in fields(value) if one.init and one.name[0] != '_')))})"
    if inspect.isclass(value) and (value.__init__ is object.__init__ or getattr(value, "_is_protocol", False)):
        return ""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    plain = [
        one.replace(annotation=one.empty, default=one.empty if one.default is one.empty else _Shown(_text(one.default)))
        for one in found.parameters.values()
        if one.name not in ("self", "cls")
    ]
    return str(found.replace(parameters=plain, return_annotation=found.empty))


def _field(one: Any) -> str:
    if one.default is not MISSING:
        return f"{one.name}={_text(one.default)}"
    return one.name if one.default_factory is MISSING else f"{one.name}=…"


class _Shown(str):
    """A default as `inspect` shall write it."""

    def __repr__(self) -> str:
        return str(self)


def _text(value: Any) -> str:
    """A default in one line; what would differ from one computer to another, or is long, is "…"."""
    text = repr(value)
    return "…" if len(text) > 40 or re.search(r" at 0x|[/\\]", text) else text


def _first(value: Any) -> str:
    """The first paragraph of a docstring."""
    doc = inspect.getdoc(value) or ""
    return re.sub(r"\s+", " ", doc.partition("\n\n")[0]).strip()


def main() -> int:
    """Write the page, or check it."""
    made = page()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or made != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
