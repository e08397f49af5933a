"""`convscope activations`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from convscope.cli.options import IMAGES, OUT, Choice, common, model_options, opened, read, written
from convscope.cli.shell import Shell
from convscope.errors import UsageError, option

if TYPE_CHECKING:
    from convscope.networks import Layer
    from convscope.results import Activations


@dataclass(frozen=True)
class Options:
    """The options of the command; each field is one."""

    layers: str | None
    channel: int | None
    shared: bool
    memory: str
    raw: bool


@click.command()
@click.argument("model")
@IMAGES
@OUT
@click.option(
    "--layers",
    metavar="GLOB|KINDS",
    help='Layers to show: kinds, globs or places such as "conv|pool" (the default), "block1_*", ":8".',
)
@click.option("--channel", type=int, metavar="N", help="Draw this channel of each layer instead of the sheets.")
@click.option("--shared", is_flag=True, help="Draw each sheet on one scale, so that magnitudes can be compared.")
@click.option(
    "--memory", default="2GB", show_default=True, metavar="SIZE", help="Memory above which layers run in groups."
)
@click.option("--raw", is_flag=True, help="Write the raw arrays too (arrays/LAYER.npy), for convscope.load.")
@model_options
@common
def activations(
    shell: Shell, model: str, images: tuple[str, ...], out: str, opening: dict[str, object], **given: Choice
) -> None:
    """Show the activations of the layers of MODEL for each IMAGE."""
    from convscope import store
    from convscope.techniques.activations import activations as technique

    options = Options(**given)
    given_images = read(shell, images)
    network = opened(shell, model, opening)
    _check_channel(shell, network.select(options.layers), options.channel)
    drawing = {"shared": options.shared, "channel": options.channel, "raw": options.raw}
    with shell.progress() as progress:
        result = technique(network, given_images, options.layers, memory=options.memory, scratch=out, progress=progress)
        files = store.save(result, out, progress=progress, **drawing)
    shell.result(written(out, files), lambda: _table(shell, result, out))


def _check_channel(shell: Shell, chosen: Sequence[Layer], channel: int | None) -> None:
    """A channel that no chosen layer has is an error; one that only some have is drawn where it is."""
    from convscope.networks.layers import check_channel

    if channel is None:
        return
    most = max((layer.channels for layer in chosen if layer.spatial), default=0)
    if not most:
        raise UsageError(
            f"none of the chosen layers has a map, so there is no channel to draw; leave {option('channel')} out.",
            code="no-map-layer",
        )
    check_channel(channel, most, "the widest chosen layer")
    without = [layer.path for layer in chosen if not layer.spatial or channel >= layer.channels]
    if without:
        shell.say(f"  without channel {channel}, so not drawn: {', '.join(without)}")


def _table(shell: Shell, result: Activations, out: str) -> None:
    rows = [row.cells for row in result.statistics]
    shell.table("activations", ["image", "layer", "shape", "max", "zeros", "empty"], rows, right=(3, 4, 5))
    shell.print(f"sheets and numbers in {out}")
