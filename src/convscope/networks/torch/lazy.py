"""Modules whose weights are made when they are first called."""

from __future__ import annotations

import copy
from contextlib import ExitStack, suppress
from dataclasses import replace

import torch
from torch import nn

from convscope.errors import ModelError, one_line
from convscope.networks.restoring import restored
from convscope.networks.torch.modules import OpenedModule


def materialised(opened: OpenedModule, name: str, size: tuple[int, int] | None) -> OpenedModule:
    """The module; a copy of it that has weights where the user has not called it yet.

    Raises:
        ModelError: it can't be called on a blank image of `size` `(h, w)`.
    """
    module = opened.module
    if not any(nn.parameter.is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        return opened
    module = copy.deepcopy(module)
    restored(_seeded, lambda _: _create(module, name, size))
    note = "its lazily created layers have random weights, drawn with seed 0"
    return replace(opened, module=module, source=replace(opened.source, notes=(*opened.source.notes, note)))


def called_once(module: nn.Module, size: tuple[int, int]) -> None:
    """Call a module that code has just made on a blank image of `size` `(h, w)`: it may make layers in its first call.

    One with lazy layers is left alone, since a file can tell their shapes; and so is one that can't be called so, which
    says more when it is opened.
    """
    if any(nn.parameter.is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        return
    with suppress(ModelError):
        restored(_seeded, lambda _: _create(module, "", size))


def _create(module: nn.Module, name: str, size: tuple[int, int] | None) -> None:
    """Call the module, so that its lazy layers make their weights."""
    errors = []
    for channels in (3, 1):
        try:
            module.eval()(torch.zeros((1, channels, *(size or (224, 224)))))
            return
        except Exception as error:  # whatever the user's code raises
            errors.append(error)
    raise ModelError(
        f"{name} has layers that are created when it is first called, and it can't be called on an "
        f"image ({one_line(errors[0])}). Call it once yourself, then open it.",
        code="model-lazy",
        name=name,
        reason=one_line(errors[0]),
    ) from errors[0]


def _seeded(undo: ExitStack) -> None:
    undo.enter_context(torch.random.fork_rng(devices=[]))
    undo.enter_context(torch.no_grad())
    torch.manual_seed(0)
