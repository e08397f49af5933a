"""The parameters of each technique: a frozen dataclass for each, whose fields are the state that the package reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass

from convscope.schema import Json


@dataclass(frozen=True)
class Parameters:
    """The arguments that changed a result; a default stands for a value that an older result lacks.

    Example:
        >>> convscope.heatmap(network, PHOTOS[0]).parameters.to_json()["layer"]
        'block4_conv'
    """

    def to_json(self) -> dict[str, Json]:
        """The fields as plain JSON values, for the provenance."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}


def _plain(value: object) -> Json:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return value


@dataclass(frozen=True)
class ActivationParameters(Parameters):
    """The arguments of `activations`.

    Attributes:
        layers: paths, in the order of execution.
        memory: the limit of memory, in bytes or as text such as "2GB".

    Example:
        >>> convscope.activations(network, PHOTOS[0], "block4_conv").parameters
        ActivationParameters(layers=('block4_conv',), memory='2GB')
    """

    layers: tuple[str, ...] = ()
    memory: int | str = ""


@dataclass(frozen=True)
class RecipeParameters:
    """The recipe of filters.

    Attributes:
        name, steps: of the recipe.
        details: the whole recipe as plain JSON values; written and never read.

    Example:
        >>> convscope.filters(network, "block4_conv", [7], steps=2, size=32).parameters.recipe.steps
        2
    """

    name: str
    steps: int
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class FilterParameters(Parameters):
    """The arguments of `filters`.

    Attributes:
        layer: path of the first layer of the objectives.
        channels: numbers; None for objectives that are not channels of one layer.
        recipe: None where it is not known.
        size: height and width in pixels.
        seed: random seed; None where it is not known.
        seeds: number of random seeds whose results were compared.
        variants: number of images of each objective.
        batch: number of filters that were optimized side by side.
        precision: of the optimization, "float32" or "bfloat16".
        frames: number of intermediate images that were asked for.
        frame_steps: the step of each intermediate image that was kept; None where it is not known.
        interrupted: True if Ctrl-C came before the last filter was finished.
        note: a remark about the size, or "".

    Example:
        >>> FilterParameters(channels=(0, 7)).to_json()["channels"]
        [0, 7]
    """

    layer: str = ""
    channels: tuple[int, ...] | None = None
    recipe: RecipeParameters | None = None
    size: tuple[int, ...] = ()
    seed: int | None = None
    seeds: int = 1
    variants: int = 1
    batch: int = 0
    precision: str = "float32"
    frames: int = 0
    frame_steps: tuple[int, ...] | None = None
    interrupted: bool = False
    note: str = ""

    def to_json(self) -> dict[str, Json]:
        """See `Parameters.to_json`; the recipe with its details."""
        recipe = self.recipe and {**self.recipe.details, "name": self.recipe.name, "steps": self.recipe.steps}
        return {**super().to_json(), "recipe": recipe}


@dataclass(frozen=True)
class MethodParameters:
    """A heatmap method.

    Attributes:
        name: of the method.
        options: the value of each of its options.

    Example:
        >>> MethodParameters("rise", {"masks": 20}).options["masks"]
        20
    """

    name: str
    options: Mapping[str, int | float | bool | str | None] = field(default_factory=dict)


LAYER_CHOICES = ("given", "auto", "best", "none", "")
AGAINST_CHOICES = ("given", "pair", "none", "")


@dataclass(frozen=True)
class HeatmapParameters(Parameters):
    """The arguments of `heatmap`.

    Attributes:
        layer: path of the layer; several are separated by ", "; "" where the methods need none.
        layer_choice: how the layer was chosen: "given", "auto", "best" (by measuring several), "none", or "" where it
            is not known.
        layer_rule: the same in words, with the measurements.
        method: name of the method; several are separated by ", ".
        methods: the same with their options.
        left_out: the methods of "all" that do not fit the network, each with the reason.
        explained: the number that was explained, in words.
        against_choice: how the class whose score was subtracted was chosen: "given", "pair" (the other of two classes
            under one softmax, where none was given), "none", or "" where it is not known.
        output: name of the network's output.
        smooth: whether maps of moved and mirrored images were averaged.
        check: whether the faithfulness of the maps was measured.
        batch: number of images at a time.
        budget: number of passes that a sampling method could use; None for the method's own.
        precision: of the passes of sampling methods.
        seed: random seed; None where it is not known.

    Example:
        >>> found = convscope.heatmap(network, PHOTOS[0]).parameters
        >>> found.layer, found.layer_choice, found.method
        ('block4_conv', 'auto', 'grad-cam')
    """

    layer: str = ""
    layer_choice: str = ""
    layer_rule: str = ""
    method: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    explained: str = ""
    output: str = ""
    smooth: bool = False
    check: bool = False
    batch: int = 0
    budget: int | None = None
    precision: str = "float32"
    seed: int | None = None
    methods: tuple[MethodParameters, ...] = ()
    against_choice: str = ""


@dataclass(frozen=True)
class ConceptParameters(Parameters):
    """The arguments of `concepts`.

    Attributes:
        layer: path of the layer.
        count: number of concepts.
        batch: number of images at a time.
        sweeps: number of updates of the factorization.

    Example:
        >>> convscope.concepts(network, PHOTOS[0], count=2).parameters.count
        2
    """

    layer: str = ""
    count: int = 0
    batch: int = 0
    sweeps: int = 0
