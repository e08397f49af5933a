"""ONNX files as PyTorch modules that can be differentiated, with their known image inputs and origin."""

from __future__ import annotations

from collections.abc import Collection

from convscope.errors import ModelError, UsageError, nearest
from convscope.networks.formats.files import ModelFile
from convscope.networks.formats.onnx import files as onnx_files
from convscope.networks.formats.onnx.content import Body, OnnxFile, Shape
from convscope.networks.formats.onnx.module import OnnxModule, module_of
from convscope.networks.inputs import check_dimensions
from convscope.networks.torch.modules import OpenedModule


def read(file: ModelFile, image: str | None = None, fed: Collection[str] = ()) -> OpenedModule:
    """An ONNX file as a module.

    Args:
        file: of that kind.
        image: the name of the input that gets the image; the first that fits where None.
        fed: names of the inputs that are fed.

    Raises:
        ModelError: it is damaged, lacks its external data, takes no image, uses what can't be converted, by name, or
        goes beyond the limits; UsageError: there is no such input for images.
    """
    found = onnx_files.read(file.path)
    image = _image(found, image, fed)
    shape = found.inputs[image].shape
    last = _is_channels_last(found.graph, image, shape)
    module = module_of(found, image)
    return OpenedModule(
        module,
        file.source(*_notes(found, module, last), beside=found.beside),
        # Whatever batch is declared, others are passed.
        input_shape=None if shape is None else (None, *shape[1:]),
        input=image,
        name=file.path.stem,
        channels_last_input=last,
    )


def _notes(file: OnnxFile, module: OnnxModule, last: bool) -> tuple[str, ...]:
    notes = [f"ONNX, operator set {file.opset}, IR version {file.ir_version}"]
    notes += [f"made by {file.made_by}"] if file.made_by else []
    notes += ["takes images (n, h, w, c)"] if last else []
    notes += ["of half precision, computed with in float32"] if module.widened else []
    if any(step.node.operator == "QuantizeLinear" for step in module.steps):
        notes.append("quantized; computed with in float, values rounded as in the file, gradients as if they were not")
    return tuple(notes)


def _image(file: OnnxFile, asked: str | None, fed: Collection[str]) -> str:
    """The input for the image: the one that was asked for, the first of four axes, or of no declared shape."""
    inputs = file.inputs
    if asked is not None:
        return _asked(file, asked)
    inputs = {name: item for name, item in inputs.items() if name not in fed} or inputs
    for fits in (lambda shape: shape is not None and len(shape) == 4, lambda shape: shape is None):
        for name, item in inputs.items():
            if fits(item.shape):
                return name
    if any(node.operator in ("Conv", "ConvTranspose") for node in file.graph.nodes):
        ranks = [(f"the input {name} {item.text}", len(item.shape or ())) for name, item in inputs.items()]
        check_dimensions(str(file.path), [(what, rank - 2) for what, rank in ranks if rank in (3, 5)])
    found = "; ".join(f"{name} {item.text}" for name, item in inputs.items()) or "none"
    raise ModelError(
        f"{file.path} has no input for an image (n, c, h, w); its inputs: {found}.",
        code="input-shape",
        path=str(file.path),
        names=list(inputs),
    )


def _asked(file: OnnxFile, name: str) -> str:
    if name not in file.inputs:
        raise UsageError(f"no input {name!r}; {nearest(name, file.inputs)}", code="input-unknown", name=name)
    item = file.inputs[name]
    if item.shape is not None and len(item.shape) != 4:
        raise UsageError(
            f"the input {name!r} takes no image (n, c, h, w): it is {item.text}.", code="input-shape", name=name
        )
    return name


# What may stand between an image and the transposition that brings its channels to the front.
_BEFORE = {"Cast", "Identity", "Add", "Sub", "Mul", "Div", "Clip", "QuantizeLinear", "DequantizeLinear"}


def _is_channels_last(graph: Body, image: str, shape: Shape | None) -> bool:
    """Whether images enter as (n, h, w, c): the shape says so, or the graph brings the channels to the front."""
    if shape is not None and shape[1] in (1, 3):
        return False
    return (shape is not None and shape[3] in (1, 3)) or _is_turned(graph, image)


def _is_turned(graph: Body, image: str) -> bool:
    names = {image}
    for node in graph.nodes:
        if node.operator == "Transpose" and names & set(node.inputs[:1]):
            return node.attributes.get("perm") == [0, 3, 1, 2]
        if node.operator in _BEFORE and names & set(node.inputs):
            names.update(node.outputs)
    return False
