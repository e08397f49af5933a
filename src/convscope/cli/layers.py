"""`convscope layers`."""

from __future__ import annotations

import click

from convscope.cli.options import common, model_options, opened
from convscope.cli.shell import Shell


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
        for la in network.layers
    ]
    from convscope.results import versions

    description = {"technique": "layers", "network": network.describe(), "versions": versions()}
    data = {"layers": rows, "parameters": network.parameters, "provenance": description, "files": []}

    def table() -> None:
        text = [[la.path, la.kind, "×".join(map(str, la.shape)), f"{la.parameters:,}"] for la in network.layers]
        height, width = network.inputs.size
        title = f"{network.name} · shapes for {height}x{width} pixels · {network.parameters:,} parameters"
        columns = ["layer", "kind", "shape", "parameters"]
        if network.inputs.others:
            columns.append("of input")
            for row, layer in zip(text, network.layers, strict=True):
                row.append(", ".join(layer.inputs))
        shell.table(title, columns, text, right=(3,))

    shell.result(data, table, essential=True)
