"""Networks of torchvision and timm, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import nn

from convscope.errors import BackendError, ModelError, UsageError, nearest, one_line, option
from convscope.networks import preprocessing as pp
from convscope.networks.formats.code import literal
from convscope.networks.formats.files import WeightsFile, sha256
from convscope.networks.formats.torch.files import fill
from convscope.networks.network import Source
from convscope.networks.torch.modules import OpenedModule


def open_zoo(name: str, weights: WeightsFile | None = None, trust: bool = False) -> OpenedModule:
    """A network of torchvision or timm: `torchvision:resnet50?weights=none`, `timm:convnext_tiny`.

    Args:
        name: collection, function, and its arguments as a query; pretrained weights unless they say otherwise.
        weights: a file to take the weights from.
        trust: let a checkpoint that holds no state dict run its author's code.

    Raises:
        BackendError: the collection is not installed; UsageError: it has no such network or argument; ModelError: the
        weights can't be downloaded.
    """
    collection, _, rest = name.partition(":")
    function, _, query = rest.partition("?")
    arguments = {key: literal(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    library = _library(collection)
    make = {"torchvision": _from_torchvision, "timm": _from_timm}[collection]
    with _seeded():
        opened = make(library, name, function, arguments, weights is not None)
    if weights is None:
        return opened
    notes = fill(opened.module, weights, trust)
    source = Source(name, str(weights.path), sha256(weights.path), (f"weights of {weights.path.name}", *notes))
    return OpenedModule(opened.module, source, size=opened.size, preprocessing=opened.preprocessing)


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise BackendError(
                f"{name} can't be imported ({one_line(error)}). Run: pip install {name}",
                code="backend-broken",
                name=name,
            ) from error
        raise BackendError(
            f"{name} is not installed. Run: pip install {name}", code="backend-missing", name=name
        ) from None
    except Exception as error:  # a torchvision that was built for another torch raises RuntimeError
        raise BackendError(
            f"{name} is installed but can't be imported ({type(error).__name__}: {one_line(error)}); "
            f"it has to be built for this torch ({torch.__version__}).",
            code="backend-broken",
            name=name,
        ) from error


def _from_torchvision(
    library: ModuleType, name: str, function: str, arguments: dict[str, object], bare: bool
) -> OpenedModule:
    models = importlib.import_module("torchvision.models")
    if function not in models.list_models():
        raise UsageError(
            f"torchvision has no network {function!r}; {nearest(function, models.list_models())}",
            code="network-unknown",
            name=function,
        )
    asked = arguments.pop("weights", None if bare else "DEFAULT")
    chosen = None if asked is None else _torchvision_weights(models.get_model_weights(function), name, str(asked))
    module = _made(lambda: models.get_model(function, weights=chosen, **arguments), name)
    if chosen is None:
        return OpenedModule(module, Source(name, notes=(_DRAWN,)))
    transforms = chosen.transforms()  # those of detectors have neither
    crop = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)
    known = None
    if hasattr(transforms, "mean"):
        known = _preprocessing(transforms.mean, transforms.std, f"as torchvision's {chosen} were trained")
    categories = tuple(chosen.meta["categories"]) if "categories" in chosen.meta else None
    return OpenedModule(
        module,
        Source(name, notes=(f"weights={chosen}",)),
        preprocessing=known,
        size=(crop[0], crop[0]) if crop else None,
        class_names=None if arguments else categories,
    )


Weights = Any  # of torchvision: a member of a model's enumeration, with its transforms and its metadata


def _torchvision_weights(there: Mapping[str, Weights], name: str, asked: str) -> Weights:
    try:
        return there[asked]
    except KeyError:
        names = [str(key) for key in getattr(there, "__members__", there)]
        raise UsageError(
            f"{name}: no weights {asked!r}; {nearest(asked, names)}", code="weights-unknown", name=str(asked)
        ) from None


def _from_timm(library: ModuleType, name: str, function: str, arguments: dict[str, object], bare: bool) -> OpenedModule:
    base = function.partition(".")[0]
    if not library.is_model(base):
        raise UsageError(
            f"timm has no network {function!r}; {nearest(base, library.list_models())}",
            code="network-unknown",
            name=function,
        )
    arguments = {"pretrained": not bare, **arguments}
    module = _made(lambda: library.create_model(function, **arguments), name)
    config = dict(getattr(module, "pretrained_cfg", None) or {})
    known = None
    if "mean" in config and "std" in config:
        known = _preprocessing(config["mean"], config["std"], "as its timm configuration says")
    size = tuple(config["input_size"][1:]) if "input_size" in config else None
    note = f"pretrained ({config.get('tag') or 'default'})" if arguments["pretrained"] else _DRAWN
    return OpenedModule(module, Source(name, notes=(note,)), preprocessing=known, size=size)


_DRAWN = "random weights, drawn with seed 0"


def _made(make: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        return make()
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(
            f"{name} refuses these arguments: {one_line(error)}", code="function-arguments", name=name
        ) from error
    except Exception as error:  # each hub has its own errors for a network that is not there
        raise ModelError(
            f"the pretrained weights of {name} can't be downloaded or loaded "
            f"({type(error).__name__}: {one_line(error)[:160]}). "
            f"Try again online, give a file as {option('weights')}, or take random weights: {name.partition('?')[0]}?"
            + ("weights=none" if name.startswith("torchvision") else "pretrained=false"),
            code="weights-not-fetched",
            name=name,
        ) from error


def _preprocessing(mean: Iterable[float], std: Iterable[float], reason: str) -> pp.Preprocessing:
    """Means and deviations on 0..1, as data configs give them."""
    means, deviations = (tuple(255 * float(value) for value in values) for values in (mean, std))
    for preset in pp.PRESETS.values():
        if (
            not preset.bgr
            and np.allclose(preset.mean, means, atol=0.1)
            and np.allclose(preset.std, deviations, atol=0.1)
        ):
            return preset.because(pp.FOUND, reason)
    return pp.Preprocessing("mean,std", means, deviations, certainty=pp.FOUND, reason=reason)


@contextmanager
def _seeded() -> Iterator[None]:
    """Draw initial weights from seed 0, and leave torch's generator where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
