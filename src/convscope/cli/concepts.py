"""`convscope concepts`."""

from __future__ import annotations

import click

from convscope.cli.options import IMAGES, OUT, Choice, common, model_options, opened, read, written
from convscope.cli.shell import Shell


@click.command()
@click.argument("model")
@IMAGES
@OUT
@click.option("--count", type=click.IntRange(min=1), default=5, show_default=True, help="Number of regions.")
@click.option(
    "--layer", default="auto", show_default=True, metavar="L", help="Layer by path; auto is the last with a map."
)
@model_options
@common
def concepts(
    shell: Shell, model: str, images: tuple[str, ...], out: str, opening: dict[str, object], **given: Choice
) -> None:
    """Show the regions of all IMAGES that a layer distinguishes, and the classes that each supports."""
    from convscope import store
    from convscope.techniques.heatmaps.concepts import concepts as technique

    given_images = read(shell, images)
    network = opened(shell, model, opening)
    with shell.progress() as progress:
        result = technique(network, given_images, **given, progress=progress)
        files = store.save(result, out)

    def table() -> None:
        rows = [
            [str(row.number), f"{100 * row.share:.1f} %", ", ".join(one.text for one in row.predictions)]
            for row in result.rows
        ]
        shell.table(f"concepts of {result.parameters.layer}", ["concept", "share", "supports"], rows, right=(0, 1))
        shell.print(f"regions in {out}")

    shell.result(written(out, files), table)
