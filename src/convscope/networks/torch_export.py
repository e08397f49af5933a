"""Exported programs (`.pt2`): the module tree that they were exported from, built anew from their graph."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convscope.errors import ModelError, one_line
from convscope.networks.modules import Described, OpenedModule
from convscope.networks.torch_files import source_of


def read(path: Path, trust: bool = False) -> OpenedModule:
    """An exported program as a tree of modules.

    Args:
        path: a `.pt2` file.
        trust: let it unpickle what is no tensor.

    Raises:
        ModelError: it is damaged, compiled for one machine, or holds pickled objects and is not trusted.
    """
    names = _names(path)
    if any(name.endswith((".so", ".cubin")) for name in names):
        raise ModelError(
            f"{path} is compiled for one machine (AOTInductor), without a graph. Expected torch.export.save."
        )
    objects = [name for name in names if name.rpartition("/")[2].startswith(("custom_obj_", "opaque_obj_"))]
    if objects and not trust:
        raise ModelError(
            f"{path} holds {len(objects)} pickled object{'s' if len(objects) > 1 else ''}, and unpickling runs code. "
            "Expected tensors only. If you trust the file, give --trust (trust=True)."
        )
    with _tensors_only(not trust):
        try:
            program = torch.export.load(path)
        except Exception as error:  # torch raises what its reader raises
            raise ModelError(f"{path} can't be read as an exported program ({one_line(error)[:200]}).") from error
    shape = _input_shape(program)
    _free_the_batch(program)
    module = torch.export.unflatten(program)
    # Its own check insists on the sizes of the example.
    module.process_forward_inputs = lambda *arguments: list(arguments)  # type: ignore[method-assign]
    _describe(module, program)
    return OpenedModule(module, source_of(path), input_shape=(None, *shape[1:]) if shape else None)


def _names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


@contextmanager
def _tensors_only(wanted: bool) -> Iterator[None]:
    """torch.export.load falls back on a full unpickling; this setting of torch's own forbids it."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    try:
        if wanted:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        yield
    finally:
        if before is None:
            os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _input_shape(program: Any) -> tuple[int | None, ...] | None:
    """`(n, c, h, w)` of the first input, None where it was exported as dynamic."""
    first = program.graph_signature.user_inputs[0]
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name == first and "val" in node.meta:
            return tuple(side if isinstance(side, int) else None for side in node.meta["val"].shape)
    return None


_SHAPING = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.expand.default")


def _free_the_batch(program: Any) -> None:
    """Let constant shapes that begin with the example's batch take any batch: convscope looks at several at a time."""
    shape = _input_shape(program)
    if not shape or shape[0] is None:
        return
    for node in program.graph.nodes:
        if str(node.target) not in _SHAPING:
            continue
        source, sizes = node.args
        given, made = source.meta["val"].shape, node.meta["val"].shape
        if sizes and given and given[0] == shape[0] == made[0] and sizes[0] in (shape[0], -1):
            rest = [int(side) for side in made[1:]]
            keeps = "expand" in str(node.target)
            node.args = (source, [-1, *(list(sizes[1:]) if keeps else rest)])
    program.graph_module.recompile()


def _describe(module: nn.Module, program: Any) -> None:
    """Say of each module which class it was, as the nodes of the graph remember it."""
    classes: dict[str, str] = {}
    for node in program.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            classes[path] = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    for path, child in module.named_modules():
        home, _, name = classes.get(path.partition("@")[0], "").rpartition(".")
        own = home.startswith("torch.nn.modules") and not list(child.children())
        child.described = Described(name or "module", None if own else "model")
