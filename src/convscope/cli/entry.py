"""The command line: each command is a library call with printing around it."""

from __future__ import annotations

import io
import sys

import click

from convscope import terminal
from convscope.cli.activations import activations
from convscope.cli.concepts import concepts
from convscope.cli.doctor import doctor
from convscope.cli.filters import filters
from convscope.cli.heatmap import heatmap
from convscope.cli.layers import layers
from convscope.cli.leaving import Interrupts, explain
from convscope.cli.report import demo, report


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="convscope")
def app() -> None:
    """A microscope for convolutional networks.

    Shows the output of each layer for an image (activations), the images that excite each filter most (filters),
    and which image regions support a class (heatmap). MODEL is a model file (.keras, .h5 of any age, a SavedModel
    folder, a TensorFlow.js model.json, .onnx, TorchScript, .pt2), code that makes a model (file.py:function, with
    --weights FILE or FILE::KEY), or a name such as keras:ResNet50V2, "keras:VGG16?weights=none",
    torchvision:resnet50 or timm:convnext_tiny.
    """


for command in (layers, activations, filters, heatmap, concepts, report, demo, doctor):
    app.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 used wrongly, 130 interrupted."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    terminal.fill_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal has no letters for
    interrupts = Interrupts()
    try:
        with interrupts:
            app.main(args=arguments, prog_name="convscope", standalone_mode=False)
    except BaseException as error:
        explain(KeyboardInterrupt() if interrupts.seen else error, debug)
    finally:
        terminal.let_go()
