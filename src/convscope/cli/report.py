"""`convscope report` and `convscope demo`."""

from __future__ import annotations

from pathlib import Path

import click

from convscope.cli.options import FOLDER, IMAGES, SEED, Choice, common, model_options, opened, read, writable
from convscope.cli.shell import Shell


@click.command()
@click.argument("model")
@IMAGES
@click.option(
    "--out",
    "-o",
    "page",
    required=True,
    metavar="FILE.html",
    type=click.Path(dir_okay=False),
    callback=writable,
    help="Page to write.",
)
@click.option(
    "--class", "target", default="top", show_default=True, metavar="C", help="Class by number or name, or top."
)
@click.option(
    "--layers", metavar="GLOB|KINDS", help="Layers whose sheets are shown; some over the whole depth by default."
)
@click.option(
    "--filters-of",
    "filter_layers",
    multiple=True,
    metavar="L",
    help="Layers whose filters are shown; three over the whole depth by default.",
)
@click.option(
    "--heatmaps-of",
    "heatmap_layer",
    default="auto",
    show_default=True,
    metavar="L",
    help="Layer of the heatmaps: its path, auto, or best.",
)
@click.option(
    "--channels",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Number of filters of each layer; 0 leaves them out.",
)
@click.option("--check", is_flag=True, help="Measure how far to trust the first heatmap of each image.")
@SEED
@click.option("--title", help="Title of the page.")
@model_options
@common
def report(
    shell: Shell, model: str, images: tuple[str, ...], page: str, opening: dict[str, object], **choices: Choice
) -> None:
    """Write one HTML page about MODEL and each IMAGE: predictions, heatmaps, layers and filters."""
    from convscope.reports import report as technique

    given_images = read(shell, images)
    network = opened(shell, model, opening)
    with shell.progress() as progress:
        data = technique(network, given_images, page, progress=progress, **choices)
    shell.result(data, lambda: shell.print(f"report in {page}"))


@click.command()
@click.option(
    "--out",
    "-o",
    default="convscope-demo",
    show_default=True,
    metavar="DIR",
    type=FOLDER,
    callback=writable,
    help="Folder to write to.",
)
@SEED
@model_options
@common
def demo(shell: Shell, out: str, seed: int, opening: dict[str, object]) -> None:
    """Show all three techniques on the small network and the images that convscope ships; needs no connection."""
    from convscope.demo import CLASSES, MODEL, run

    network = opened(shell, str(MODEL), {**opening, "classes": opening["classes"] or CLASSES})
    with shell.progress() as progress:
        data = run(network, out, seed=seed, progress=progress)
    shell.result(data, lambda: shell.print(f"the demo's report is {Path(out) / 'report.html'}"))
