"""`convscope heatmap`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from convscope.cli.options import (
    IMAGES,
    OUT,
    SEED,
    Choice,
    common,
    model_options,
    opened,
    read,
    read_and_left_out,
    say_notes,
    several,
    written,
)
from convscope.cli.shell import FAILED, Shell
from convscope.errors import UsageError, option

if TYPE_CHECKING:
    from convscope.events import Progress
    from convscope.images.image import InputImage
    from convscope.networks import Network
    from convscope.results import Heatmap


@dataclass(frozen=True)
class Options:
    """The options of the command; each field is one."""

    target: str
    against: str | None
    like: str | None
    layer: str
    method: str
    method_options: dict[str, str]
    smooth: bool
    budget: int | None
    check: bool
    fast: bool
    seed: int
    opacity: float
    signed: bool
    contours: bool


def _method_options(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
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
            raise click.BadParameter(f"{text!r} is not understood; expected NAME=VALUE, or help.", context, parameter)
        found[name.strip()] = value
    return found


@click.command()
@click.argument("model")
@IMAGES
@OUT
@click.option(
    "--class",
    "target",
    default="top",
    show_default=True,
    metavar="C",
    help="Class to explain, by number or name; top, or top3 for the three best; a channel or a unit of a layer, as "
    'conv3:17 or conv3:17@4,5; or a sum of these, such as "tabby - lynx" or "a:3 + 0.5*b:9".',
)
@click.option(
    "--against", metavar="C", help="Class to compare with, by number or name, or rival (the best of the others)."
)
@click.option("--like", metavar="IMAGE", help="Explain the similarity to this image instead of a class.")
@click.option(
    "--layer",
    default="auto",
    show_default=True,
    metavar="L",
    help="Layer by path; auto: the last with a map that the target is computed from; best: the best of up to four by "
    "--check's measures; several, separated by commas, are fused.",
)
@click.option(
    "--method",
    default="grad-cam",
    show_default=True,
    metavar="M",
    help="Method, as listed in docs/heatmaps.md; several, separated by commas; or all, for those that need one pass.",
)
@click.option(
    "--option",
    "method_options",
    multiple=True,
    metavar="NAME=VALUE",
    is_eager=True,
    callback=_method_options,
    help="Option of the method, such as patch=16 of occlusion; may be repeated; with several methods, it is set for "
    "each that has it. help lists all options.",
)
@click.option("--smooth", is_flag=True, help="Average over shifted and mirrored copies of the image.")
@click.option(
    "--budget",
    type=click.IntRange(min=2),
    metavar="N",
    help="Number of passes per image by score-cam, rise, smoothgrad or integrated-gradients.",
)
@click.option("--check", is_flag=True, help="Measure how far to trust each heatmap.")
@click.option("--fast", is_flag=True, help="Score masked images in bfloat16 where that is faster (score-cam, rise).")
@SEED
@click.option(
    "--opacity",
    type=click.FloatRange(0, 1),
    default=0.7,
    show_default=True,
    help="Opacity of the heatmap on the image.",
)
@click.option("--signed", is_flag=True, help="Also draw regions that lower the score.")
@click.option("--contours", is_flag=True, help="Draw lines at quarters of the highest value.")
@model_options
@common
def heatmap(
    shell: Shell, model: str, images: tuple[str, ...], out: str, opening: dict[str, object], **given: Choice
) -> None:
    """Show which regions of each IMAGE support a class."""
    from convscope import store
    from convscope.render.overlay import Paint

    options = Options(**given)
    methods = _methods(options)
    # A file that was named has to be an image; those of a folder or a table need not.
    several_in_one = any(os.path.isdir(image) or image.lower().endswith(".csv") for image in images)
    given_images, left_out = read_and_left_out(shell, images) if several_in_one else (read(shell, images), 0)
    if several_in_one:
        say_notes(shell, given_images)
    network = opened(shell, model, opening)
    if options.like and options.target != "top":
        raise UsageError(
            f"{option('target')} and {option('like')} are two things to explain; give one of them.",
            code="two-targets",
            options=["target", "like"],
        )
    with shell.progress() as progress:
        result = _computed(network, given_images, methods, options, progress)
        files = store.save(result, out, paint=Paint(options.opacity, options.signed, contours=options.contours))
    if len(given_images) > 1 and not options.like and not options.target.startswith("top"):
        shell.say(f"  explained for all {len(given_images)} images: {result.rows[0].class_name}")
    shell.result(written(out, files), lambda: _table(shell, result, out, options.method))
    if left_out:
        sys.exit(FAILED)


def _computed(
    network: Network, images: Sequence[InputImage], methods: object, options: Options, progress: Progress
) -> Heatmap:
    from convscope.techniques.heatmaps import heatmap as technique
    from convscope.techniques.heatmaps import similarity_target

    return technique(
        network,
        images,
        similarity_target(network, options.like) if options.like else options.target,
        several(options.layer),
        method=methods,
        against=options.against,
        smooth=options.smooth,
        budget=options.budget,
        check=options.check,
        seed=options.seed,
        precision="auto" if options.fast else "float32",
        progress=progress,
    )


def _methods(options: Options) -> object:
    """The methods with their options, or "all".

    Raises:
        UsageError: no such method or option, or a value that an option can't have.
    """
    from convscope.techniques.heatmaps import as_methods, with_options

    methods = as_methods(several(options.method))
    twice = (
        sorted({one.sampled for one in methods} & options.method_options.keys()) if options.budget is not None else []
    )
    if twice:
        raise UsageError(
            f"{option('budget')} and --option {twice[0]}=... set the same number; give one of them.",
            code="two-budgets",
            option=twice[0],
        )
    given = options.method_options
    return with_options(methods, given) if given or options.method != "all" else options.method


def _table(shell: Shell, result: Heatmap, out: str, method: str) -> None:
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
    if parameters.against_choice == "pair":
        shell.print(
            "explained: each class against the other, since of two classes under one softmax only the difference "
            f'decides; --class "{_one_logit(result)}" explains one logit alone'
        )
    for name, reason in parameters.left_out.items():
        shell.print(f"without {name}: {reason}")
    if parameters.layer_choice == "best":
        shell.print(f"layer {parameters.layer}: {parameters.layer_rule}")
    shell.print(f"overlays and raw maps in {out}")


def _one_logit(result: Heatmap) -> str:
    """The target of the first row's logit alone."""
    from convscope.objectives import logit

    return str(logit(result.rows[0].class_index or 0))
