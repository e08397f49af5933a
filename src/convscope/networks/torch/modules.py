"""Between a file and `network.py`: a PyTorch module and its origin."""

from __future__ import annotations

from dataclasses import dataclass

from convscope.networks import preprocessing as pp
from convscope.networks.foreign import TorchModule
from convscope.networks.network import Source


@dataclass(frozen=True)
class Described:
    """The original class of a module, if its own class does not show it: a node of ONNX, a scripted or exported module.

    Found as the attribute `described` of a `torch.nn.Module`.

    Attributes:
        class_name: as the format calls it: "Conv" (ONNX), "Conv2d" (what TorchScript remembers of the class).
        kind: one of `layers.KINDS`; None to go by `class_name`, as for a module of that class from `torch.nn`.
        path: of the layer, where it is not the module's own path.
    """

    class_name: str
    kind: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class OpenedModule:
    """A module and its known properties.

    Attributes:
        module: a `torch.nn.Module` that takes `(n, c, h, w)`.
        source: where it came from.
        input_shape: `(n, c, h, w)` as the format declares it, None for free sides; None if it declares none.
        input: the name of the input that gets the image, where the user names none; the first where None.
        preprocessing: the preprocessing of a data config, if there is one.
        size: `(h, w)` that a data config recommends.
        class_names: where they are known.
        in_memory: True if it is the user's own object, which has to stay as it is.
        name: name of the network, where the class of the module does not show it.
        channels_last_input: the module itself takes `(n, h, w, c)`.
    """

    module: TorchModule
    source: Source
    input_shape: tuple[int | None, ...] | None = None
    input: str | None = None
    preprocessing: pp.Preprocessing | None = None
    size: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None
    in_memory: bool = False
    name: str | None = None
    channels_last_input: bool = False
