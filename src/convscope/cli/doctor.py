"""`convscope doctor`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from convscope.cli.options import common, model_options, ready
from convscope.cli.shell import FAILED, Shell

if TYPE_CHECKING:
    from convscope.diagnosis import Diagnosis


@click.command()
@click.argument("model")
@click.argument("image", required=False)
@model_options
@common
def doctor(shell: Shell, model: str, image: str | None, opening: dict[str, object]) -> None:
    """Report what convscope detects about MODEL, with what certainty, and whether the techniques work on it.

    The dry run takes IMAGE, or an image that convscope draws. Exits with 1 if something does not work.
    """
    from convscope.diagnosis import doctor as examine
    from convscope.networks import Named

    options = ready(Named(model), opening)
    found = examine(model, image, **options)
    data = found.to_json()
    shell.result(data, lambda: _diagnosis(shell, found), essential=True)
    if not found.ok:
        sys.exit(FAILED)


def _diagnosis(shell: Shell, found: Diagnosis) -> None:
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


def _diagnosed(found: Diagnosis) -> dict[str, str]:
    """The known properties of the file and the network, by name."""
    facts = {}
    if found.file:
        facts["file"] = f"{found.file['path']}, {found.file['bytes']:,} bytes, {found.file['kind']}"
    if found.network:
        network, inputs, layers = found.network, found.network["input"], found.layers
        colours = {1: "grey", 3: "RGB"}.get(inputs["channels"], f"{inputs['channels']} channels")
        facts |= {
            "framework": f"{network['framework']}, {network['backend']}",
            "opened": "; ".join(network["opened"]) or "unchanged",
            "input": f"{inputs['name']}: {inputs['height']}x{inputs['width']} {colours}"
            + (", any size is possible" if inputs["free_size"] else ""),
            "preprocessing": network["preprocessing"]["text"],
            "output": f"{network['output']}: {network['head']['text']}",
            "layers": ", ".join(f"{count} {kind}" for kind, count in layers["kinds"].items()),
            "activations": f"{len(layers['activations'])} layers by default",
            "heatmap": f"at {layers['heatmap']}" if layers["heatmap"] else "no layer with a map",
        }
    if found.resemblance is not None:
        facts["image"] = found.resemblance.text
    return facts
