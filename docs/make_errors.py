"""Write the list of error codes, errors.md, from the source: `python docs/make_errors.py`.

With `--check` nothing is written; the exit status is 1 where the page is not up to date.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parent / "errors.md"
SOURCE = Path(__file__).parents[1] / "src" / "convscope"

# One kind of fault for each code, in words that hold for every place that raises it.
MEANINGS: Mapping[str, str] = {
    "activations-invalid": "Activations to compare with are not finite numbers (h, w, c) or (c,).",
    "activations-misfit": "Activations to compare with have another shape than those of the layer.",
    "already-open": "Options for opening were given with a network or a spec, which has its own.",
    "architecture-too-large": "The layers that a file describes declare many more weights than the file holds.",
    "argument-missing": "A scripted module takes arguments beside the image that have no default.",
    "argument-of-session": "A request has an argument that the session gives.",
    "argument-too-small": "A number is below the least that its argument allows.",
    "arguments-misfit": "A request has arguments that the technique does not take.",
    "array-misfit": "An array to draw has another shape than a tile or a sheet needs.",
    "attribute-set": "A scripted module sets an attribute in a pass.",
    "backend-broken": "A library is installed, and its import fails.",
    "backend-in-use": "Another backend of Keras is in use in this process.",
    "backend-missing": "A library that is needed is not installed.",
    "backend-unknown": "No backend has this name.",
    "backend-version": "A library is installed in a version that convscope does not use.",
    "baselines-have-images": "Natural images were given twice, with the call and in the baselines.",
    "baselines-lacking": "The baselines do not cover an objective.",
    "baselines-misfit": "The baselines were made for another network, size or precision.",
    "byte-order": "A file was written on a machine of another byte order.",
    "call-of-constants": "A model in a file calls a layer on constants alone.",
    "channel-out-of-range": "A layer has fewer channels.",
    "channel-range": "A range of channels ends before it starts.",
    "channels-misfit": "An image has another number of channels than the network takes.",
    "channels-missing": "No channels were given.",
    "channels-not-understood": "The text of a choice of channels can't be read.",
    "class-against-itself": "A class is to be compared with itself.",
    "class-ambiguous": "Several classes have this name.",
    "class-names-invalid": "Class names have another form than a list of names.",
    "class-names-misfit": "The number of class names is not that of the network's classes.",
    "class-out-of-range": "The network has fewer classes.",
    "class-unknown": "No class has this name.",
    "classes-unnamed": "A class was given by name, and the names of the classes are not known.",
    "code-failed": "The user's own code raised an error.",
    "code-in-file": "An old file holds code that can't be run here.",
    "colour-map-unknown": "No colour map has this name.",
    "concepts-out-of-range": "The number of concepts is not one that the activations allow.",
    "config-invalid": "The description of a model's layers in a file is not one that Keras can build.",
    "crop-misfit": "A crop leaves nothing of an image.",
    "device-misfit": "A network is on another device than the one that was asked for.",
    "device-unusable": "A device is not there, or can't be used.",
    "direction-invalid": "The numbers of a direction are not finite, or there are none.",
    "dimensions-unsupported": "A network has convolutions for signals or volumes, and none for images.",
    "direction-misfit": "A direction has another number of values than the layer has channels.",
    "disk-full": "The disk has no room for the arrays.",
    "feed-invalid": "What was given for another input of the network can't be read.",
    "feed-is-image": "The input that gets the image is fed, or all inputs are.",
    "feed-misfit": "What is fed to an input has another shape than the input takes.",
    "feed-missing": "Another input of the network has no values.",
    "feed-not-in-spec": "A spec has arrays for other inputs, which it can't be written with.",
    "file-changed": "A file has changed since the spec was made.",
    "file-damaged": "A file is damaged or cut short.",
    "file-empty": "A file holds nothing.",
    "file-invalid": "A file is not as the programs that write such files make it.",
    "file-missing": "There is no such file.",
    "file-not-writable": "A file can't be written.",
    "file-of-another-kind": "A file is of another kind than the one that was asked for there.",
    "file-unknown": "A file is of no kind that convscope opens.",
    "file-unreadable": "The system does not let a file be read.",
    "folder-unreadable": "A folder is missing, or can't be listed.",
    "format-unknown": "No format of an animation has this name.",
    "function-ambiguous": "A file names a function of which there are several, and does not tell which.",
    "function-arguments": "A function that makes a network does not take these arguments.",
    "function-missing": "A file of Python code was given without the name of a function in it.",
    "function-recursive": "A function in a file calls itself.",
    "function-unknown": "A file of Python code has no such function.",
    "gradient-cut": "The graph of a network is cut, so that no gradient comes back.",
    "gradient-failed": "A network runs, and the framework can't compute its gradient.",
    "grid-empty": "A grid has no tile or no column.",
    "head-not-pooled": "CAM needs global average pooling and one dense layer after the layer.",
    "graph-model": "A TensorFlow.js file holds a graph without layers.",
    "head-unknown": "No activation of the output has this name.",
    "image-empty": "An image has no pixels.",
    "image-is-address": "An address on the network, or a text that holds an image, was given as the path of an image.",
    "image-kind": "An image was given as something else than a path, an array, a Pillow image or the bytes of a file.",
    "image-missing": "An objective or a recipe needs an image, and none was given.",
    "image-not-finite": "An array that was given as an image has values that are no finite numbers.",
    "image-not-regularized": "An objective raises the image itself, which can only be regularized.",
    "image-range": "An array that was given as an image has values of another range than those of images.",
    "image-too-small": "Nothing is left of images of this size at the layer.",
    "images-deeper": "A warning: a folder is read, and the images of folders inside it are not.",
    "images-left-out": "A warning: some images can't be read and are left out.",
    "images-unreadable": "None of the images, or not all that are needed, can be read.",
    "inference-tensors": "Weights were made under torch.inference_mode(), and allow no gradients.",
    "input-not-numbers": "An input of a model takes something else than a tensor of numbers.",
    "input-shape": "An input of a model is not one for images.",
    "input-shape-missing": "A model in a file has no input shape.",
    "input-too-large": "Something is beyond a limit; `limit` names the one to raise, where one can be.",
    "input-unknown": "The model has no input of this name.",
    "is-folder": "A folder was given where a file is needed.",
    "kind-refused": "A file is of a kind that is never loaded, because that runs code.",
    "layer-after-target": "The layer comes after what is explained.",
    "layer-ambiguous": "Several layers have this name.",
    "layer-beside-target": "The layer lies in another branch than what is explained.",
    "layer-class-unknown": "A file has layers of a class that this Keras does not know.",
    "layer-name-invalid": "TensorFlow refuses the name of a layer.",
    "layer-failed": "A layer of the model raised an error in a pass.",
    "layer-not-run": "A layer did not run in a pass, though it did when the model was opened.",
    "layer-unknown": "No layer has this name.",
    "layer-without-channels": "The output of a layer has no channels.",
    "layer-without-map": "The output of a layer is no map (h, w, c).",
    "limit-invalid": "The value of a limit is not one that it can have.",
    "limit-unknown": "No limit has this name.",
    "map-too-large": "The maps of a layer have too many places for the method.",
    "maps-misfit": "A method returned other maps than one for each image.",
    "mask-empty": "A mask has nothing in it.",
    "mask-misfit": "A mask has another shape than the layer.",
    "memory-not-understood": "The text of an amount of memory can't be read.",
    "method-invalid": "What was given as a heatmap method is none.",
    "method-missing": "No heatmap method was given.",
    "method-not-in-result": "The result has no map by this method.",
    "method-option-invalid": "The value of a method's option is not one that it can have.",
    "method-option-unknown": "The method has no option of this name.",
    "method-unknown": "No heatmap method has this name.",
    "model-compiled": "A model is compiled for one machine and has no graph.",
    "model-lazy": "A model has layers that are not made before its first call, which failed.",
    "model-not-runnable": "The model can't be called on an image.",
    "model-quantized": "A model is quantized with whole numbers, which have no gradients.",
    "module-missing": "The module that is to make the network can't be found.",
    "name-not-understood": "The name of code that makes a network can't be read.",
    "needs-trust": "Opening would run code that the file or the name brings, and `trust` was not given.",
    "network-unknown": "A collection has no network of this name.",
    "no-class-scores": "The output of the network has no class scores.",
    "no-frames": "There are no frames for an animation.",
    "no-gradient": "None of the filters that were tried has a gradient.",
    "no-images": "No image was given, or there is none where images were expected.",
    "no-layer-before-scores": "The network has no layer before its scores in which images can be compared.",
    "no-layer-with-a-filter": "The network has no layer that the image passes.",
    "no-map-before-target": "No layer with a map comes before what is explained.",
    "no-layers": "The network has no layers, so there are no activations.",
    "no-map-layer": "None of the layers has a map of more than one cell.",
    "no-map-of-classes": "The output of the network is no map of classes.",
    "no-nonlinearity": "A layer has no non-linearity that can be left out.",
    "no-other-class": "There is no other class to compare with.",
    "no-output": "The model has no output.",
    "no-raw-arrays": "A saved result has no raw arrays.",
    "no-regular-file": "A device, a pipe or a folder was found where a file is needed.",
    "no-relu": "The network has no ReLU, which the method changes.",
    "no-result": "A folder holds no such result.",
    "no-signature": "A SavedModel has no signature that takes one image.",
    "no-such-image": "The result has no image of this name or number.",
    "no-transparency": "The filters have no transparency.",
    "no-weights": "A file holds no weights.",
    "node-failed": "A node of an ONNX graph can't be computed.",
    "not-a-class": "What was given is no class, and a class is needed.",
    "not-a-model": "What was given, or what a file holds, is no model.",
    "not-an-array": "A file holds something else than one array.",
    "not-an-image": "A file is no image of a format that is read.",
    "not-built": "A Keras model has no weights yet.",
    "not-json": "A text is no JSON.",
    "not-numbers": "An array has other values than real numbers.",
    "not-per-image": "A layer's output mixes the images of a batch.",
    "not-text": "A file holds no text in UTF-8.",
    "nothing-positive": "No activation of the layer is positive.",
    "number-too-large": "A scripted module computes a number of more than 64 bits.",
    "objective-invalid": "What was given as an objective is none.",
    "objective-missing": "Neither a layer nor an objective was given.",
    "objective-not-understood": "The text of an objective can't be read; `position` is where.",
    "only-regularizers": "An objective has regularizers alone.",
    "opacity-out-of-range": "An opacity is not between 0 and 1.",
    "operation-unknown": "The list of operations for all frameworks has none of this name.",
    "operator-refused": "A scripted module uses an operator that is not run.",
    "operator-unknown": "An ONNX graph uses operators that can't be converted.",
    "option-misfit": "An option of opening does not fit this kind of model.",
    "order-unknown": "Filters can't be sorted by this.",
    "out-of-memory": "The memory does not suffice.",
    "output-closed": "The standard output of the command is closed.",
    "output-not-finite": "The network returned values that are not finite, though its weights are.",
    "output-not-writable": "The standard output of the command can't be written.",
    "output-unknown": "The model has no output of this name.",
    "own-object-invalid": "An object of the user's lacks an attribute, or has one of another type.",
    "patch-too-large": "A patch is larger than the network's input.",
    "place-out-of-range": "A place is outside of the layer's map.",
    "placeholder-unfed": "A SavedModel needs a value that no signature names.",
    "precision-unknown": "No precision has this name, or the backend does not have it.",
    "preprocessing-misfit": "A preprocessing has a mean or a deviation for another number of channels.",
    "preprocessing-unknown": "No preprocessing has this name.",
    "reader-not-startable": "The process that reads files can't be started.",
    "recipe-of-whole-layers": "A recipe takes whole layers, and channels were given.",
    "recipe-unknown": "No recipe has this name.",
    "regularizers-in-target": "A heatmap was asked for an objective with regularizers.",
    "rendering-too-large": "A rendering has more pixels a side than the format allows.",
    "request-cancelled": "A request was cancelled, or its session was closed.",
    "request-replaced": "A newer request of the same kind took the place of a waiting one.",
    "result-ambiguous": "A folder holds several results that could be meant.",
    "result-invalid": "A saved result is damaged, or was changed.",
    "result-kind-unknown": "There is no such kind of result.",
    "result-of-another-kind": "A file holds a result of another kind.",
    "rival-of-a-map": "The best of the other classes differs from place to place in a map.",
    "rules-misfit": "Replacements or reductions were given for other layers than a pass has.",
    "scaling-unknown": "No scaling of a heatmap has this name.",
    "schema-older": "A result was saved by a development version: make it again.",
    "schema-newer": "A result was saved by a newer version of convscope.",
    "scores-misfit": "An objective of the user's returned something else than a number for each image.",
    "session-closed": "The session is closed.",
    "size-misfit": "The model takes images of another size only.",
    "size-missing": "The size of the images that a model takes is not known.",
    "size-not-taken": "The network does not take images of this size.",
    "size-not-understood": "The text of a size can't be read.",
    "size-unknown": "A map can't be scaled to the size of the network's input, which is not known.",
    "sparse-tensors": "An ONNX file holds sparse tensors.",
    "spec-in-memory": "A spec is of a model in memory, which can't be opened again.",
    "spec-invalid": "A spec in JSON is not as convscope writes it.",
    "table-invalid": "A table of images has no column of paths.",
    "table-unreadable": "A table of images can't be read.",
    "target-invalid": "What was given as a target is none.",
    "targets-misfit": "The number of targets is neither one nor that of the images.",
    "technique-unknown": "No technique has this name.",
    "training-mode": "A model was exported in training mode.",
    "two-budgets": "Two budgets of one method were given.",
    "two-targets": "Two things to explain were given.",
    "unpickling-failed": "A pickled model that was trusted can't be unpickled.",
    "values-unsupported": "A model has values of a type that is not computed with.",
    "version-unsupported": "A file is of a version of its format that is not read.",
    "wait-in-callback": "A callback of a session waits for a request to it.",
    "weight-not-finite": "The weight of a term is not a finite number.",
    "weights-alone": "A file holds weights without an architecture.",
    "weights-ambiguous": "A file of weights has several state dicts that fit the network.",
    "weights-key-unknown": "A file of weights has nothing of this key.",
    "weights-misfit": "Weights do not fit the network.",
    "weights-missing": "A file of weights is not beside its model.",
    "weights-not-fetched": "Pretrained weights can't be downloaded.",
    "weights-not-finite": "A layer has weights that are not finite numbers.",
    "weights-outside": "A model keeps its weights outside of its folder.",
    "weights-unknown": "A collection has no weights of this name.",
}

HEAD = """# Error codes

Written by `python docs/make_errors.py` from the source. Each error of convscope has a code, which stays when its
message is worded better, and the values that the message shows as data:

```python
try:
    network.layer("block9")
except convscope.errors.ConvscopeError as error:
    print(error.code, error.data)  # layer-unknown {'name': 'block9'}
```

A class says what the fault is in (an image, a model, the call), its code says what the fault is. Values of the data in
parentheses are there at some places only. An error that passes on the fault of another keeps its code.
"""


class Made(NamedTuple):
    """One place in the source that makes an error.

    Attributes:
        where: module and line; kind: name of the class.
        codes: the texts that it may have as its code; none where it passes on that of another error.
        passed_on: the code is that of another error.
        data: names of the values; shows: its message has values in it.
    """

    where: str
    kind: str
    codes: tuple[str, ...]
    passed_on: bool
    data: tuple[str, ...]
    shows: bool


def trees() -> dict[str, ast.Module]:
    """Every module of the package, parsed, by its path."""
    paths = sorted(SOURCE.rglob("*.py"))
    return {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def error_classes(modules: Iterable[ast.Module]) -> set[str]:
    """Names of `ConvscopeError` and of the classes that derive from it."""
    classes = [node for tree in modules for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = {"ConvscopeError"}
    while more := {one.name for one in classes if {_last(base) for base in one.bases} & found} - found:
        found |= more
    return found


def places(modules: Mapping[str, ast.Module]) -> Iterator[Made]:
    """Every place that makes one of convscope's errors."""
    classes = error_classes(modules.values())
    for path, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _last(node.func) in classes and not _is_of_click(node.func):
                yield _made(f"{path}:{node.lineno}", node)


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_of_click(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and _last(node.value) == "click"


def _made(where: str, call: ast.Call) -> Made:
    given = next((keyword.value for keyword in call.keywords if keyword.arg == "code"), None)
    branches = [given.body, given.orelse] if isinstance(given, ast.IfExp) else [given]
    codes = tuple(str(one.value) for one in branches if isinstance(one, ast.Constant))
    data = tuple(keyword.arg or "" for keyword in call.keywords if keyword.arg != "code")
    passed_on = isinstance(given, ast.Attribute) and given.attr == "code"
    return Made(where, _last(call.func), codes, passed_on, data, any(map(_is_value, _shown(call))))


def _shown(call: ast.Call) -> Iterator[ast.expr]:
    """What the f-strings of the message put into it."""
    for node in call.args[:1]:
        yield from (part.value for part in ast.walk(node) if isinstance(part, ast.FormattedValue))


# What a message shows beside the values of the fault: how to spell an option, what there is, how to raise a limit.
_HELP = {"option", "nearest", "how_to_raise", "listed"}


def _is_value(shown: ast.expr) -> bool:
    """True for a value of the fault; false for advice and for constants of the source."""
    if isinstance(shown, ast.Call) and _last(shown.func) in _HELP:
        return False
    return not _last(shown).isupper()


def page() -> str:
    """The whole page."""
    found: dict[str, list[Made]] = {}
    for made in places(trees()):
        for code in made.codes:
            found.setdefault(code, []).append(made)
    rows = [_row(code, found[code]) for code in sorted(found)]
    return HEAD + "\n| code | class | data | meaning |\n| --- | --- | --- | --- |\n" + "".join(rows)


def _row(code: str, made: list[Made]) -> str:
    kinds = ", ".join(f"`{kind}`" for kind in sorted({one.kind for one in made}))
    names = dict.fromkeys(name for one in made for name in one.data if name)
    always = [name for name in names if all(name in one.data for one in made)]
    some = [name for name in names if name not in always]
    data = ", ".join([*(f"`{name}`" for name in always), *(f"(`{name}`)" for name in some)])
    return f"| `{code}` | {kinds} | {data} | {MEANINGS[code]} |\n"


def main() -> None:
    """Write the page, or check it."""
    made = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made, encoding="utf-8")
    elif made != PAGE.read_text(encoding="utf-8"):
        sys.exit(f"{PAGE} is not up to date: run python docs/make_errors.py")


if __name__ == "__main__":
    main()
