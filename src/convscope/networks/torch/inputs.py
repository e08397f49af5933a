"""The inputs of a PyTorch module: a module does not declare them, so they are found by trying."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn

from convscope import limits
from convscope.errors import UsageError, option
from convscope.images.image import InputImage
from convscope.networks.failing import cant_run, failing_layer, said
from convscope.networks.feeding import Feed, described, fed_values, image_input, prepared
from convscope.networks.foreign import Structure
from convscope.networks.graph import flat_outputs
from convscope.networks.inputs import Inputs, check_dimensions, check_input, check_size, convolutions
from convscope.networks.preprocessing import Preprocessing
from convscope.networks.torch.graph import class_name, named_modules
from convscope.networks.torch.limits import BeyondLimits

USUAL = 224
# Sizes that networks of one fixed size are made for, the most usual first; then all others up to LARGEST.
_COMMON = (224, 32, 28, 64, 299, 256, 96, 48, 128, 30, 112, 150, 160, 192, 227, 240, 300, 320, 331, 384, 416, 448, 512)
LARGEST = 512

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Asked:
    """The known and requested properties of a module's inputs.

    Attributes:
        declared: `(n, c, h, w)` as a file declares it, None for free sides.
        name: name of the input that gets the image.
        size: the user's `(h, w)`.
        advised: `(h, w)` that a data config recommends.
        feed: values for the other inputs, by name.
        channels_last: the module itself takes `(n, h, w, c)`.
    """

    declared: Sequence[int | None] | None
    name: str | None
    size: tuple[int, int] | None
    advised: tuple[int, int] | None
    feed: Mapping[str, Feed]
    channels_last: bool


class Entry:
    """Turns images `(n, h, w, c)` into the arguments of the module.

    Args:
        module: to be called, in evaluation mode and without gradients, by `attempt`.
        attempt: runs the module on its arguments.
        asked: the known and requested properties of its inputs.
        dtype, device: of the module's weights.
    """

    def __init__(
        self,
        module: nn.Module,
        attempt: Callable[..., Structure],
        asked: Asked,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._module, self._attempt = module, attempt
        self._dtype, self._device, self._channels_last = dtype, device, asked.channels_last
        self.names = _input_names(module, (asked.name, *asked.feed))
        self._shapes: Mapping[str, Shape] = getattr(module, "input_shapes", {})
        self._whole: set[str] = set(getattr(module, "unbatched", ()))
        self._preprocessing: Preprocessing | None = None
        self._prepared: dict[tuple[str, Shape], torch.Tensor] = {}
        name = image_input(asked.name, {name: self._shapes.get(name) for name in self.names}, asked.feed)
        self.position = self.names.index(name)
        self._others = self._fed(name, asked.feed)
        self._layout = torch.channels_last
        self._first_failure: Exception | str = ""  # of the likeliest size and channels, which are tried first
        self._blueprint: nn.Module | None = None
        channels, size, free, note = self._found(asked.declared, asked.size, asked.advised)
        others = {other: described(value) for other, value in self._others.items()}
        self.inputs = Inputs(name, size, free, channels, others, note)

    def preparing(self, preprocessing: Preprocessing) -> Entry:
        """This entry with the preprocessing of the image for the images that are fed."""
        found = copy.copy(self)
        found._preprocessing, found._prepared = preprocessing, {}
        return found

    def arguments(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The arguments of the module for images `(n, h, w, c)`: copies, since it may change them in place."""
        arguments = [self._repeated(name, x) for name in self.names if name in self._others]
        return [*arguments[: self.position], self._laid_out(x), *arguments[self.position :]]

    def _laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of images `(n, h, w, c)` with the axes of the module."""
        x = x.to(self._dtype)
        if self._channels_last:
            return x.clone()
        # As channels_last the bytes keep their order, and convolutions run faster; but a `view` of maps may not.
        # A grey image counts as contiguous either way, but its strides lead a convolution to channels_last.
        return x.permute(0, 3, 1, 2).clone(memory_format=self._layout)

    # finding out -----------------------------------------------------------------------------------

    def _found(
        self,
        declared: Sequence[int | None] | None,
        asked: tuple[int, int] | None,
        advised: tuple[int, int] | None,
    ) -> tuple[int, tuple[int, int], bool, str]:
        """Channels, size, whether other sizes are possible, and a remark."""
        channels, height, width = _of(declared, self._channels_last)
        if declared is not None and height and width:
            check_size((height, width), asked)
            self._runs(channels or 3, (height, width))  # for the layout
            return channels or 3, (height, width), False, ""
        known = [channels] if channels else _likely_channels(self._module)
        wanted = asked or advised or (USUAL, USUAL)
        fitting = next((count for count in known if self._runs(count, wanted)), None)
        if fitting is not None:
            return fitting, wanted, self._is_free(fitting, wanted), ""
        if asked is None:
            for count in known:
                side = self._fixed_side(count)
                if side:
                    note = "a guess: the first size that its layers fit; give the input size if it is another"
                    return count, (side, side), False, note
        advice = (
            "Expected a module that takes images (n, c, h, w); give its size, height and width for one that is not "
            f"square, such as 66x200, with {option('open_model.size')}."
        )
        name = type(self._module).__name__
        parts = named_modules(self._module).items()
        check_dimensions(name, convolutions((path, class_name(part)) for part, path in parts))
        failure = self._first_failure
        raise cant_run(name, wanted, known, self._reason(), advice) from (None if isinstance(failure, str) else failure)

    def _reason(self) -> str:
        if isinstance(self._first_failure, str):
            return self._first_failure
        fed = "".join(
            f"; {name!r} was fed an array {value.shape}"
            for name, value in self._others.items()
            if not isinstance(value, InputImage)
        )
        paths = {id(self._module): "", **{id(child): path for child, path in named_modules(self._module).items()}}
        return said(self._first_failure, failing_layer(self._first_failure, paths))[:150] + fed

    def _is_free(self, channels: int, size: tuple[int, int]) -> bool:
        other = (max(8, size[0] * 3 // 4 // 32 * 32), max(8, size[1] * 3 // 4 // 32 * 32))
        other = other if other != size else (size[0] * 2, size[1] * 2)
        return self._runs(channels, other)

    def _fixed_side(self, channels: int) -> int | None:
        """The side of the square images that a module of one fixed size takes, found on shapes alone."""
        # A file that fits at no size should not take all of its time here; a module of the user's may be a slow one.
        from_file = getattr(self._module, "remembers_nothing", False)
        end = time.monotonic() + limits.current().seconds / (6 if from_file else 1)
        all_sides = dict.fromkeys([*_COMMON, *range(8, LARGEST + 1)])
        sides = takewhile(lambda _: time.monotonic() < end, all_sides)
        fitting = (side for side in sides if self._fits(channels, side) and self._runs(channels, (side, side)))
        tried = (side for side in _COMMON[1:] if self._runs(channels, (side, side)))
        return next(fitting, None) or next(tried, None)

    def _fits(self, channels: int, side: int) -> bool:
        """Whether shapes go through, with tensors that have no values; some operations need them, so this may err."""
        try:
            arguments = [x.contiguous().to("meta") for x in self.arguments(self._blank(channels, (side, side), "meta"))]
            return _kept(self._empty()(*arguments))
        except BeyondLimits:  # at another size, too
            raise
        except Exception:  # whatever the user's code raises: this size does not fit
            return False

    def _empty(self) -> nn.Module:
        """A copy of the module with weights that have no values: its memory of a pass is not the user's.

        One that is known to remember nothing is copied once.
        """
        if self._blueprint is not None:
            return self._blueprint
        tensors = {id(item): item for item in (*self._module.parameters(), *self._module.buffers())}
        memo: dict[int, object] = {}
        for key, tensor in tensors.items():
            empty = tensor.detach().to("meta")
            memo[key] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        copied = copy.deepcopy(self._module, memo)
        self._blueprint = copied if getattr(self._module, "remembers_nothing", False) else None
        return copied

    def _runs(self, channels: int, size: tuple[int, int]) -> bool:
        """Whether the module takes images of a size; it settles the layout in memory that it takes them in."""
        check_input(self.names[self.position], (*size, channels))
        for layout in dict.fromkeys((self._layout, torch.contiguous_format)):
            before, self._layout = self._layout, layout
            try:
                returned = self._attempt(*self.arguments(self._blank(channels, size)))
                if _kept(returned):
                    return True
                self._first_failure = self._first_failure or _not_kept(returned)
            except BeyondLimits:  # at another size, too
                raise
            except Exception as error:  # whatever the user's code raises
                self._first_failure = self._first_failure or error
            self._layout = before
        return False

    def _blank(self, channels: int, size: tuple[int, int], device: torch.device | str | None = None) -> torch.Tensor:
        return torch.zeros((1, *size, channels), device=device or self._device)

    # the other inputs ------------------------------------------------------------------------------

    def _fed(self, name: str, feed: Mapping[str, Feed]) -> dict[str, Feed]:
        others = [other for other in self.names if other != name]
        missing = [other for other in others if other not in feed and other not in self._shapes]
        if missing:
            raise UsageError(
                f"the model takes {', '.join(self.names)}; the image goes to {name!r}, and what {missing[0]!r} "
                f"takes is not known. Give an array or an image of the name {missing[0]!r} with {option('feed')}, or "
                f"choose the input of the image with {option('open_model.input')}.",
                code="feed-missing",
                name=missing[0],
            )
        return fed_values(others, self._shapes, feed, self._whole)

    def _repeated(self, name: str, x: torch.Tensor) -> torch.Tensor:
        value = self._others[name]
        if isinstance(value, InputImage):
            made = self._image(name, value, x)
            return made.expand(len(x), *made.shape[1:]).clone()
        tensor = torch.as_tensor(value, device=self._device)
        tensor = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
        return (tensor if name in self._whole else tensor.expand(len(x), *tensor.shape[1:])).clone()

    def _image(self, name: str, image: InputImage, x: torch.Tensor) -> torch.Tensor:
        """A fed image, of the size of its input, or of the images `x` `(n, h, w, c)` where that is not known."""
        channels, height, width = _of(self._shapes.get(name), self._channels_last)
        shape = (height or x.shape[1], width or x.shape[2], channels or x.shape[3])
        if (name, shape) not in self._prepared:
            pixels = prepared(image, shape, self._preprocessing)
            self._prepared[name, shape] = torch.as_tensor(pixels, device=self._device)
        return self._laid_out(self._prepared[name, shape])


def _kept(returned: object) -> bool:
    """True if one image gave outputs for one image: a fixed size behind a `view` may give more, or fewer.

    Single numbers beside them, such as a loss, say nothing of that.
    """
    tensors = [tensor for _, tensor in flat_outputs(returned) if tensor.dim()]
    return bool(tensors) and tensors[0].shape[0] == 1


def _not_kept(returned: object) -> str:
    shapes = [str(tuple(tensor.shape)) for _, tensor in flat_outputs(returned)]
    return f"it returned {' and '.join(shapes[:4])} for one image" if shapes else "it returned no tensor"


def _input_names(module: nn.Module, wanted: Sequence[str | None]) -> list[str]:
    """The names of the arguments: those that are needed, and those up to the last one that the user names."""
    names = getattr(module, "input_names", None)
    if names:
        return list(names)
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return ["input"]
    by_place = [item for item in parameters if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)]
    needed = [number for number, item in enumerate(by_place) if item.default is item.empty or item.name in wanted]
    count = max(needed, default=0) + 1
    return [item.name for item in by_place[:count]] or ["input"]


def _of(declared: Sequence[int | None] | None, channels_last: bool) -> tuple[int | None, int | None, int | None]:
    """Channels, height and width of a declared shape."""
    if declared is None:
        return None, None, None
    _, *rest = declared
    height, width, channels = rest if channels_last else (rest[1], rest[2], rest[0])
    return channels, height, width


def _likely_channels(module: nn.Module) -> list[int]:
    """Possible numbers of channels, the likeliest first: those of the first convolution, then RGB, grey."""
    weights = [(child, getattr(child, "weight", None)) for child in named_modules(module)]
    first = [
        int(getattr(child, "in_channels", weight.shape[1]))
        for child, weight in weights
        if isinstance(weight, torch.Tensor) and weight.dim() == 4
    ]
    loose = [parameter.shape[1] for parameter in module.parameters() if parameter.dim() == 4]
    return list(dict.fromkeys([*first[:1], *loose[:1], 3, 1]))
