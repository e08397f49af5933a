"""`convscope filters`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import click

from convscope.cli.options import FOLDER, SEED, Choice, common, model_options, opened, readable, writable, written
from convscope.cli.shell import INTERRUPTED, Shell

if TYPE_CHECKING:
    from convscope.events import Progress
    from convscope.images.image import InputImage
    from convscope.networks import Network
    from convscope.results import Filters


@dataclass(frozen=True)
class Options:
    """The options of the command; each field is one."""

    layer: str | None
    channels: str | None
    objectives: tuple[str, ...]
    recipe: str | None
    steps: int | None
    size: int | None
    seed: int
    seeds: int
    variants: int
    photos: tuple[str, ...]
    photo: str | None
    frames: int
    precision: str
    batch: int | None
    labels: bool | None
    sort: str | None
    columns: int | None


@click.command()
@click.argument("model")
@click.option("--layer", metavar="L", help="Path of the layer, as `convscope layers` prints it.")
@click.option("--channels", metavar="0-63,70", help="Channels; all by default (the first 64 for recipe classic).")
@click.option(
    "--objective",
    "objectives",
    multiple=True,
    metavar="TEXT",
    help="Objective to maximize instead: L:17, L:17@ROW,COLUMN, tabby, L:* (the whole layer), or a sum, a:3 + 0.5*b:9.",
)
@click.option(
    "--recipe",
    metavar="R",
    help="Recipe: fast (the default), classic, fourier, maco, accentuation, deepdream or caricature.",
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Number of steps; the recipe's by default.")
@click.option("--size", type=click.IntRange(min=1), metavar="N", help="Side of the images in pixels.")
@SEED
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
    "--photos", multiple=True, metavar="IMAGE", help="Images or folders whose activations an alive filter must exceed."
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
    help="Number of intermediate images of each to keep, for an animation.",
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
    help="Numbers under each tile of the sheet; shown by default, except for recipe classic.",
)
@click.option(
    "--sort",
    type=click.Choice(["status", "ratio", "activation", "holds", "channel", "given"]),
    help="Order of the tiles; by status by default, as given for recipe classic.",
)
@click.option("--columns", type=click.IntRange(min=1), metavar="N", help="Number of tiles in a row of the sheet.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of filters that are optimized together; 16 by default.",
)
@click.option(
    "--out",
    "-o",
    metavar="DIR",
    type=FOLDER,
    callback=lambda *given: None if given[2] is None else writable(*given),
    help="Folder to write to; filters-NETWORK-LAYER by default.",
)
@partial(model_options, precision=False)
@common
def filters(shell: Shell, model: str, out: str | None, opening: dict[str, object], **given: Choice) -> None:
    """Show the images that excite the filters of a layer of MODEL most, by gradient ascent."""
    from convscope import store
    from convscope.files import safe_name

    options = Options(**given)
    if options.layer is None and not options.objectives:
        raise click.UsageError("Missing option '--layer' (or '--objective').")
    references = readable(shell, options.photos)
    network = opened(shell, model, opening)
    out = out or f"filters-{safe_name(network.name)}-{safe_name(options.layer or 'objectives')}"
    with shell.progress() as progress:
        result = _computed(network, options, references, progress)
        interrupted = result.parameters.interrupted
        with _undisturbed(interrupted):
            files = store.save(result, out, labels=options.labels, sort=options.sort, columns=options.columns)
    if result.parameters.note:
        shell.say(f"  {result.parameters.note}")
    shell.result(written(out, files), lambda: _table(shell, result, out, options.sort))
    if interrupted:
        shell.say(f"interrupted; what was finished is in {out}")
        sys.exit(INTERRUPTED)


def _computed(network: Network, options: Options, references: Sequence[InputImage], progress: Progress) -> Filters:
    from convscope.techniques.filters import DEFAULT_RECIPE
    from convscope.techniques.filters import filters as technique

    return technique(
        network,
        options.layer,
        options.channels,
        objectives=options.objectives,
        recipe=options.recipe or DEFAULT_RECIPE,
        steps=options.steps,
        size=options.size,
        seed=options.seed,
        seeds=options.seeds,
        variants=options.variants,
        natural_images=references,
        image=options.photo,
        frames=options.frames,
        precision=options.precision,
        batch=options.batch,
        progress=progress,
    )


@contextmanager
def _undisturbed(interrupted: bool) -> Iterator[None]:
    """After Ctrl-C, time to write what is finished: `main` would ask again a second later."""
    if interrupted and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    yield


def _table(shell: Shell, result: Filters, out: str, sort: str | None) -> None:
    order = result.order(sort or "status")
    rows = [
        [
            result.name(index),
            f"{row.activation:.4g}",
            row.compared,
            "" if row.robustness is None else f"{100 * row.robustness:.0f} %",
            "" if row.agreement is None else f"{row.agreement:.2f}",
            row.status,
            row.reason,
        ]
        for index, row in ((index, result.rows[index]) for index in order)
    ]
    where = result.layer.path if result.layer else "objectives"
    columns = ["filter", "activation", "beside", "robust", "seeds agree", "status", "reason"]
    if not any(row[4] for row in rows):
        columns, rows = columns[:4] + columns[5:], [row[:4] + row[5:] for row in rows]
    shell.table(f"filters of {where}", columns, rows, right=(1, 3))
    shell.print(f"{result.summary}; sheet.png and single images in {out}")
