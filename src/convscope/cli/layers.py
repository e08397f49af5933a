"""`convscope layers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from convscope.cli.options import common, model_options, opened
from convscope.cli.shell import Shell

if TYPE_CHECKING:
    from convscope.networks import Layer


@click.command()
@click.argument("model")
@model_options
@common
def layers(shell: Shell, model: str, opening: dict[str, object]) -> None:
    """Print the layers of MODEL: path, kind, output shape, parameters."""
    network = opened(shell, model, opening)
    rows = [
        {"path": la.path, "kind": la.kind, "shape": list(la.shape), "parameters": la.parameters, "class": la.class_name}
        | ({"inputs": list(la.inputs)} if network.inputs.others else {})
        | ({} if la.tokens is None else {"tokens": {"front": la.tokens.front, "behind": la.tokens.behind}})
        for la in network.layers
    ]
    from convscope.results import versions

    description = {"technique": "layers", "network": network.describe(), "versions": versions()}
    data = {"layers": rows, "parameters": network.parameters, "provenance": description, "files": []}

    def table() -> None:
        text = [[la.path, la.kind, _shape(la), f"{la.parameters:,}"] for la in network.layers]
        height, width = network.inputs.size
        title = f"{network.name} · shapes for {height}x{width} pixels · {network.parameters:,} parameters"
        columns = ["layer", "kind", "shape", "parameters"]
        if network.inputs.others:
            columns.append("of input")
            for row, layer in zip(text, network.layers, strict=True):
                row.append(", ".join(layer.inputs))
        shell.table(title, columns, text, right=(3,))

    shell.result(data, table, essential=True)


def _shape(layer: Layer) -> str:
    """The shape of an output, with the number of tokens beside a grid of tokens."""
    others = 0 if layer.tokens is None else layer.tokens.others
    text = "×".join(map(str, layer.shape))
    return f"{text} and {others} other token{'s' if others > 1 else ''}" if others else text
