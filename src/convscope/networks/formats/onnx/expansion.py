"""How large an ONNX graph will be when its functions are unfolded."""

from __future__ import annotations

from convscope import limits
from convscope.errors import ModelError
from convscope.networks.formats.onnx.content import Body, FileNode, OnnxFile


def check_expansion(file: OnnxFile) -> None:
    """Count the nodes that calls of functions unfold to, and the levels, without unfolding them.

    Raises:
        ModelError: a function calls itself, or there would be too many nodes or levels.
    """
    nodes, depth = _Expansion(file).of(file.graph)
    limit = limits.current()
    for name, found, most in (("nodes", nodes, limit.nodes), ("depth", depth, limit.depth)):
        if found > most:
            what = "levels" if name == "depth" else "nodes"
            count = f"{found} {what}" if found < 10**9 else f"over {10**9} {what}"
            raise ModelError(
                f"the functions of {file.path} unfold to {count} ({limits.how_to_raise(name)}).",
                code="input-too-large",
                limit=name,
            )


class _Expansion:
    """Nodes and levels of each function, found once."""

    def __init__(self, file: OnnxFile) -> None:
        self._file, self._limit = file, limits.current()
        self._known: dict[tuple[str, str, str], tuple[int, int]] = {}
        self._open: list[tuple[str, str, str]] = []

    def of(self, body: Body) -> tuple[int, int]:
        """Nodes and levels of a body."""
        inner = [self._of_node(node) for node in body.nodes]
        return sum(nodes for nodes, _ in inner), 1 + max((depth for _, depth in inner), default=0)

    def _of_node(self, node: FileNode) -> tuple[int, int]:
        parts = [self.of(value) for value in node.attributes.values() if isinstance(value, Body)]
        if node.function in self._file.functions:
            parts.append(self._of_function(node.function))
        return 1 + sum(nodes for nodes, _ in parts), max((depth for _, depth in parts), default=0)

    def _of_function(self, key: tuple[str, str, str]) -> tuple[int, int]:
        if key in self._open:
            raise ModelError(
                f"{self._file.path} can't be computed: its function {key[1]!r} calls itself.",
                code="function-recursive",
                path=str(self._file.path),
                name=key[1],
            )
        if len(self._open) >= self._limit.depth:
            raise ModelError(
                f"{self._file.path} nests functions too deep ({limits.how_to_raise('depth')}).",
                code="input-too-large",
                limit="depth",
            )
        if key not in self._known:
            self._open.append(key)
            self._known[key] = self.of(self._file.functions[key])
            self._open.pop()
        return self._known[key]
