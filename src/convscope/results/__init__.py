"""What the techniques return: frozen results that hold raw values and provenance, and draw themselves.

The notebook, the report and the files are made by the same methods, so they can't disagree.
"""

from __future__ import annotations

import html
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np

from convscope import imaging, limits, saved, schema
from convscope.errors import ConvscopeError, UsageError, nearest
from convscope.events import Advanced, Progress, tell
from convscope.images.decode import InputImage
from convscope.networks import Layer, Prediction
from convscope.networks.layers import find_layer
from convscope.networks.preprocessing import FOUND, GUESS, SET, Preprocessing
from convscope.results.base import Origin, array_sha256, origin, versions, without_pixels
from convscope.results.parameters import (
    ACTIVATION_PARAMETERS,
    CONCEPT_PARAMETERS,
    FILTER_PARAMETERS,
    HEATMAP_PARAMETERS,
    ActivationParameters,
    ConceptParameters,
    FilterParameters,
    HeatmapParameters,
    Parameters,
    RecipeParameters,
)
from convscope.saved import PHOTO, PROVENANCE, Shelf, check

__all__ = [
    "ActivationParameters",
    "Activations",
    "Check",
    "Concept",
    "ConceptParameters",
    "Concepts",
    "FilterParameters",
    "FilterRow",
    "Filters",
    "Folder",
    "Heatmap",
    "HeatmapParameters",
    "HeatmapRow",
    "LayerStatistics",
    "Origin",
    "Parameters",
    "RecipeParameters",
    "Result",
    "array_sha256",
    "dump",
    "found",
    "load",
    "origin",
    "versions",
]

CLASSIC_GAP = 5


class Folder:
    """A folder that results are written to; within a run nothing in it is overwritten.

    Each file is written whole or not at all, and the JSON that names the others comes last. The JSON of an earlier
    result is removed before the first of its files is replaced: it would name files of two results.

    Args:
        path: made when the first file is written.
    """

    def __init__(self, path: str | PathLike) -> None:
        self.path = Path(path)
        self.files: list[str] = []
        self._taken: set[str] = set()
        self._outdated: list[Path] = []

    def begin(self, name: str) -> int:
        """A result begins, whose JSON will be called `name`; returns how many files there are before it."""
        self._outdated = [self.path / self._next(name)]
        return len(self.files)

    def write(self, name: str, data: bytes | str) -> str:
        """Write `data` under the relative name `name`, with a suffix if it is taken; returns the name used."""
        return self._write(name, data)

    def picture(self, name: str, picture: np.ndarray) -> str:
        """Write a picture (h, w, 3) uint8 as PNG."""
        return self.write(name, imaging.encode_png(picture))

    def array(self, name: str, array: np.ndarray) -> str:
        """Write an array as NumPy's `.npy`."""
        # Straight to the disk: an array that is memory-mapped need not fit into memory.
        return self._write(name, lambda file: _write_array(file, np.asarray(array)))

    def json(self, name: str, report: Mapping[str, Any], since: int = 0) -> list[str]:
        """Write `report` with the files written since there were `since` of them, itself included; returns these."""
        free = self._free(name)
        self.files.append(free)
        imaging.write_file(self.path / free, dump({**report, "files": self.files[since:]}))
        self._outdated = []
        return self.files[since:]

    def _write(self, name: str, data: Any) -> str:
        free = self._free(name)
        imaging.write_file(self.path / free, data, self._before(self.path / free))
        self.files.append(free)
        return free

    def _before(self, path: Path) -> Callable[[], None]:
        def before() -> None:
            if path.exists():
                while self._outdated:
                    self._outdated.pop().unlink(missing_ok=True)

        return before

    def _free(self, name: str) -> str:
        free = self._next(name)
        self._taken.add(free.casefold())
        return free

    def _next(self, name: str) -> str:
        folder, _, file = name.rpartition("/")
        stem, dot, suffix = file.rpartition(".")
        free, again = name, 1
        # File systems that fold case would let "A.png" overwrite "a.png".
        while free.casefold() in self._taken:
            again += 1
            free = f"{folder}{'/' if folder else ''}{stem}-{again}{dot}{suffix}"
        return free


class _Sink:
    """A file that NumPy takes for none, and so writes in pieces with `write`, which says why the disk refuses one."""

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    np.lib.format.write_array(_Sink(file), array, allow_pickle=False)


def dump(data: Any) -> str:
    """JSON as convscope writes it: indented, NaN and infinity as null, NumPy numbers as numbers."""
    text = json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # The name of a file may hold bytes that are no text; JSON's own escapes carry them.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, np.ndarray):
        return _plain(data.tolist())
    if isinstance(data, np.integer | np.bool_):
        return data.item()
    if isinstance(data, float | np.floating):
        return float(data) if np.isfinite(data) else None
    return data


def _save_photos(folder: Folder, photos: Sequence[InputImage]) -> list[dict[str, Any]]:
    files: dict[int, str] = {}  # a photo that is there several times is written once
    for photo in photos:
        if id(photo) not in files:
            files[id(photo)] = folder.picture(f"photos/{imaging.safe_name(photo.name)}.png", photo.pixels)
    return [{**without_pixels(photo), "file": files[id(photo)]} for photo in photos]


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What all results share: pictures by name, JSON, and a face in a notebook."""

    origin: Origin = field(default_factory=Origin)
    parameters: Parameters = field(default_factory=Parameters)
    file: ClassVar[str] = ""

    @property
    def provenance(self) -> dict[str, Any]:
        """What is needed to make the result again, as plain JSON values: made to be written, and never read."""
        return self.origin.provenance(self.parameters.to_json())

    def described(self) -> dict[str, Any]:
        """The parameters of the provenance."""
        return {**self.origin.details, **self.parameters.to_json()}

    @classmethod
    def load(cls, path: str | PathLike) -> Self:
        """A saved result of this kind; arguments and errors as in `load` below."""
        return load(path, cls.file.removesuffix(".json"))  # type: ignore[return-value]

    @classmethod
    def read(cls, report: Mapping[str, Any], shelf: Shelf) -> Result:
        """The result that `save` wrote as `report`, with the files beside it.

        Raises:
            Misfit: an entry or a file is not what `save` writes.
        """
        raise NotImplementedError

    def pictures(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every picture of the result: its relative file name without suffix, and (h, w, 3) uint8."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The numbers and the provenance, as the JSON file beside the pictures holds them."""
        raise NotImplementedError

    def save(self, directory: str | PathLike | Folder) -> list[str]:
        """Write pictures, raw values and the JSON beside them; returns the files' names in the folder."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.origin.network}>"

    def _repr_html_(self) -> str:
        return f"<div>{''.join(_img(picture, name) for name, picture in self.pictures())}</div>"


def _img(picture: np.ndarray, text: str) -> str:
    """A picture inside a page, with its text for those who can't see it."""
    source = imaging.data_uri(imaging.encode_png(picture), "image/png")
    return f'<img src="{source}" alt="{html.escape(text, quote=True)}" style="max-width: 100%">'


def _folder(directory: str | PathLike | Folder) -> Folder:
    return directory if isinstance(directory, Folder) else Folder(directory)


# -- activations -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer made of one picture, in numbers.

    Attributes:
        image, layer: whose.
        kind: of the layer.
        shape: `(h, w, c)` or `(c,)`.
        mean, max: of the raw activation.
        zeros: share of exact zeros, 0..1, counted after the non-linearity at `counted_at`; None where there is none.
        empty_channels: number of channels that are zero everywhere there; None where there is no non-linearity.
        counted_at: path of the layer after which the zeros were counted.
    """

    image: str
    layer: str
    kind: str
    shape: tuple[int, ...]
    mean: float
    max: float
    zeros: float | None
    empty_channels: int | None
    counted_at: str | None

    @property
    def cells(self) -> list[str]:
        """Image, layer, shape, max, zeros and empty channels as text for a table."""
        zeros = "n/a" if self.zeros is None else f"{100 * self.zeros:.0f} %"
        empty = "n/a" if self.empty_channels is None else str(self.empty_channels)
        return [self.image, self.layer, "×".join(map(str, self.shape)), f"{self.max:.3g}", zeros, empty]


@dataclass(frozen=True, eq=False, repr=False)
class Activations(Result):
    """What every chosen layer made of every picture.

    Attributes:
        photos: the pictures that went in.
        layers: in the order of execution.
        arrays: for each path the raw values `(n, h, w, c)` or `(n, c)`, float32, perhaps memory-mapped.
        statistics: a row for each picture and layer.
    """

    parameters: ActivationParameters = field(default_factory=ActivationParameters)
    photos: tuple[InputImage, ...] = ()
    layers: tuple[Layer, ...] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    statistics: tuple[LayerStatistics, ...] = ()
    scratch: tempfile.TemporaryDirectory | None = None  # kept while memory-mapped arrays live in it
    file: ClassVar[str] = "activations.json"

    def __getitem__(self, layer: str) -> np.ndarray:
        """The raw values of one layer: `(n, h, w, c)` or `(n, c)`.

        Raises:
            UsageError: it was not looked at, or there is no such layer.
        """
        return self.arrays[self._layer(layer).path]

    def channel(self, layer: str, channel: int, picture: int = 0) -> np.ndarray:
        """One channel's map `(h, w)`, raw.

        Raises:
            UsageError: no such layer or channel, or the layer has no map.
        """
        values = self[layer][picture]
        if values.ndim != 3:
            raise UsageError(f"layer {layer!r} has no map to show; its output has the shape {values.shape}.")
        if not 0 <= channel < values.shape[-1]:
            count = values.shape[-1]
            raise UsageError(
                f"channel {channel} is out of range: layer {layer!r} has {count} channels, numbered 0 to {count - 1}."
            )
        return values[..., channel]

    def channel_picture(self, layer: str, channel: int, picture: int = 0) -> np.ndarray:
        """One channel's map in colour, lowest to highest value, enlarged, with its colour bar: (h, w, 3) uint8."""
        values = self.channel(layer, channel, picture)
        levels = imaging.shared_tiles(values[..., None])[..., 0]
        scale = max(1, 320 // max(levels.shape))
        drawn = imaging.colour(np.kron(levels, np.ones((scale, scale), np.uint8)))
        low = min(float(values.min()), 0.0)
        bar = imaging.colour_bar(len(drawn), f"{low:.3g}", f"{values.max():.3g}")
        return imaging.page(imaging.beside([drawn, bar]), f"{layer} · channel {channel}", self.photos[picture].name)

    def sheet(self, layer: str, picture: int = 0, shared: bool = False) -> np.ndarray:
        """All channels of one layer beside the photo (FIELD.md §1's look; `shared` for one scale): (h, w, 3) uint8."""
        path = self._layer(layer).path
        if not _drawable(self._layer(path)):
            raise UsageError(f"layer {path!r} has no maps to draw; its output has the shape {self._layer(path).shape}.")
        row = self.row(path, picture)
        return imaging.activation_sheet(
            np.asarray(self.arrays[path][picture]), self.photos[picture].pixels, path, _caption(row), shared
        )

    def row(self, layer: str, picture: int = 0) -> LayerStatistics:
        """The numbers of one layer and picture."""
        return self.statistics[picture * len(self.layers) + self.layers.index(self._layer(layer))]

    def pictures(self) -> Iterator[tuple[str, np.ndarray]]:
        """The sheets of every layer that has maps or units."""
        for index, photo in enumerate(self.photos):
            for layer in filter(_drawable, self.layers):
                yield f"{imaging.safe_name(photo.name)}/{imaging.safe_name(layer.path)}", self.sheet(layer.path, index)

    def _repr_html_(self) -> str:
        """The numbers as a table, and the first picture's sheets of a few layers over the depth."""
        head = "".join(f"<th>{name}" for name in ("image", "layer", "shape", "max", "zeros", "empty channels"))
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}' for cell in row.cells)}" for row in self.statistics)
        step = -(-len(self.layers) // 6)
        shown = [layer for layer in self.layers[::step] if _drawable(layer)]
        sheets = "".join(_img(self.sheet(layer.path), f"channels of {layer.path}") for layer in shown)
        return f"<div><table><tr>{head}{rows}</table>{sheets}</div>"

    def plot(self, ax: Any = None, picture: int = 0) -> Any:
        """Share of zeros and of empty channels over depth, as one plot; returns the matplotlib axes."""
        rows = [row for row in self._rows(picture) if row.zeros is not None]
        ax = ax or _axes(7.5, 3.6)
        places = range(len(rows))
        empty = [100 * (row.empty_channels or 0) / row.shape[-1] for row in rows]
        ax.plot(places, [100 * (row.zeros or 0) for row in rows], "o-", color="#2c6fbb", label="zeros")
        ax.bar(places, empty, width=0.6, color="#e08a1e", alpha=0.75, label="empty channels")
        names = [row.layer.rpartition("/")[2] for row in rows]
        step = -(-len(rows) // 24) or 1
        ax.set_xticks(list(places)[::step], names[::step], rotation=60, ha="right", fontsize=8, parse_math=False)
        ax.set_ylim(0, 100)
        ax.set_ylabel("% of the layer")
        _entitle(ax, f"What stays silent, by depth · {self.photos[picture].name}")
        ax.grid(axis="y", alpha=0.3)
        ax.legend(frameon=False)
        return ax

    def to_json(self) -> dict[str, Any]:
        """See `Result.to_json`."""
        return {"activations": [asdict(row) for row in self.statistics], "provenance": self.provenance}

    def save(
        self,
        directory: str | PathLike | Folder,
        *,
        shared: bool = False,
        channel: int | None = None,
        raw: bool = True,
        progress: Progress = None,
    ) -> list[str]:
        """Write the sheets (or one channel of each layer), the plots over depth, the numbers and the raw arrays.

        Args:
            directory: where to.
            shared: draw each sheet on one scale.
            channel: draw this channel instead of the sheets.
            raw: write `arrays/LAYER.npy` and the photos too, which `load` needs.
            progress: called with an event after each picture.
        """
        folder = _folder(directory)
        report, since = self.to_json(), folder.begin(self.file)
        drawn = 0
        for index, photo in enumerate(self.photos):
            stem = imaging.safe_name(photo.name)
            for layer in self.layers:
                entry = report["activations"][drawn]
                entry["file"] = self._write(
                    folder, f"{stem}/{imaging.safe_name(layer.path)}", layer, index, shared, channel
                )
                drawn += 1
                tell(progress, Advanced(drawn, len(report["activations"]), f"drawing {layer.path}"))
            folder.write(f"{stem}/depth.png", _png(lambda ax, index=index: self.plot(ax, index), 7.5, 3.6))
        if raw:
            report["arrays"] = {
                la.path: folder.array(f"arrays/{imaging.safe_name(la.path)}.npy", self.arrays[la.path])
                for la in self.layers
            }
            report["layers"] = [asdict(layer) for layer in self.layers]
            report["photos"] = _save_photos(folder, self.photos)
        return folder.json(self.file, report, since)

    @classmethod
    def read(cls, report: Mapping[str, Any], shelf: Shelf) -> Activations:
        """See `Result.read`; the arrays are memory-mapped."""
        if "arrays" not in report:
            raise ConvscopeError(
                f"{str(shelf.root)!r} holds pictures and numbers but no raw arrays; save with raw=True (--raw)."
            )
        shape = schema.sequence(schema.whole(0), 1, 8)
        known = schema.entries({
            "activations": schema.sequence(
                schema.record(LayerStatistics, shape=shape, empty_channels=schema.optional(schema.whole(0)))
            ),
            "arrays": schema.mapping(schema.text),
            "layers": schema.sequence(schema.record(Layer, shape=shape, parameters=schema.whole(0, 2**62)), 1),
            **_WITH_PHOTOS,
        })(report, "")  # fmt: skip
        layers, photos, rows = known["layers"], known["photos"], known["activations"]
        wanted = [(photo["name"], layer.path) for photo in photos for layer in layers]
        check(
            [(row.image, row.layer) for row in rows] == wanted,
            "activations",
            f"a row for each of {len(photos)} photos and {len(layers)} layers, in their order",
            f"{len(rows)} others",
        )
        check(known["arrays"].keys() == {la.path for la in layers}, "arrays", "an array for each layer", "others")
        arrays = {}
        for layer in layers:
            where = f"arrays.{layer.path}"
            array = shelf.array(known["arrays"][layer.path], where, "arrays", mapped=True)
            check_shape(array, (len(photos), *layer.shape), where)
            arrays[layer.path] = array
        return cls(
            *_read_made(report["provenance"], ACTIVATION_PARAMETERS),
            photos=shelf.photos(photos, report["provenance"]),
            layers=layers,
            arrays=arrays,
            statistics=rows,
        )

    def _write(
        self, folder: Folder, name: str, layer: Layer, index: int, shared: bool, channel: int | None
    ) -> str | None:
        if not _drawable(layer):
            return None  # its numbers are there
        if channel is None:
            return folder.picture(f"{name}.png", self.sheet(layer.path, index, shared))
        if not layer.spatial or channel >= layer.channels:
            return None  # said by the command that asked
        return folder.picture(f"{name}.channel-{channel}.png", self.channel_picture(layer.path, channel, index))

    def _rows(self, picture: int) -> Sequence[LayerStatistics]:
        return self.statistics[picture * len(self.layers) : (picture + 1) * len(self.layers)]

    def _layer(self, path: str) -> Layer:
        try:
            return find_layer(self.layers, path)
        except UsageError as error:
            raise UsageError(
                f"{error} These are the {len(self.layers)} layers that were looked at; ask for others with layers=."
            ) from None


def _drawable(layer: Layer) -> bool:
    """Maps `(h, w, c)` or units `(c,)`: not the sequences of a transformer."""
    return len(layer.shape) in (1, 3)


def _caption(row: LayerStatistics) -> str:
    size = "x".join(map(str, row.shape))  # the font of pictures has no multiplication sign
    if row.zeros is None:
        return f"{size} · max {row.max:.3g} · no non-linearity, so zeros do not apply"
    where = "" if row.counted_at == row.layer else f" after {row.counted_at}"
    empty = f"{row.empty_channels} of {row.shape[-1]} channels empty"
    return f"{size} · max {row.max:.3g} · {100 * row.zeros:.0f} % zeros · {empty}{where}"


def _axes(width: float, height: float) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _entitle(ax: Any, text: str) -> None:
    # A name may hold dollar signs, between which matplotlib would look for formulas.
    ax.set_title(text, fontsize=11, parse_math=False)


def _png(draw: Any, width: float, height: float) -> bytes:
    """A plot as PNG, without pyplot's global state or a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    buffer = io.BytesIO()
    # Without these the file would hold the version and so differ between machines.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # boxes in a title say it well enough
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


# -- filters ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilterRow:
    """One filter in numbers.

    Attributes:
        channel: its number; None for an objective that is not one channel.
        activation: the objective of the final picture.
        activations: the objective before each step.
        status: "alive", "weak" or "dead".
        reason: why that status.
        threshold: what the activation had to exceed to be alive.
        name: the objective's text, such as "class tabby"; the channel's number stands for it where it is empty.
        transformed: mean activation of the final picture under fresh transforms; NaN where that was not measured.
        natural: the highest activation among the user's photos; None without photos.
        natural_photo: the name of that photo.
        agreement: of the pictures from several seeds, -1..1; None where one seed was used.
        variant: which of several pictures of one objective.
        tries: starts that were tried.
        steps: updates that the picture took; 0 where that is not known.
        begun: the name of the photo that the picture was begun with, where noise did not move the filter; else empty.
    """

    channel: int | None
    activation: float
    activations: tuple[float, ...]
    status: str
    reason: str
    threshold: float
    name: str = ""
    transformed: float = float("nan")
    natural: float | None = None
    natural_photo: str = ""
    agreement: float | None = None
    variant: int = 0
    tries: int = 1
    steps: int = 0
    begun: str = ""

    @property
    def ratio(self) -> float | None:
        """The activation divided by the best natural one; None without photos, or where none excites the filter."""
        return self.activation / self.natural if self.natural is not None and self.natural > 0 else None

    @property
    def holds(self) -> float | None:
        """Share of the activation that survives fresh transforms; None where it is not positive or not measured."""
        share = self.transformed / self.activation if self.activation > 0 else float("nan")
        return share if np.isfinite(share) else None

    @property
    def compared(self) -> str:
        """ "x0.83 natural" where there are photos, else "x12 noise": the activation beside what it can be held to."""
        if self.natural is not None:
            return "photos silent" if self.ratio is None else f"x{_times(self.ratio)} natural"
        return f"x{_times(self.activation / self.threshold)} noise" if self.threshold > 0 else "noise silent"

    @property
    def belief(self) -> float:
        """What filters of one status are sorted by: `ratio`, or without photos how many times noise is exceeded."""
        reference = self.threshold if self.natural is None else self.natural
        if not np.isfinite(self.activation):
            return -np.inf
        if reference > 0:
            return self.activation / reference
        return np.inf if self.activation > 0 else -np.inf


STATUSES = ("alive", "weak", "dead")
SORTS: dict[str, Any] = {
    "status": lambda row: (STATUSES.index(row.status), -row.belief),
    "ratio": lambda row: -row.belief,
    "activation": lambda row: -row.activation if np.isfinite(row.activation) else np.inf,
    "holds": lambda row: np.inf if row.holds is None else -row.holds,
    "channel": lambda row: 0,
}


@dataclass(frozen=True, eq=False, repr=False)
class Filters(Result):
    """For each filter of a layer the picture that excites it.

    Attributes:
        layer: whose filters; None for objectives that are not channels of one layer.
        values: final canvases `(n, h, w, c)` float32, in the range that the network takes.
        rows: the numbers, one for each filter.
        preprocessing: what turns the canvases back into pixels.
        crop: pixels left out on each side of a picture.
        look: "classic" (contrast brought to 0.15 around grey), "plain" (the picture as it is) or "clipped" (stretched
            to the full range, but for 1 % of the values at each end).
        alpha: transparency `(n, h, w)` float32 in 0..1, where the recipe finds it.
        frames: canvases on the way `(n, f, h, w, c)` float32, where they were asked for.
    """

    parameters: FilterParameters = field(default_factory=FilterParameters)
    layer: Layer | None = None
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.float32))
    rows: tuple[FilterRow, ...] = ()
    preprocessing: Preprocessing = field(default_factory=lambda: Preprocessing("none"))
    crop: int = 0
    look: str = "classic"
    alpha: np.ndarray | None = None
    frames: np.ndarray | None = None
    file: ClassVar[str] = "filters.json"

    def name(self, index: int) -> str:
        """What the `index`-th filter is called: "17", its second picture "17-1", an objective by its text."""
        row = self.rows[index]
        named = row.name and (self.layer is None or row.channel is None)
        return (row.name if named else str(row.channel)) + (f"-{row.variant}" if row.variant else "")

    def picture(self, index: int) -> np.ndarray:
        """The picture of the `index`-th filter, or a tile that says why there is none: (h, w, 3) uint8."""
        if self.rows[index].status == "dead":
            height, width = (side - 2 * self.crop for side in self.values.shape[1:3])
            return imaging.words_tile(height, width, f"{self.name(index)} {_epitaph(self.rows[index])}")
        return self._drawn(self.values[index])

    def cutout(self, index: int) -> np.ndarray:
        """The picture with its transparency: (h, w, 4) uint8.

        Raises:
            UsageError: the recipe finds none.
        """
        if self.alpha is None:
            raise UsageError("these filters have no transparency; choose a recipe that finds it, such as maco.")
        clear = imaging.plain_picture(255 * self._cropped(self.alpha[index])[..., None])
        return np.dstack([self._drawn(self.values[index]), clear])

    def order(self, by: str = "status") -> list[int]:
        """The filters' places in `rows`, sorted; ties by channel, then as they were asked for.

        Args:
            by: "status" (alive, weak, dead, and among these by "ratio"), "ratio" (to the best natural activation, or
                without photos to noise), "activation", "holds", "channel", or "given" (as they were asked for). The
                highest come first.

        Raises:
            UsageError: another word.
        """
        if by == "given":
            return list(range(len(self.rows)))
        if by not in SORTS:
            raise UsageError(f"filters can't be sorted by {by!r}; {nearest(by, [*SORTS, 'given'])}")

        def key(index: int) -> tuple:
            row = self.rows[index]
            return SORTS[by](row), np.inf if row.channel is None else row.channel, row.variant

        return sorted(range(len(self.rows)), key=key)

    def sheet(self, columns: int | None = None, labels: bool | None = None, sort: str | None = None) -> np.ndarray:
        """All pictures in one: (H, W, 3) uint8.

        The classic look has the classic sheet: as asked for, 5 black pixels between the tiles, and no text. Any other
        is sorted, with the numbers under each tile, and what is weak or dead has a flag.

        Args:
            columns: tiles in a row; 8 for up to 64 filters.
            labels, sort: instead of the look's own; `sort` as `order` takes it.

        Raises:
            UsageError: no such order, less than one column, or no filter.
        """
        classic = self.look == "classic"
        order = self.order(sort or ("given" if classic else "status"))
        if classic if labels is None else not labels:
            tiles = [self.picture(index) for index in order]
            if not classic:
                tiles = [imaging.sized_tile(tile, 1, imaging.tile_side(len(tiles))) for tile in tiles]
            return imaging.grid(tiles, columns or (8 if len(tiles) <= 64 else 16), CLASSIC_GAP)
        body = imaging.labelled_grid(self._tiles(order), [self._label(index) for index in order], columns)
        where = f"{self._where} · {self.origin.network}"
        return imaging.page(body, where, self._how, self.summary, self._legend)

    def course(self, index: int | None = None, kind: str = "webp") -> bytes:
        """A film of the ascent, of one filter or of the sheet: the bytes of an animated WebP or GIF file.

        Args:
            index: of the filter; all of them, sorted, where None.
            kind: "webp" or "gif".

        Raises:
            UsageError: no frames were kept, or another kind.
        """
        if self.frames is None or not self.frames.shape[1]:
            raise UsageError("no pictures on the way were kept; ask for them with frames=N (--frames N).")
        chosen = self.order() if index is None else [index]
        tiles, film = [self._film(index, len(chosen)) for index in chosen], []
        for number, text in enumerate(self._moments()):
            body = imaging.grid([tile[number] for tile in tiles], 8 if len(tiles) <= 64 else 16, 2, 255)
            film.append(np.vstack([imaging.text_strip(text, body.shape[1], 13), body]))
        return imaging.animation(film, kind)

    @property
    def summary(self) -> str:
        """ "58 alive, 4 weak, 2 dead; median 0.91 of the best natural activation"."""
        counts = [f"{sum(row.status == status for row in self.rows)} {status}" for status in STATUSES]
        ratios = [row.ratio for row in self.rows if row.ratio is not None and np.isfinite(row.ratio)]
        median = f"; median {_times(float(np.median(ratios)))} of the best natural activation" if ratios else ""
        return ", ".join(counts) + median

    def pictures(self) -> Iterator[tuple[str, np.ndarray]]:
        """The sheet, then each filter's picture."""
        yield "sheet", self.sheet()
        for index in range(len(self.rows)):
            yield imaging.safe_name(self.name(index)), self.picture(index)

    def plot(self, ax: Any = None) -> Any:
        """A line for each filter, its activation at each step as the ascent saw it, and a dot for the final one.

        Returns:
            the matplotlib axes; new ones where `ax` is None.
        """
        ax = ax or _axes(7, 4)
        colours = {"alive": "#2c6fbb", "weak": "#e08a1e", "dead": "#999999"}
        for row in self.rows:
            ax.plot(row.activations, color=colours[row.status], alpha=0.6, linewidth=1)
            ax.plot(len(row.activations), row.activation, ".", color=colours[row.status], alpha=0.6, markersize=3)
        ax.set_xlabel("step (dots: the finished picture as it is, not moved)")
        ax.set_ylabel("activation")
        _entitle(ax, f"{self._where} · {self.summary}")
        ax.grid(alpha=0.3)
        return ax

    def _repr_html_(self) -> str:
        return _img(self.sheet(labels=True), f"{self._where}: {self.summary}")

    def to_json(self) -> dict[str, Any]:
        """See `Result.to_json`."""
        rows = [{**asdict(row), "ratio": row.ratio, "holds": row.holds} for row in self.rows]
        return {"filters": rows, "provenance": self.provenance}

    def save(
        self,
        directory: str | PathLike | Folder,
        *,
        labels: bool | None = None,
        sort: str | None = None,
        columns: int | None = None,
        gif: bool = False,
    ) -> list[str]:
        """Write the sheet, single pictures, the plot of activations, the film, the raw arrays and the numbers.

        Args:
            directory: where to.
            labels, sort, columns: of the sheet.
            gif: write the film as GIF too, for programs that show no WebP.
        """
        folder = _folder(directory)
        report, since = self.to_json(), folder.begin(self.file)
        report["sheet"] = folder.picture("sheet.png", self.sheet(columns, labels, sort))
        for index, entry in enumerate(report["filters"]):
            stem = imaging.safe_name(self.name(index))
            entry["file"] = folder.picture(f"{stem}.png", self.picture(index))
            if self.alpha is not None and self.rows[index].status != "dead":
                entry["cutout"] = folder.picture(f"{stem}.cutout.png", self.cutout(index))
        report["plot"] = folder.write("activations.png", _png(self.plot, 7, 4))
        if self.frames is not None and self.frames.shape[1]:
            kinds = ("webp", "gif") if gif else ("webp",)
            report["course"] = [folder.write(f"course.{kind}", self.course(kind=kind)) for kind in kinds]
        for name, array in (("raw", self.values), ("alpha", self.alpha), ("frames", self.frames)):
            if array is not None:
                report[name] = folder.array("filters.npy" if name == "raw" else f"{name}.npy", array)
        report["layer"] = asdict(self.layer) if self.layer else None
        report["preprocessing"], report["crop"], report["look"] = asdict(self.preprocessing), self.crop, self.look
        return folder.json(self.file, report, since)

    @classmethod
    def read(cls, report: Mapping[str, Any], shelf: Shelf) -> Filters:
        """See `Result.read`."""
        shape = schema.sequence(schema.whole(1), 1, 8)
        known = schema.entries(
            {
                "filters": schema.sequence(_FILTER_ROW, 1),
                "provenance": PROVENANCE,
                "raw": schema.text,
                "layer": schema.optional(schema.record(Layer, shape=shape, parameters=schema.whole(0, 2**62))),
                "preprocessing": _PREPROCESSING,
                "crop": schema.whole(0),
            },
            {"look": schema.one_of("classic", "plain", "clipped"), "alpha": schema.text, "frames": schema.text},
        )(report, "")
        found = cls(
            *_read_made(report["provenance"], FILTER_PARAMETERS),
            layer=known["layer"],
            values=shelf.array(known["raw"], "raw"),
            rows=known["filters"],
            preprocessing=known["preprocessing"],
            crop=known["crop"],
            look=known.get("look", "classic"),
            alpha=shelf.array(known["alpha"], "alpha") if "alpha" in known else None,
            frames=shelf.array(known["frames"], "frames") if "frames" in known else None,
        )
        found._check_shapes()
        return found

    def _check_shapes(self) -> None:
        """What was loaded has to fit together."""
        values, affine = self.values, self.preprocessing
        expected = f"{len(self.rows)} canvases (n, h, w, c), of which a crop of {self.crop} leaves something"
        fits = values.ndim == 4 and len(values) == len(self.rows) and min(values.shape[1:3]) > 2 * self.crop
        check(fits and (values.shape[3] == 1 or values.shape[3] >= 3), "raw", expected, f"the shape {values.shape}")
        check(
            {len(affine.mean), len(affine.std)} <= {1, values.shape[3]},
            "preprocessing",
            f"a mean and a deviation, or one for each of {values.shape[3]} channels",
            f"{len(affine.mean)} and {len(affine.std)}",
        )
        if self.alpha is not None:
            check_shape(self.alpha, values.shape[:3], "alpha")
        if self.frames is not None:
            check(self.frames.ndim == 5, "frames", "an array (n, f, h, w, c)", f"the shape {self.frames.shape}")
            check_shape(self.frames, (len(values), self.frames.shape[1], *values.shape[1:]), "frames")

    def _cropped(self, picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        return picture[self.crop : height - self.crop, self.crop : width - self.crop]

    def _drawn(self, canvas: np.ndarray) -> np.ndarray:
        """A canvas `(h, w, c)` in the look of the recipe: (h', w', 3) uint8."""
        pixels = self.preprocessing.restore(canvas)
        if self.look == "classic":
            drawn = imaging.filter_picture(_display_units(canvas, self.preprocessing), self.crop)
        elif self.look == "clipped":
            drawn = imaging.clipped_picture(self._cropped(pixels))
        else:
            drawn = imaging.plain_picture(self._cropped(pixels))
        return np.repeat(drawn, 3, axis=-1) if drawn.shape[-1] == 1 else drawn[..., :3]

    def _tiles(self, order: Sequence[int]) -> list[np.ndarray]:
        """The pictures, enlarged or averaged so that the numbers have room under them."""
        longest = imaging.tile_side(len(order))
        sides = [self._cropped(self.values[0]).shape[:2]] if order else []
        height, width = imaging.sized_tile(np.zeros((*sides[0], 3), np.uint8), 104, longest).shape[:2]
        return [
            imaging.words_tile(height, width, _epitaph(self.rows[index]))
            if self.rows[index].status == "dead"
            else imaging.sized_tile(self.picture(index), 104, longest)
            for index in order
        ]

    def _label(self, index: int) -> imaging.Label:
        row = self.rows[index]
        flag = "" if row.status == "alive" else row.status
        lines = [row.compared]
        lines += [] if row.holds is None else [f"holds {100 * row.holds:.0f} %"]
        lines += [] if row.agreement is None else [f"seeds agree {row.agreement:.2f}"]
        lines += ["from a photo"] if row.begun else []
        return imaging.Label(self.name(index), _digits(row.activation), tuple(lines), flag)

    @property
    def _where(self) -> str:
        return self.layer.path if self.layer else "objectives"

    @property
    def _how(self) -> str:
        """Recipe, steps, size and seed, of what is known."""
        recipe, seed = self.parameters.recipe, self.parameters.seed
        known = [] if recipe is None else [f"recipe {recipe.name}, {recipe.steps} steps"]
        known += [f"{'x'.join(map(str, self.values.shape[1:3]))} pixels"]
        known += [] if seed is None else [f"seed {seed}"]
        return " · ".join(known)

    @property
    def _legend(self) -> str:
        """What the labels' words mean, of those that occur."""
        words = []
        if any(row.natural is not None for row in self.rows):
            words.append("natural: the best of the photos")
        elif self.rows:
            words.append("noise: what 99 % of noise pictures stay below")
        if any(row.holds is not None for row in self.rows):
            words.append("holds: what stays when the picture is moved")
        if any(row.begun for row in self.rows):
            words.append("from a photo: noise does not move it")
        return " · ".join(words)

    def _film(self, index: int, count: int) -> list[np.ndarray]:
        """The tiles of one filter from the first frame to the last."""
        assert self.frames is not None
        longest = 320 if count == 1 else imaging.tile_side(count) // (1 if count <= 64 else 2)
        frames = self.frames[index]
        if self.rows[index].status == "dead":
            height, width = self._cropped(frames[0]).shape[:2]
            still = imaging.words_tile(height, width, f"{self.name(index)} dead")
            return [imaging.sized_tile(still, min(104, longest), longest)] * len(frames)
        return [imaging.sized_tile(self._drawn(frame), min(104, longest), longest) for frame in frames]

    def _moments(self) -> list[str]:
        """What is written above each frame: the step where that is known, else its number."""
        assert self.frames is not None
        count = self.frames.shape[1]
        steps = self.parameters.frame_steps
        if steps is not None and len(steps) == count:
            return [f"step {step}" for step in steps]
        return [f"{number} of {count}" for number in range(1, count + 1)]


_FILTER_ROW = schema.record(
    FilterRow,
    channel=schema.optional(schema.whole(0)),
    status=schema.one_of(*STATUSES),
    variant=schema.whole(0),
    tries=schema.whole(0),
    steps=schema.whole(0),
)


def _digits(value: float) -> str:
    """Three digits, without an exponent where they are readable: 1230 rather than 1.23e+03."""
    return f"{float(f'{value:.3g}'):g}"


def _times(factor: float) -> str:
    """Two digits, for what is multiplied: "0.83", "12", "340"."""
    return f"{float(f'{factor:.2g}'):g}" if abs(factor) >= 0.01 or not factor else f"{factor:.0e}"


def _epitaph(row: FilterRow) -> str:
    """Why a filter is dead, in a few words: the first clause of the reason."""
    return f"dead: {row.reason.partition(';')[0].partition(',')[0]}"


def _display_units(values: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """A canvas in RGB order and in units of half the network's range, where the classic look is defined."""
    return preprocessing.restore(values) / 127.5 - 1


# -- heatmaps --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """How far a heatmap can be believed; see `heatmaps.faithfulness` for what each is.

    Attributes:
        deletion: area under the probability while the most important pixels go, 0..1; less is better. Where what is
            explained has no probability, of the score over the size of the whole picture's, from that of grey on.
        insertion: the same while they come back; more is better.
        drop: share of the score that is lost seen through the map alone, 0..1.
        increase: 1 if the score rises instead, else 0.
        road: score without the least important pixels less that without the most important ones, -1..1.
        stability: rank correlation with the maps of noisy copies, -1..1.
        randomisation: rank correlation with the maps of scrambled weights, 0..1; less is better; None where there are
            no weights to scramble.
        badge: "pass", "doubtful" or "fail"; reason: why.
    """

    deletion: float
    insertion: float
    drop: float
    increase: float
    road: float
    stability: float
    randomisation: float | None
    badge: str
    reason: str


@dataclass(frozen=True)
class HeatmapRow:
    """One heatmap in words and numbers.

    Attributes:
        image: the picture's name.
        class_index, class_name: what was explained; where it is no class, None and what it is in words.
        score: the number that was explained: a logit, or what `Head.score` says instead; less that of `against`.
        probability: of the class; None for linear outputs.
        layer, method: where and how.
        status: "ok", or "blank" with the `reason`.
        reason: why nothing is to be seen; empty where the status is "ok".
        predictions: the best classes of the picture, best first.
        against: the class whose score was subtracted, or None.
        note: what has to be said beside the map.
        check: how far it can be believed, where that was measured.
    """

    image: str
    class_index: int | None
    class_name: str
    score: float
    probability: float | None
    layer: str
    method: str
    status: str
    reason: str
    predictions: tuple[Prediction, ...]
    against: str | None = None
    note: str = ""
    check: Check | None = None

    @property
    def explained(self) -> str:
        """ "tabby", or "tabby against boxer"."""
        return self.class_name + (f" against {self.against}" if self.against else "")

    @property
    def text(self) -> str:
        """ "tabby 0.83"."""
        if self.class_index is None:
            return f"{self.class_name} {self.score:.3g}"
        return Prediction(self.class_index, self.class_name, self.score, self.probability).text


@dataclass(frozen=True, eq=False, repr=False)
class Heatmap(Result):
    """Which part of each picture spoke for a class.

    Attributes:
        photos: the pictures.
        maps: `(n, h, w)` float32, raw and signed, at the layer's size or the picture's; a tuple of `(h, w)` where
            methods differ in it.
        rows: the words and numbers, one for each map.
    """

    parameters: HeatmapParameters = field(default_factory=HeatmapParameters)
    photos: tuple[InputImage, ...] = ()
    maps: Any = field(default_factory=lambda: np.zeros((0, 1, 1), np.float32))
    rows: tuple[HeatmapRow, ...] = ()
    file: ClassVar[str] = "heatmaps.json"

    def overlay(self, index: int = 0, paint: imaging.Paint | float = 0.7) -> np.ndarray:
        """A heatmap over its photo, at the photo's own size: (h, w, 3) uint8. `paint` is how, or the opacity alone."""
        return imaging.overlay(self.photos[index].pixels, self.maps[index], paint)

    def scaled(self, index: int = 0, compat: str = "convscope") -> np.ndarray:
        """A map at the network's input size (h, w) float32, scaled as another tool would: see `imaging.scaled_map`."""
        if self.origin.input_size is None:
            raise UsageError("the size of the network's input is not known, so a map can't be scaled to it.")
        return imaging.scaled_map(self.maps[index], *self.origin.input_size, compat)

    def panel(self, index: int = 0, paint: imaging.Paint | float = 0.7) -> np.ndarray:
        """Photo, overlay, colour bar and prediction side by side: (H, W, 3) uint8."""
        row, photo = self.rows[index], _at_most(self.photos[index].pixels, 480)
        paint = paint if isinstance(paint, imaging.Paint) else imaging.Paint(paint)
        drawn = imaging.overlay(photo, self.maps[index], paint)
        peak = paint.highest(self.maps[index])
        bar = imaging.colour_bar(len(photo), f"{-peak:.3g}" if paint.signed else "0", f"{peak:.3g}", paint.map)
        best = ", ".join(prediction.text for prediction in row.predictions[:3])
        what = f"{row.image}: what spoke for {row.explained}"
        about = [f"prediction: {best}"] if best else []
        about.append(row.reason or (f"{row.method} at {row.layer}" if row.layer else row.method))
        lines = [" · ".join(about), row.note]
        if row.check is not None:
            lines.append(f"check: {row.check.badge} · {row.check.reason}")
        return imaging.page(imaging.beside([photo, drawn, bar]), what, *filter(None, lines))

    def comparison(
        self, image: str | None = None, paint: imaging.Paint | float = 0.7, shared: bool = False
    ) -> np.ndarray:
        """The maps of one picture side by side, each with its method or class: (H, W, 3) uint8.

        Args:
            image: its name; the first where None.
            paint: how, or the opacity alone.
            shared: one scale for all, as for classes of one method; else each has its own, up to its own highest value,
                since methods have no common unit.

        Raises:
            UsageError: no map belongs to a picture of that name.
        """
        name = image or self.rows[0].image
        places = [index for index, row in enumerate(self.rows) if row.image == name]
        if not places:
            raise UsageError(f"no map of a picture {name!r}; {nearest(name, [row.image for row in self.rows])}")
        paint = paint if isinstance(paint, imaging.Paint) else imaging.Paint(paint)
        if shared:
            paint = replace(paint, peak=max(paint.highest(self.maps[index]) for index in places) or None)
        photo = _at_most(self.photos[places[0]].pixels, 240)
        tiles = [photo] + [imaging.overlay(photo, self.maps[index], paint) for index in places]
        labels = [imaging.Label(name, "")] + [self._compared(index) for index in places]
        rows = [self.rows[index] for index in places]
        body = imaging.labelled_grid(tiles, labels, min(len(tiles), 5))
        title = f"What spoke for {', '.join(dict.fromkeys(row.explained for row in rows))}"
        best = ", ".join(prediction.text for prediction in rows[0].predictions[:3])
        where = ", ".join(dict.fromkeys(row.layer for row in rows if row.layer))
        lines = [f"prediction: {best}" if best else "", f"at {where}" if where else ""]
        if shared and paint.peak:
            lines.append(f"one scale, up to {paint.peak:.3g}")
        return imaging.page(body, title, " · ".join(filter(None, lines)))

    def _compared(self, index: int) -> imaging.Label:
        row = self.rows[index]
        others = [other for other in self.rows if other.image == row.image]
        one_method = len({other.method for other in others}) == 1
        name = row.text if one_method else row.method
        flags = (row.explained,) if not one_method and len({other.explained for other in others}) > 1 else ()
        badge = row.check.badge if row.check else ""
        return imaging.Label(name, badge, flags + (() if row.status == "ok" else (row.status,)))

    def only(self, method: str) -> Heatmap:
        """The maps of one method alone.

        Raises:
            UsageError: there are none.
        """
        places = [index for index, row in enumerate(self.rows) if row.method == method]
        if not places:
            raise UsageError(f"no map is by {method!r}; {nearest(method, [row.method for row in self.rows])}")
        return replace(
            self,
            parameters=replace(self.parameters, method=method),
            photos=tuple(self.photos[index] for index in places),
            maps=np.stack([self.maps[index] for index in places]),
            rows=tuple(self.rows[index] for index in places),
        )

    def pictures(self) -> Iterator[tuple[str, np.ndarray]]:
        """A panel for each map."""
        for index, stem in enumerate(self._stems()):
            yield stem, self.panel(index)

    def _stems(self) -> list[str]:
        """The name of each map's files: the picture's, with its method and class where a picture has several."""
        methods = len({row.method for row in self.rows}) > 1
        found = []
        for row in self.rows:
            classes = {other.explained for other in self.rows if other.image == row.image}
            parts = [row.image, *([row.explained] if len(classes) > 1 else []), *([row.method] if methods else [])]
            found.append(imaging.safe_name(".".join(imaging.safe_name(part) for part in parts)))
        return found

    def plot(self, ax: Any = None, index: int = 0, paint: imaging.Paint | float = 0.7) -> Any:
        """The overlay with its class as title; returns the matplotlib axes."""
        ax = ax or _axes(5, 5)
        ax.imshow(self.overlay(index, paint))
        _entitle(ax, self.rows[index].text)
        ax.set_axis_off()
        return ax

    def to_json(self) -> dict[str, Any]:
        """See `Result.to_json`."""
        return {"heatmaps": [_heatmap_entry(row) for row in self.rows], "provenance": self.provenance}

    def save(self, directory: str | PathLike | Folder, *, paint: imaging.Paint | float = 0.7) -> list[str]:
        """Write the panels, the raw maps as `.npy`, the photos and the numbers.

        Where a picture has several maps, a panel compares them: of methods each on its own scale, of classes on one.
        """
        folder = _folder(directory)
        report, since = self.to_json(), folder.begin(self.file)
        for image in dict.fromkeys(row.image for row in self.rows):
            rows = [row for row in self.rows if row.image == image]
            methods = len({row.method for row in rows}) > 1
            if len(rows) > 1 and (methods or len({row.explained for row in rows}) > 1):
                name = f"{imaging.safe_name(image)}.{'methods' if methods else 'classes'}.png"
                folder.picture(name, self.comparison(image, paint, shared=not methods))
        for index, (entry, stem) in enumerate(zip(report["heatmaps"], self._stems(), strict=True)):
            entry["file"] = folder.picture(f"{stem}.png", self.panel(index, paint))
            entry["raw"] = folder.array(f"{stem}.npy", np.asarray(self.maps[index], np.float32))
        report["photos"] = _save_photos(folder, self.photos)
        return folder.json(self.file, report, since)

    @classmethod
    def read(cls, report: Mapping[str, Any], shelf: Shelf) -> Heatmap:
        """See `Result.read`."""
        named = schema.sequence(schema.entries({"raw": schema.text}), 1)(report.get("heatmaps"), "heatmaps")
        known = schema.entries({"heatmaps": schema.sequence(_HEATMAP_ROW), **_WITH_PHOTOS})(report, "")
        rows, photos = known["heatmaps"], known["photos"]
        check(
            [row.image for row in rows] == [photo["name"] for photo in photos],
            "photos",
            f"the photo of each of {len(rows)} maps",
            f"{len(photos)} others",
        )
        maps = [shelf.array(row["raw"], f"heatmaps[{index}].raw") for index, row in enumerate(named)]
        most = limits.current().pixels
        for index, one in enumerate(maps):
            fits = one.ndim == 2 and 0 < one.size <= most
            check(fits, f"heatmaps[{index}].raw", "a map (h, w)", f"the shape {one.shape}")
        return cls(
            *_read_made(report["provenance"], HEATMAP_PARAMETERS),
            photos=shelf.photos(photos, report["provenance"]),
            maps=np.stack(maps) if len({one.shape for one in maps}) == 1 else tuple(maps),
            rows=rows,
        )


# -- concepts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Concept:
    """A region that a layer tells apart.

    Attributes:
        number: from 0, the strongest first.
        share: of the maps' squares that would be lost without it, 0..1.
        predictions: the classes that a map full of it speaks for, best first; none where there are no classes.
    """

    number: int
    share: float
    predictions: tuple[Prediction, ...]

    @property
    def text(self) -> str:
        """ "concept 0: tabby 0.83"."""
        return f"concept {self.number}" + (f": {self.predictions[0].text}" if self.predictions else "")


@dataclass(frozen=True, eq=False, repr=False)
class Concepts(Result):
    """The regions of some pictures that look alike to a layer.

    Attributes:
        photos: the pictures.
        values: how much of each concept is at each place `(n, h, w, k)` float32, not negative.
        vectors: what each is made of `(k, c)` float32, not negative, of length 1.
        rows: the words and numbers, one for each concept.
    """

    parameters: ConceptParameters = field(default_factory=ConceptParameters)
    photos: tuple[InputImage, ...] = ()
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 1, 1), np.float32))
    vectors: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.float32))
    rows: tuple[Concept, ...] = ()
    file: ClassVar[str] = "concepts.json"

    def panel(self, index: int = 0, opacity: float = 0.75) -> np.ndarray:
        """A photo, and its regions in the concepts' colours: (H, W, 3) uint8."""
        photo = _at_most(self.photos[index].pixels, 360)
        drawn = imaging.regions(photo, self.values[index], self.values.max(axis=(0, 1, 2)), opacity)
        legend = imaging.legend([row.text for row in self.rows], len(photo))
        title, where = self.photos[index].name, f"regions of {self.parameters.layer}"
        return imaging.page(imaging.beside([photo, drawn, legend]), title, where)

    def pictures(self) -> Iterator[tuple[str, np.ndarray]]:
        """A panel for each photo."""
        for index, photo in enumerate(self.photos):
            yield imaging.safe_name(photo.name), self.panel(index)

    def to_json(self) -> dict[str, Any]:
        """See `Result.to_json`."""
        return {"concepts": [asdict(row) for row in self.rows], "provenance": self.provenance}

    def save(self, directory: str | PathLike | Folder) -> list[str]:
        """Write the panels, what is where and what of as `.npy`, the photos and the numbers."""
        folder = _folder(directory)
        report, since = self.to_json(), folder.begin(self.file)
        for name, picture in self.pictures():
            folder.picture(f"{name}.png", picture)
        report["values"] = folder.array("values.npy", self.values)
        report["vectors"] = folder.array("vectors.npy", self.vectors)
        report["photos"] = _save_photos(folder, self.photos)
        return folder.json(self.file, report, since)

    @classmethod
    def read(cls, report: Mapping[str, Any], shelf: Shelf) -> Concepts:
        """See `Result.read`."""
        row = schema.record(Concept, number=schema.whole(0), predictions=schema.sequence(_PREDICTION))
        known = schema.entries({
            "concepts": schema.sequence(row, 1),
            "values": schema.text,
            "vectors": schema.text,
            **_WITH_PHOTOS,
        })(report, "")  # fmt: skip
        schema.entries({"layer": schema.text})(report["provenance"]["parameters"], "provenance.parameters")
        values, vectors = (shelf.array(known[name], name) for name in ("values", "vectors"))
        count, photos = len(known["concepts"]), known["photos"]
        expected = f"how much of {count} concepts is where in {len(photos)} photos (n, h, w, k)"
        check(values.ndim == 4 and values.size > 0, "values", expected, f"the shape {values.shape}")
        check_shape(values, (len(photos), *values.shape[1:3], count), "values")
        check(vectors.ndim == 2 and len(vectors) == count, "vectors", f"{count} vectors", f"the shape {vectors.shape}")
        numbers = [row.number for row in known["concepts"]]
        check(numbers == list(range(count)), "concepts", f"the numbers from 0 to {count - 1}", numbers[:8])
        made = _read_made(report["provenance"], CONCEPT_PARAMETERS)
        return cls(*made, shelf.photos(photos, report["provenance"]), values, vectors, known["concepts"])


def _heatmap_entry(row: HeatmapRow) -> dict[str, Any]:
    return {"class" if key == "class_index" else key: value for key, value in asdict(row).items()}


_PREDICTION = schema.record(Prediction, index=schema.whole(0))
_HEATMAP_ROW = schema.record(
    HeatmapRow,
    {"class_index": "class"},
    class_index=schema.optional(schema.whole(0)),
    status=schema.one_of("ok", "blank"),
    predictions=schema.sequence(_PREDICTION),
)
_PREPROCESSING = schema.record(
    Preprocessing,
    mean=schema.sequence(schema.number, 1),
    std=schema.sequence(schema.number, 1),
    certainty=schema.one_of(FOUND, GUESS, SET),
)
_WITH_PHOTOS: dict[str, schema.Reader] = {"photos": schema.sequence(PHOTO), "provenance": PROVENANCE}


def _read_made(provenance: Mapping[str, Any], reader: schema.Reader) -> tuple[Origin, Any]:
    """The origin and the parameters in a saved provenance that fits `PROVENANCE`."""
    parameters = reader(provenance["parameters"], "provenance.parameters")
    network, known = provenance["network"], {one.name for one in fields(parameters)}
    record = {name: value for name, value in provenance.items() if name != "parameters"}
    details = {name: value for name, value in provenance["parameters"].items() if name not in known}
    size = network["input"]["height"], network["input"]["width"]
    return Origin(network["name"], size, record, details), parameters


def check_shape(array: np.ndarray, shape: tuple[int, ...], where: str) -> None:
    """An array that was loaded has to have the shape that the JSON says.

    Raises:
        Misfit: it has another.
    """
    check(array.shape == shape, where, f"an array of the shape {shape}", array.shape)


def _at_most(photo: np.ndarray, side: int) -> np.ndarray:
    """The photo brought to a longest side of `side` pixels, up or down, so that panels are alike."""
    from PIL import Image

    scale = side / max(photo.shape[:2])
    size = max(1, round(photo.shape[1] * scale)), max(1, round(photo.shape[0] * scale))
    return np.asarray(
        Image.fromarray(photo).resize(size, Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS)
    )


_KINDS: dict[str, type[Result]] = {
    cls.file.removesuffix(".json"): cls for cls in (Activations, Filters, Heatmap, Concepts)
}


def found(folder: str | PathLike) -> list[Path]:
    """The JSON files of all results in a folder, each of which `load` takes: `heatmaps.json`, `heatmaps-2.json`, ...

    Raises:
        ConvscopeError: there is no such folder.
    """
    return saved.found(folder, _KINDS)


def load(path: str | PathLike, kind: str | None = None) -> Result:
    """Load a saved result of any technique.

    The folder may come from anybody: only regular files inside of it are read, and their sizes are held against the
    limits (see `convscope.limits`).

    Args:
        path: a folder with one result, or the JSON file of a result, such as "out/heatmaps-2.json".
        kind: "activations", "filters", "heatmaps" or "concepts", where a folder holds several results.

    Raises:
        UsageError: the folder holds several results, or there is no such kind.
        ConvscopeError: there is no result, or it is damaged.
    """
    return saved.checked(saved.chosen(path, tuple(_KINDS), kind), lambda file: _loaded(file, kind))


def _loaded(file: Path, kind: str | None) -> Result:
    report = saved.read_json(file)
    kinds = [one for one in _KINDS if one in report]
    check(len(kinds) == 1, "the top", f"one entry of {', '.join(_KINDS)}", ", ".join(kinds) or "none of them")
    if kind not in (None, *kinds):
        raise UsageError(f"{str(file)!r} holds {kinds[0]}, not {kind}: leave kind out, or give another file.")
    return _KINDS[kinds[0]].read(report, Shelf(file.parent))
