"""The command line: each command is a library call with printing around it."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convscope import limits, terminal
from convscope.errors import BackendError, ConvscopeError, Unreadable, UsageError

if TYPE_CHECKING:
    from convscope.events import Progress
    from convscope.networks import Named, Network

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Shell:
    """Where a command prints: results on stdout, everything for people on stderr.

    Args:
        quiet: print errors only, and what the command is for (JSON, the table of layers).
        as_json: results are one JSON document on stdout.
    """

    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet, self.as_json = quiet, as_json
        self._stdout, self._stderr = sys.stdout, terminal.Lenient(sys.stderr)

    @contextmanager
    def others(self) -> Iterator[None]:
        """What other code prints (Keras while it downloads) can't mix with results, nor steer the terminal."""
        stderr = terminal.Guarded(self._stderr)
        with redirect_stdout(io.StringIO() if self.quiet else stderr), redirect_stderr(stderr):
            yield

    def say(self, text: str) -> None:
        """A line for people."""
        if not self.quiet:
            text = terminal.safe(text)
            self._console().print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def print(self, text: str) -> None:
        """A line of the result."""
        click.echo(terminal.safe(text), file=self._stdout)

    def result(self, data: dict[str, Any], text: Callable[[], None], essential: bool = False) -> None:
        """The outcome: `data` with --json, else what `text` prints; an `essential` text also where it is quiet."""
        if not self.as_json and self.quiet and not essential:
            return
        if self._stdout is None:
            if self.as_json or essential:
                raise ConvscopeError("the result should be printed on stdout, but stdout is closed: open it.")
            return
        try:
            if self.as_json:
                self._json(data)
            else:
                text()
            self._stdout.flush()
        except BrokenPipeError:  # whoever reads it has read enough
            sys.exit(FAILED)
        except OSError as error:
            raise ConvscopeError(
                f"the result can't be printed on stdout ({error.strerror or error}): send it to another place."
            ) from error

    def _json(self, data: dict[str, Any]) -> None:
        from convscope.files import dump

        # Bytes: JSON is UTF-8, whatever the terminal is.
        click.echo(terminal.safe_json(dump(data)).encode(), nl=False, file=self._stdout)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A bar on stderr, for work that takes long; none where nobody would see it."""
        if self.quiet or not self._stderr.isatty():
            yield None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=self._console(), transient=True) as bar:
            task = bar.add_task("", total=None)
            # The bar prints above itself what other code prints.
            with redirect_stderr(terminal.Guarded(sys.stderr)), redirect_stdout(terminal.Guarded(sys.stdout)):
                yield lambda event: bar.update(
                    task, completed=event.done, total=event.total, description=terminal.safe(event.label)
                )

    def table(self, title: str, columns: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> None:
        """A table on stdout."""
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table

        table = Table(box=SIMPLE)
        rows = [[terminal.safe(cell) for cell in row] for row in rows]
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        # Where stdout is a file there is no width to fit: let no cell be cut.
        width = (
            None
            if self._stdout.isatty()
            else max(100, max((sum(map(len, row)) + 4 * len(row) for row in rows), default=0))
        )
        console = Console(file=self._stdout, width=width, markup=False, highlight=False, emoji=False)
        console.print(terminal.safe(title), style="bold", soft_wrap=True)
        console.print(table)

    def _console(self) -> Any:
        from rich.console import Console

        return Console(file=self._stderr)  # type: ignore[arg-type]


# -- options that commands share -------------------------------------------------------------------------


def _common(command: Callable) -> Callable:
    """The options that all commands take, and a `Shell` in place of `quiet` and `json`; `limit` holds meanwhile."""

    @click.option("--quiet", "-q", is_flag=True, help="Print errors only, and JSON or the table of layers.")
    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
    @click.option(
        "--limit",
        "limited",
        multiple=True,
        metavar="NAME=VALUE",
        help="Raise or lower a limit on what one file may take, such as weights=32GiB. Limits: pixels, file, weights, "
        "text, entries, nodes, values, depth, seconds.",
    )
    @click.option(
        "--debug", is_flag=True, expose_value=False, help="Show the whole traceback of an error."
    )  # see `main`
    @wraps(command)
    def with_shell(*args: Any, quiet: bool, as_json: bool, limited: tuple[str, ...], **options: Any) -> Any:
        shell = Shell(quiet, as_json)
        with shell.others(), limits.using(**limits.parse(limited)):
            _start_reader(options)
            return command(shell, *args, **options)

    return with_shell


def _start_reader(options: dict[str, Any]) -> None:
    """Start the process that reads files while this one imports what it needs."""
    from convscope import isolation

    images = any(options.get(name) for name in ("images", "image", "photos", "photo", "like"))
    with suppress(ConvscopeError):  # said by whoever needs it
        isolation.start(*(("convscope.images.decode",) if images else ()))


def _model_options(command: Callable, precision: bool = True) -> Callable:
    """The options that say how a model is opened, gathered into one dictionary `opening`.

    Without `precision` that one is left out, for a command that has one of its own.
    """

    @click.option("--weights", metavar="FILE", help="Weights for a model that code makes (MODEL is file.py:function).")
    @click.option("--backend", help="Keras backend: tensorflow, jax or torch.")
    @click.option("--device", help="Where PyTorch computes: cpu, cuda, cuda:1, mps.")
    @_option_if(precision, "--precision", help="Of PyTorch: float32, or bfloat16 or float16 (autocast).")
    @click.option(
        "--preprocess",
        metavar="HOW",
        help="none, 0..1, -1..1, caffe, torch, or MEAN,STD in pixel units; found out or guessed if left out.",
    )
    @click.option("--classes", metavar="FILE", help="Class names: a line each, or JSON.")
    @click.option("--input", metavar="NAME", help="Which input gets the picture, if there are several.")
    @click.option("--output", metavar="NAME", help="Which output is explained, if there are several.")
    @click.option("--head", help="linear, softmax or sigmoid, if what is found out about the outputs is wrong.")
    @click.option("--feed", metavar="NAME=FILE.npy", multiple=True, help="What another input gets; zeros if left out.")
    @click.option("--input-size", metavar="N or HxW", help="Bring pictures to this size, if the model takes any.")
    @click.option("--trust", is_flag=True, help="Run code that the model file holds (Lambda layers, pickles).")
    @wraps(command)
    def gathered(*args: Any, **options: Any) -> Any:
        names: tuple[str, ...] = ("weights", "backend", "device", "precision", "preprocess", "classes")
        names += ("input", "output", "head", "feed", "input_size", "trust")
        opening = {name: options.pop(name) for name in names if precision or name != "precision"}
        return command(*args, opening=opening, **options)

    return gathered


def _option_if(wanted: bool, *names: str, **about: Any) -> Callable:
    return click.option(*names, **about) if wanted else lambda command: command


def _open(shell: Shell, model: str, opening: dict[str, Any]) -> Network:
    from convscope.networks import Named, open_model

    asked = Named(model)
    network = open_model(asked, **_ready(asked, opening))
    height, width = network.inputs.size
    shell.say(f"{network.name}: {network.source.name} on {network.framework}, {network.backend}")
    for note in network.source.notes:
        shell.say(f"  opened: {note}")
    kind = {1: "grey", 3: "RGB"}.get(network.inputs.channels, f"{network.inputs.channels} channels")
    free = "it would take any size" if network.inputs.free else ""
    about = "; ".join(part for part in (network.inputs.note, free) if part)
    shell.say(f"  input: {height}x{width} {kind}{f' ({about})' if about else ''}")
    for name, value in network.inputs.others.items():
        shell.say(f"  input {name!r} is fed {value}")
    if len(network.outputs) > 1:
        shell.say(f"  output: {network.output!r} of {', '.join(network.outputs)} (--output chooses)")
    shell.say(f"  preprocessing: {network.preprocessing.text}")
    named = network.class_names or network.head.linear
    shell.say(f"  head: {network.head.text}{'' if named else '; classes have numbers, no names'}")
    return network


def _ready(model: Named, opening: dict[str, Any]) -> dict[str, Any]:
    """The options of `open_model`; Keras is imported already where it will be needed."""
    from convscope.networks import choose_backend

    options = dict(opening)
    options["size"], options["feed"] = _size(options.pop("input_size")), _fed(options["feed"])
    if model.needs_keras:  # this says what is wrong with a file before the seconds that a framework takes to import
        with _notices_held_back():
            choose_backend(options["backend"])
    return options


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) > 2:
        raise UsageError(f"--input-size {text!r} is not understood; expected pixels such as 224 or 180x240.")
    return int(parts[0]), int(parts[-1])


def _fed(pairs: tuple[str, ...]) -> dict[str, Any]:
    from convscope import reading

    fed = {}
    for pair in pairs:
        name, _, file = pair.partition("=")
        try:
            fed[name] = reading.array_of(file)
        except Unreadable as error:
            raise UsageError(
                f"--feed {pair!r} is not understood ({file!r}: {error}); expected NAME=FILE.npy with an array (1, ...)."
            ) from None
    return fed


@contextmanager
def _notices_held_back() -> Iterator[None]:
    """Keep what a framework's C++ prints on stderr while it is imported; show it only if the import fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it counts every new program as a mistake
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        saved = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except (ImportError, BackendError):  # a backend that can't be imported is said as BackendError
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _notes(shell: Shell, photos: Any) -> None:
    for photo in photos:
        for note in photo.notes:
            shell.say(f"  {photo.name}: {note}")


def _writable(context: click.Context, option: click.Parameter, path: str) -> str:
    """`path` as it is, if it can be written to: better said before the work than after it."""
    there = next(folder for folder in [Path(path).absolute(), *Path(path).absolute().parents] if folder.exists())
    if there != Path(path).absolute() and not there.is_dir():
        raise click.BadParameter(
            f"{path!r} can't be made: {str(there)!r} is a file. Choose another place.", context, option
        )
    if not os.access(there, os.W_OK):
        raise click.BadParameter(
            f"{path!r} can't be written: no permission to write to {str(there)!r}. Choose another place.",
            context,
            option,
        )
    return path


_IMAGES = click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
_FOLDER = click.Path(file_okay=False)
_OUT = click.option(
    "--out", "-o", required=True, metavar="DIR", type=_FOLDER, callback=_writable, help="Folder to write to."
)


# -- the commands ----------------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="convscope")
def app() -> None:
    """A microscope for convolutional networks.

    Shows what each layer makes of a picture (activations), what each filter looks for (filters), and which part
    of a picture spoke for a class (heatmap). MODEL is a model file (.keras, .h5 of any age, a SavedModel folder,
    .onnx, TorchScript, .pt2), code that makes a model (file.py:function, with --weights FILE), or a name such as
    keras:ResNet50V2, "keras:VGG16?weights=none", torchvision:resnet50 or timm:convnext_tiny.
    """


@app.command()
@click.argument("model")
@_model_options
@_common
def layers(shell: Shell, model: str, opening: dict[str, Any]) -> None:
    """Print the layers of MODEL: path, kind, output shape, parameters."""
    network = _open(shell, model, opening)
    rows = [
        {"path": la.path, "kind": la.kind, "shape": list(la.shape), "parameters": la.parameters, "class": la.class_name}
        for la in network.layers
    ]
    from convscope.results import versions

    description = {"technique": "layers", "network": network.describe(), "versions": versions()}
    data = {"layers": rows, "parameters": network.parameters, "provenance": description, "files": []}

    def table() -> None:
        text = [[la.path, la.kind, "×".join(map(str, la.shape)), f"{la.parameters:,}"] for la in network.layers]
        height, width = network.inputs.size
        title = f"{network.name} · shapes for {height}x{width} pixels · {network.parameters:,} parameters"
        shell.table(title, ["layer", "kind", "shape", "parameters"], text, right=(3,))

    shell.result(data, table, essential=True)


@app.command()
@click.argument("model")
@_IMAGES
@_OUT
@click.option(
    "--layers",
    "layers_",
    metavar="GLOB|KINDS",
    help='Which layers: kinds, globs or places such as "conv|pool" (the default), "block1_*", ":8".',
)
@click.option("--channel", type=int, metavar="N", help="Draw this channel of each layer instead of the sheets.")
@click.option("--shared", is_flag=True, help="Draw each sheet on one scale, so that magnitudes can be compared.")
@click.option(
    "--memory", default="2GB", show_default=True, metavar="SIZE", help="Beyond this the layers run in groups."
)
@click.option("--raw", is_flag=True, help="Write the raw arrays too (arrays/LAYER.npy), for convscope.load.")
@_model_options
@_common
def activations(
    shell: Shell,
    model: str,
    images: tuple[str, ...],
    out: str,
    layers_: str | None,
    channel: int | None,
    shared: bool,
    memory: str,
    raw: bool,
    opening: dict[str, Any],
) -> None:
    """Show what the layers of MODEL make of each IMAGE."""
    from convscope import store
    from convscope.images.decode import read_images
    from convscope.techniques.activations import activations as technique

    photos = read_images(images)
    _notes(shell, photos)
    network = _open(shell, model, opening)
    _check_channel(shell, network.select(layers_), channel)
    with shell.progress() as progress:
        result = technique(network, photos, layers_, memory=memory, scratch=out, progress=progress)
        files = store.save(result, out, shared=shared, channel=channel, raw=raw, progress=progress)
    shell.result(_written(out, files), lambda: _activation_table(shell, result, out))


def _check_channel(shell: Shell, chosen: Any, channel: int | None) -> None:
    """A channel that no chosen layer has is an error; one that only some have is drawn where it is."""
    if channel is None:
        return
    most = max((la.channels for la in chosen if la.spatial), default=0)
    if not most:
        raise UsageError("none of the chosen layers has a map, so there is no channel to draw; leave --channel out.")
    if not 0 <= channel < most:
        raise UsageError(f"channel {channel} is out of range: the chosen layers have channels 0 to {most - 1} at most.")
    without = [la.path for la in chosen if not la.spatial or channel >= la.channels]
    if without:
        shell.say(f"  without channel {channel}, so not drawn: {', '.join(without)}")


def _activation_table(shell: Shell, result: Any, out: str) -> None:
    rows = [row.cells for row in result.statistics]
    shell.table("activations", ["image", "layer", "shape", "max", "zeros", "empty"], rows, right=(3, 4, 5))
    shell.print(f"sheets and numbers in {out}")


@app.command()
@click.argument("model")
@click.option("--layer", metavar="L", help="Path of the layer, as `convscope layers` prints it.")
@click.option("--channels", metavar="0-63,70", help="Which channels; all if left out (of recipe classic the first 64).")
@click.option(
    "--objective",
    "objectives",
    multiple=True,
    metavar="TEXT",
    help="Objective to raise instead: L:17, L:17@ROW,COLUMN, tabby, L:* (the whole layer), a sum, a:3 + 0.5*b:9.",
)
@click.option(
    "--recipe",
    metavar="R",
    help="Recipe: fast (the default), classic, fourier, maco, accentuation, deepdream or caricature.",
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Instead of the recipe's number of steps.")
@click.option("--size", type=click.IntRange(min=1), metavar="N", help="Side of the pictures in pixels.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Random seed.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of random seeds; reports how well their results agree.",
)
@click.option(
    "--variants",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of images of each objective, made to differ.",
)
@click.option(
    "--photos", multiple=True, metavar="IMAGE", help="Photos or folders whose activations an alive filter must exceed."
)
@click.option(
    "--photo",
    metavar="IMAGE",
    help="Image to start from, for recipes accentuation and deepdream; the image of a caricature.",
)
@click.option(
    "--frames",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Number of images on the way to keep of each, for an animation.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Precision of the optimization (final activations are always measured in float32).",
)
@click.option(
    "--labels/--no-labels",
    default=None,
    help="Numbers under each tile of the sheet; recipe classic has none if left out.",
)
@click.option(
    "--sort",
    type=click.Choice(["status", "ratio", "activation", "holds", "channel", "given"]),
    help="Of the sheet's tiles; by status if left out, of recipe classic as given.",
)
@click.option("--columns", type=click.IntRange(min=1), metavar="N", help="Tiles in a row of the sheet.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of filters that are optimized together; 16 if left out.",
)
@click.option(
    "--out",
    "-o",
    metavar="DIR",
    type=_FOLDER,
    callback=lambda *given: None if given[2] is None else _writable(*given),
    help="Folder to write to; filters-NETWORK-LAYER if left out.",
)
@partial(_model_options, precision=False)
@_common
def filters(
    shell: Shell,
    model: str,
    layer: str | None,
    channels: str | None,
    objectives: tuple[str, ...],
    recipe: str | None,
    photos: tuple[str, ...],
    out: str | None,
    labels: bool | None,
    sort: str | None,
    columns: int | None,
    opening: dict[str, Any],
    **choices: Any,
) -> None:
    """Show what the filters of a layer of MODEL look for, by gradient ascent."""
    from convscope import store
    from convscope.files import safe_name
    from convscope.techniques.filters import DEFAULT_RECIPE
    from convscope.techniques.filters import filters as technique

    if layer is None and not objectives:
        raise click.UsageError("Missing option '--layer' (or '--objective').")
    references = _readable(shell, photos)
    network = _open(shell, model, opening)
    out = out or f"filters-{safe_name(network.name)}-{safe_name(layer or 'objectives')}"
    with shell.progress() as progress:
        result = technique(
            network,
            layer,
            channels,
            objectives=objectives,
            recipe=recipe or DEFAULT_RECIPE,
            photos=references,
            progress=progress,
            **choices,
        )
        interrupted = result.parameters.interrupted
        with _undisturbed(interrupted):
            files = store.save(result, out, labels=labels, sort=sort, columns=columns)
    if result.parameters.note:
        shell.say(f"  {result.parameters.note}")
    shell.result(_written(out, files), lambda: _filter_table(shell, result, out, sort))
    if interrupted:
        shell.say(f"interrupted; what was finished is in {out}")
        sys.exit(INTERRUPTED)


def _readable(shell: Shell, photos: tuple[str, ...]) -> list[Any]:
    """The photos that can be read; the others are counted and named."""
    return _read_and_left_out(shell, photos)[0] if photos else []


def _read_and_left_out(shell: Shell, photos: tuple[str, ...]) -> tuple[list[Any], int]:
    """The photos that can be read, and how many can't: these are named."""
    from convscope.images.decode import read_readable_images

    found, failures = read_readable_images(photos)
    if failures:
        shell.say(f"  {len(failures)} of {len(found) + len(failures)} photos can't be read and are left out:")
    for failure in failures:
        shell.say(f"  - {failure}")
    return found, len(failures)


@contextmanager
def _undisturbed(interrupted: bool) -> Iterator[None]:
    """After Ctrl-C, time to write what is finished: `main` would ask again a second later."""
    if interrupted and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    yield


def _filter_table(shell: Shell, result: Any, out: str, sort: str | None) -> None:
    order = result.order(sort or "status")
    rows = [
        [
            result.name(index),
            f"{row.activation:.4g}",
            row.compared,
            "" if row.holds is None else f"{100 * row.holds:.0f} %",
            "" if row.agreement is None else f"{row.agreement:.2f}",
            row.status,
            row.reason,
        ]
        for index, row in ((index, result.rows[index]) for index in order)
    ]
    where = result.layer.path if result.layer else "objectives"
    columns = ["filter", "activation", "beside", "holds", "seeds agree", "status", "reason"]
    if not any(row[4] for row in rows):
        columns, rows = columns[:4] + columns[5:], [row[:4] + row[5:] for row in rows]
    shell.table(f"filters of {where}", columns, rows, right=(1, 3))
    shell.print(f"{result.summary}; sheet.png and single pictures in {out}")


def _method_options(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """`NAME=VALUE` texts by name; `help` prints the options of all methods and ends the command."""
    if "help" in given:
        from convscope.techniques.heatmaps import METHODS

        columns = ["method", "option", "default", "values", "meaning"]
        rows = [[name, *one.cells] for name, method in METHODS.items() for one in method.options]
        Shell(quiet=False, as_json=False).table("options of heatmap methods", columns, rows)
        context.exit()
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{text!r} is not understood; expected NAME=VALUE, or help.", context, option)
        found[name.strip()] = value
    return found


@app.command()
@click.argument("model")
@_IMAGES
@_OUT
@click.option(
    "--class",
    "target",
    default="top",
    show_default=True,
    metavar="C",
    help="What is explained: a class by number or name; top, or top3 for the three best; or a channel or a unit of a "
    "layer, as conv3:17 or conv3:17@4,5.",
)
@click.option(
    "--against", metavar="C", help="Class to set against it: by number or name, or rival (the best of the others)."
)
@click.option("--like", metavar="PHOTO", help="Explain the similarity of the image to this photo instead of a class.")
@click.option(
    "--layer",
    default="auto",
    show_default=True,
    metavar="L",
    help="Layer by path; auto is the last with a map, best tries some; several with commas between them are fused.",
)
@click.option(
    "--method",
    default="grad-cam",
    show_default=True,
    metavar="M",
    help="Method, as listed in docs/heatmaps.md; several with commas between them; or all, for those that one pass "
    "gives.",
)
@click.option(
    "--option",
    "method_options",
    multiple=True,
    metavar="NAME=VALUE",
    is_eager=True,
    callback=_method_options,
    help="Option of the method, such as patch=16 of occlusion, as often as needed; with several methods, of each that "
    "has it. help lists all options.",
)
@click.option("--smooth", is_flag=True, help="Average over the image, slightly moved and mirrored.")
@click.option(
    "--budget",
    type=click.IntRange(min=2),
    metavar="N",
    help="Number of passes for an image by score-cam, rise, smoothgrad or integrated-gradients.",
)
@click.option("--check", is_flag=True, help="Measure how far to trust each heatmap.")
@click.option(
    "--fast", is_flag=True, help="Score masked images in bfloat16, where the machine gains by it: score-cam, rise."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
@click.option(
    "--opacity", type=click.FloatRange(0, 1), default=0.7, show_default=True, help="Opacity of the colour on the photo."
)
@click.option("--signed", is_flag=True, help="Also draw regions that lower the score.")
@click.option("--contours", is_flag=True, help="Draw lines at quarters of the highest value.")
@_model_options
@_common
def heatmap(
    shell: Shell,
    model: str,
    images: tuple[str, ...],
    out: str,
    target: str,
    like: str | None,
    layer: str,
    method: str,
    method_options: dict[str, str],
    opacity: float,
    signed: bool,
    contours: bool,
    fast: bool,
    opening: dict[str, Any],
    **choices: Any,
) -> None:
    """Show which regions of each IMAGE support a class."""
    from convscope import store
    from convscope.images.decode import read_images
    from convscope.render.overlay import Paint
    from convscope.techniques.heatmaps import heatmap as technique
    from convscope.techniques.heatmaps import likeness_target

    methods = _methods(method, method_options, choices["budget"])
    # A file that was named has to be an image; what else lies in a folder need not.
    folders = any(Path(image).is_dir() for image in images)
    photos, left_out = _read_and_left_out(shell, images) if folders else (read_images(images), 0)
    _notes(shell, photos)
    network = _open(shell, model, opening)
    if like and target != "top":
        raise UsageError("--class and --like are two things to explain; give one of them.")
    with shell.progress() as progress:
        explained = likeness_target(network, like) if like else target
        choices |= {"method": methods, "precision": "auto" if fast else "float32"}
        result = technique(network, photos, explained, _several(layer), progress=progress, **choices)
        files = store.save(result, out, paint=Paint(opacity, signed, contours=contours))
    if len(photos) > 1 and not like and not target.startswith("top"):
        shell.say(f"  explained for all {len(photos)} pictures: {result.rows[0].class_name}")
    shell.result(_written(out, files), lambda: _heatmap_table(shell, result, out, method))
    if left_out:
        sys.exit(FAILED)


def _methods(text: str, options: dict[str, str], budget: int | None) -> Any:
    """The methods with their options, or "all".

    Raises:
        UsageError: no such method or option, or a value that an option can't have.
    """
    from convscope.techniques.heatmaps import as_methods, with_options

    methods = as_methods(_several(text))
    twice = sorted({one.sampled for one in methods} & options.keys()) if budget is not None else []
    if twice:
        raise UsageError(f"--budget and --option {twice[0]}=... set the same number; give one of them.")
    return with_options(methods, options) if options or text != "all" else text


def _several(text: str) -> str | list[str]:
    """A text, or several with commas between them."""
    return [part.strip() for part in text.split(",")] if "," in text else text


def _heatmap_table(shell: Shell, result: Any, out: str, method: str) -> None:
    rows = [
        [
            row.image,
            row.text + (f" against {row.against}" if row.against else ""),
            f"{row.score:.4g}",
            row.layer,
            row.method,
            row.status if row.check is None else row.check.badge,
            row.reason or (row.check.reason if row.check else ", ".join(p.text for p in row.predictions[:3])),
        ]
        for row in result.rows
    ]
    what = "check" if any(row.check for row in result.rows) else "status"
    columns = ["image", "class", "score", "layer", "method", what, "prediction or reason"]
    shell.table(f"heatmaps · {method}", columns, rows, right=(2,))
    several = len({row.image for row in result.rows}) > 1
    said = [f"{row.image}, {row.method}: {row.note}" if several else f"{row.method}: {row.note}" for row in result.rows]
    for text in dict.fromkeys(text for text, row in zip(said, result.rows, strict=True) if row.note):
        shell.print(text)
    parameters = result.parameters
    for name, reason in parameters.left_out.items():
        shell.print(f"without {name}: {reason}")
    if parameters.layer_choice == "best":
        shell.print(f"layer {parameters.layer}: {parameters.layer_rule}")
    shell.print(f"overlays and raw maps in {out}")


@app.command()
@click.argument("model")
@_IMAGES
@_OUT
@click.option("--count", type=click.IntRange(min=1), default=5, show_default=True, help="How many regions.")
@click.option(
    "--layer", default="auto", show_default=True, metavar="L", help="Layer by path; auto is the last with a map."
)
@_model_options
@_common
def concepts(
    shell: Shell, model: str, images: tuple[str, ...], out: str, count: int, layer: str, opening: dict[str, Any]
) -> None:
    """Show the regions of all IMAGES that a layer distinguishes, and the classes that each supports."""
    from convscope import store
    from convscope.images.decode import read_images
    from convscope.techniques.heatmaps.concepts import concepts as technique

    photos = read_images(images)
    _notes(shell, photos)
    network = _open(shell, model, opening)
    with shell.progress() as progress:
        result = technique(network, photos, count, layer, progress=progress)
        files = store.save(result, out)

    def table() -> None:
        rows = [
            [str(row.number), f"{100 * row.share:.1f} %", ", ".join(one.text for one in row.predictions)]
            for row in result.rows
        ]
        shell.table(f"concepts of {result.parameters.layer}", ["concept", "share", "supports"], rows, right=(0, 1))
        shell.print(f"regions in {out}")

    shell.result(_written(out, files), table)


@app.command()
@click.argument("model")
@_IMAGES
@click.option(
    "--out",
    "-o",
    "page",
    required=True,
    metavar="FILE.html",
    type=click.Path(dir_okay=False),
    callback=_writable,
    help="The page to write.",
)
@click.option(
    "--class", "target", default="top", show_default=True, metavar="C", help="Class by number or name, or top."
)
@click.option(
    "--layers", metavar="GLOB|KINDS", help="Layers whose sheets are shown; a choice over the depth if left out."
)
@click.option(
    "--filters-of",
    "filter_layers",
    multiple=True,
    metavar="L",
    help="Layers whose filters are shown; three over the depth if left out.",
)
@click.option(
    "--heatmaps-of",
    "heatmap_layer",
    default="auto",
    show_default=True,
    metavar="L",
    help="Layer at which heatmaps are made: its path, auto, or best.",
)
@click.option(
    "--channels",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Filters of each layer; 0 leaves them out.",
)
@click.option("--check", is_flag=True, help="Measure how far the first heatmap of each photo can be believed.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--title", help="Of the page.")
@_model_options
@_common
def report(
    shell: Shell, model: str, images: tuple[str, ...], page: str, opening: dict[str, Any], **choices: Any
) -> None:
    """Write one HTML page about MODEL and each IMAGE: predictions, heatmaps, layers and filters."""
    from convscope.images.decode import read_images
    from convscope.reports import report as technique

    photos = read_images(images)
    _notes(shell, photos)
    network = _open(shell, model, opening)
    with shell.progress() as progress:
        data = technique(network, photos, page, progress=progress, **choices)
    shell.result(data, lambda: shell.print(f"report in {page}"))


@app.command()
@click.option(
    "--out",
    "-o",
    default="convscope-demo",
    show_default=True,
    metavar="DIR",
    type=_FOLDER,
    callback=_writable,
    help="Folder to write to.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@_model_options
@_common
def demo(shell: Shell, out: str, seed: int, opening: dict[str, Any]) -> None:
    """Show all three techniques on the small network and the photos that convscope ships; needs no network."""
    from convscope.demo import CLASSES, MODEL, run

    network = _open(shell, str(MODEL), {**opening, "classes": opening["classes"] or CLASSES})
    with shell.progress() as progress:
        data = run(network, out, seed=seed, progress=progress)
    shell.result(data, lambda: shell.print(f"the demo's report is {Path(out) / 'report.html'}"))


def _written(out: str, files: list[str]) -> dict[str, Any]:
    """The JSON of a result, the last of its files, as it was written."""
    return json.loads((Path(out) / files[-1]).read_text(encoding="utf-8"))


@app.command()
@click.argument("model")
@click.argument("image", required=False)
@_model_options
@_common
def doctor(shell: Shell, model: str, image: str | None, opening: dict[str, Any]) -> None:
    """Say what convscope finds out about MODEL, how sure it is, and whether the techniques work on it.

    The dry run takes IMAGE, or a picture that convscope draws. Exits with 1 if something does not work.
    """
    from convscope.diagnosis import doctor as examine
    from convscope.networks import Named

    options = _ready(Named(model), opening)
    found = examine(model, image, **options)
    data = found.to_json()
    shell.result(data, lambda: _diagnosis(shell, found), essential=True)
    if not found.ok:
        sys.exit(FAILED)


def _diagnosis(shell: Shell, found: Any) -> None:
    facts = _diagnosed(found)
    width = max(map(len, facts))
    for name, value in facts.items():
        shell.print(f"{name:>{width}}  {value}")
    rows = [
        [
            trial.name,
            "works" if trial.ok else "fails",
            f"{trial.seconds:.2f} s",
            "" if trial.peak_bytes is None else f"{trial.peak_bytes / 2**20:.0f} MiB",
            trial.found if trial.ok else "see below",
        ]
        for trial in found.trials
    ]
    shell.table("dry run", ["step", "", "time", "process's peak", "found"], rows, right=(2, 3))
    for doubt in found.doubts:
        shell.print(f"not sure: {doubt}")
    for problem in found.problems:
        shell.print(f"does not work: {problem}")


def _diagnosed(found: Any) -> dict[str, str]:
    """What is known of the file and the network, by name."""
    facts = {}
    if found.file:
        facts["file"] = f"{found.file['path']}, {found.file['bytes']:,} bytes, {found.file['kind']}"
    if found.network:
        network, inputs, layers = found.network, found.network["input"], found.layers
        colours = {1: "grey", 3: "RGB"}.get(inputs["channels"], f"{inputs['channels']} channels")
        facts |= {
            "framework": f"{network['framework']}, {network['backend']}",
            "opened": "; ".join(network["opened"]) or "as it is",
            "input": f"{inputs['name']}: {inputs['height']}x{inputs['width']} {colours}"
            + (", any size would do" if inputs["free_size"] else ""),
            "preprocessing": network["preprocessing"]["text"],
            "output": f"{network['output']}: {network['head']['text']}",
            "layers": ", ".join(f"{count} {kind}" for kind, count in layers["kinds"].items()),
            "activations": f"{len(layers['activations'])} layers by default",
            "heatmap": f"at {layers['heatmap']}" if layers["heatmap"] else "no layer with a map",
        }
    return facts


# -- the way out -----------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 used wrongly, 130 interrupted."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    terminal.fill_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal has no letters for
    interrupts = _Interrupts()
    try:
        with interrupts:
            app.main(args=arguments, prog_name="convscope", standalone_mode=False)
    except BaseException as error:
        _explain(KeyboardInterrupt() if interrupts.seen else error, debug)
    finally:
        terminal.let_go()


class _Interrupts:
    """Ctrl-C that can't get lost.

    Python raises ``KeyboardInterrupt`` wherever the program happens to be: in a callback of the garbage collector,
    where it is printed and dropped, or in the import of a C extension, which makes an ImportError of it. So what was
    asked for is remembered in `seen`, and asked for again a second later if the program still runs.
    """

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> None:
        ours = threading.current_thread() is threading.main_thread()
        self.active = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.active:
            signal.signal(signal.SIGINT, self._stop)
            if hasattr(signal, "setitimer"):
                signal.signal(signal.SIGALRM, self._stop)

    def _stop(self, *_: object) -> None:
        self.seen = True
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 1)
        raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        if self.active:
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)


# How the command line spells the parameters that messages name; others are `--name` with "-" for "_".
_SPELLED = {
    "open_model.size": "--input-size N or HxW",
    "classes": "--classes FILE",
    "weights": "--weights FILE",
    "feed": "--feed NAME=FILE.npy",
    "photo": "--photo IMAGE",
    "frames": "--frames N",
    "target": "--class",
}


def _spelled(name: str) -> str:
    return _SPELLED.get(name) or f"--{name.rpartition('.')[2].replace('_', '-')}"


def _explain(problem: BaseException, debug: bool) -> None:
    """Say in a line what went wrong, and exit."""
    try:
        raise problem
    except ConvscopeError as error:
        _leave(error, error.text(_spelled), error.exit_code, debug)
    except click.ClickException as error:
        with redirect_stderr(terminal.Guarded(sys.stderr)):
            error.show(file=sys.stderr)
        sys.exit(USAGE if isinstance(error, click.UsageError) else FAILED)
    except (KeyboardInterrupt, click.Abort) as error:
        # click makes an Abort of an interrupt, and also of the end of a file that somebody reads.
        if isinstance(error.__cause__, EOFError):
            _leave(error.__cause__, _unexpected(error.__cause__), FAILED, debug)
        _tell("interrupted; files already written are whole")
        sys.exit(INTERRUPTED)
    except OSError as error:
        _leave(error, str(error), FAILED, debug)
    except MemoryError as error:
        _leave(
            error,
            f"the memory does not suffice ({error}); give fewer pictures, or a smaller size, --memory or --batch.",
            FAILED,
            debug,
        )
    except Exception as error:
        _leave(error, _unexpected(error), FAILED, debug)


def _unexpected(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return f"convscope met something that it did not expect ({type(error).__name__}: {text}); --debug shows where."


def _leave(error: BaseException, text: str, code: int, debug: bool) -> None:
    _tell("".join(traceback.format_exception(error)) if debug else f"Error: {text}")
    sys.exit(code)


def _tell(text: str) -> None:
    """Lines on stderr; the first begins at the margin alone, so that no name with a line break looks like another."""
    first, *others = text.splitlines() or [""]
    others = [line if line.startswith(" ") else f"  {line}" for line in others]
    print("\n".join([first, *others]), file=terminal.Guarded(sys.stderr), flush=True)


if __name__ == "__main__":
    main()
