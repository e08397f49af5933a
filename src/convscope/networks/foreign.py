"""Names for values of other libraries that a type checker can't follow; whoever takes one says what it asks of it."""

from __future__ import annotations

from typing import Any

Tensor = Any  # of TensorFlow, JAX or PyTorch, whichever the network runs on
KerasModel = Any
KerasLayer = Any  # or an operation of a Keras model, which has a name and is called like a layer
KerasVariable = Any
Operation = Any  # what a layer of a network is made of: a `KerasLayer`, a module or a function of PyTorch
TorchModule = Any  # where PyTorch is not imported yet
Message = Any  # of Protocol Buffers: a part of an ONNX file or of a SavedModel
Attribute = Any  # of a node of an ONNX file: a number, a text, a list of these, `np.ndarray`, a `Body` or None
Exported = Any  # an `ExportedProgram` of PyTorch
Structure = Any  # tensors in lists, tuples and dictionaries, as what a model takes and returns
