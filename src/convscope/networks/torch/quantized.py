"""Modules of PyTorch that compute in int8: their names, and their tensors as plain numbers.

Static ones hand on tensors of whole numbers with a scale; dynamic ones take and return floats, and quantize inside. No
gradient passes either.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

_HOMES = re.compile(r"(__torch__\.)?torch\.(ao\.)?nn\.(intrinsic\.)?quantized(\.|$)")
_QUANTIZED = re.compile(r"(?!(Quantize|DeQuantize|\w*PackedParams) )\w+ \(((dynamic )?(int8|float16))\)")
# What is fused behind the operation that a module is named by: ConvReLU2d, ConvAdd2d, LinearLeakyReLU.
_FUSED = re.compile(r"(?<=[a-zA-Z0-9])(AddReLU|LeakyReLU|ReLU|Add|Tanh)(?=\d?d?$|[123]d$)")


def is_quantized(module: nn.Module) -> bool:
    """True for a module of PyTorch's that computes in int8, or whose weights are kept so."""
    return _home(module) is not None


def _home(module: nn.Module) -> str | None:
    return next((cls.__module__ for cls in type(module).__mro__ if is_home(cls.__module__)), None)


def is_home(qualified: str) -> bool:
    """True for the names of PyTorch's own quantized modules, as Python or TorchScript writes them."""
    return _HOMES.match(qualified) is not None


def named(name: str, home: str, kind: str = "int8") -> str:
    """The name of a class with what it computes in."""
    return f"{name} ({'dynamic ' if '.dynamic' in home else ''}{kind})"


def class_name(module: nn.Module) -> str | None:
    """ "Conv2d (int8)", "Linear (dynamic int8)"; None for a module that is not quantized."""
    home = _home(module)
    if home is None:
        return None
    packed = getattr(getattr(module, "_packed_params", None), "dtype", None)
    return named(type(module).__name__, home, "float16" if packed == torch.float16 else "int8")


def plain_name(name: str) -> str:
    """The name of the module that a quantized one stands for: "Conv2d" of "ConvReLU2d" and "LazyConvAdd2d"."""
    return {"Quantize": "Identity", "DeQuantize": "Identity", "BN2d": "BatchNorm2d", "BN3d": "BatchNorm3d"}.get(
        found := _FUSED.sub("", name), found
    )


def kinds(names: Iterable[str]) -> Counter[str]:
    """How many modules compute in "int8", "dynamic int8" or "dynamic float16", by the names of their classes.

    Of modules in Python and of mirrors of scripted ones these names say so, and of no class of the user's.
    """
    return Counter(found[2] for name in names if (found := _QUANTIZED.fullmatch(name)))


def note(names: Iterable[str]) -> str | None:
    """How many modules are quantized, by the names of their classes, and what follows; None where none is."""
    found = kinds(names)
    if not found:
        return None
    counted = " and ".join(f"{count} layer{'' if count == 1 else 's'} in {kind}" for kind, count in found.items())
    return (
        f"quantized: {counted}; these layers have no gradient. The float model that it was made from has gradients in "
        "all layers"
    )


def dequantized(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers that a tensor stands for."""
    return tensor.dequantize() if tensor.is_quantized else tensor


def in_type_of(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Values in the type of a tensor; rounded as it is, where it is quantized."""
    if not tensor.is_quantized:
        return values.to(tensor.dtype)
    if tensor.qscheme() != torch.per_tensor_affine:
        raise TypeError("values can't be put in the place of a tensor with a scale for each channel")
    return torch.quantize_per_tensor(values.float(), tensor.q_scale(), tensor.q_zero_point(), tensor.dtype)
