"""The common part of networks of Keras and PyTorch: they are watched once, and their layers are tapped after that."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from math import prod

import numpy as np

from convscope.errors import ModelError, UsageError, option
from convscope.networks.backends import Backend
from convscope.networks.foreign import Structure, Tensor
from convscope.networks.graph import Call, nonlinearities_at
from convscope.networks.grids import GridEffect, from_own_size, with_grids
from convscope.networks.inspection import Inspection, Watched
from convscope.networks.layers import Layer
from convscope.networks.measured import StoredNorm
from convscope.networks.network import Network
from convscope.networks.passes import Pass, Reduction, Rule
from convscope.networks.trace import Calls, Graph, Norm, graph_of, norms_of


class Enough(BaseException):
    """All taps have fired: the rest of the network need not run. Not an Exception, so that no layer catches it."""


class TracedNetwork(Network):
    """A network whose layers are known from a watched run, for each size of image from one of that size.

    Args:
        watched: the model.
        found: what `inspection` found of it.
    """

    _backend: Backend

    def __init__(self, watched: Watched, found: Inspection) -> None:
        super().__init__()
        self._watched = watched
        self.name, self.source, self.inputs = watched.name, watched.source, found.inputs
        self.preprocessing, self.head, self.class_names = found.preprocessing, found.head, found.class_names
        graph = found.graph
        self.output, self.outputs, self.layers = graph.output, tuple(graph.trace.outputs), graph.layers
        self._output_shape: Sequence[int | None] = graph.value.shape
        self._graphs = {found.inputs.size: graph}
        self._measured, self._measurement = found.measured, found.measurement

    def map_reaches_output(self, layer: Layer, record: tuple[str, ...] = ()) -> bool:
        """See `Network.map_reaches_output`. Only tokens with others beside their grid are measured."""
        if layer.tokens is None or not layer.tokens.others:
            return True
        values = self.measured_values
        effect = values.get((GridEffect, record))
        if not isinstance(effect, GridEffect):
            effect = values[GridEffect, record] = GridEffect(self, record)
        return effect(layer)

    def _failing_layer(self, error: BaseException) -> str | None:
        return self._watched.failing_layer(error)

    def _explaining(self, body: Callable[[], Structure]) -> Structure:
        """The result of `body`; an error that comes out of a layer is raised as one that names the layer."""
        try:
            return body()
        except Exception as error:
            problem = self.explained(error)
            if problem is None:
                raise
            raise problem from error

    def value_and_grad(self, function: Callable) -> Callable:
        """See `Network.value_and_grad`."""
        return self._backend.value_and_grad(function)

    def positive_gradient(self, x: Tensor) -> Tensor:
        """See `Network.positive_gradient`."""
        return self._backend.positive_gradient(x)

    def tensor(self, array: np.ndarray) -> Tensor:
        """See `Network.tensor`."""
        return self._backend.tensor(array)

    def numpy(self, tensor: Tensor) -> np.ndarray:
        """See `Network.numpy`."""
        return self._backend.numpy(tensor)

    def layers_at(self, size: tuple[int, int]) -> tuple[Layer, ...]:
        """See `Network.layers_at`."""
        return self._graph_at(size).layers

    def ancestors(self, path: str) -> frozenset[str] | None:
        """See `Network.ancestors`."""
        return self._graph_at(self.inputs.size).ancestors(path)

    def stored_norms(self, count: int) -> tuple[StoredNorm, ...]:
        """See `Network.stored_norms`."""
        stored = (self._stored(norm) for norm in norms_of(self._graph_at(self.inputs.size)))
        return tuple(islice((norm for norm in stored if norm is not None and norm.trained), count))

    def _stored(self, norm: Norm) -> StoredNorm | None:
        """A norm with its statistics; None where it has none of each channel."""
        statistics = self._statistics(norm.call)
        if statistics is None or any(array.shape != (norm.channels,) for array in statistics):
            return None
        return StoredNorm(norm.path, norm.before, *statistics)

    @abstractmethod
    def _statistics(self, norm: Call) -> tuple[np.ndarray, np.ndarray] | None:
        """The mean and the variance that a norm stored in training; None for a norm that stores none."""

    def nonlinearities(self, path: str) -> tuple[str, ...]:
        """See `Network.nonlinearities`."""
        calls = self._calls_at(self.inputs.size)
        found = nonlinearities_at(calls, path)
        return tuple(found) if all(self._can_leave_out(calls, one) for one in found) else ()

    def _can_leave_out(self, calls: Calls, path: str) -> bool:
        """True if the call at `path` has a non-linearity that can be left out of a run."""
        call = calls[path][0]
        return call.activation is not None or call.kind == "activation"

    def _calls_at(self, size: tuple[int, int]) -> Calls:
        return self._graph_at(size).calls

    def _graph_at(self, size: tuple[int, int]) -> Graph:
        if size not in self._graphs:
            graph = graph_of(self._watched.trace(size), self.output)
            self._graphs[size] = with_grids(graph, self.inputs.channels, from_own_size(self._graphs[self.inputs.size]))
        return self._graphs[size]

    def _logits(self, outputs: Mapping[str, Tensor], images: int | None) -> Tensor:
        """The scores of a run on `images`, from the model's outputs by name: see `Head.logits`."""
        output = outputs[self.output]
        self._check_output(output.shape, images)
        rows = self.ops.reshape(self.ops.cast(output, "float32"), (-1, prod(output.shape[1:])))
        return self.head.logits(self.ops, rows)

    def _check_output(self, shape: Sequence[int | None], images: int | None) -> None:
        """Refuse an output that is not a row of values for each image: it has no value for one image.

        Args:
            shape: of the output in this run; None for sides that are unknown while a program is traced.
            images: of this run.

        Raises:
            ModelError: the output has no values, or other rows, in this run or in the first.
        """
        if _has_rows(self._output_shape, 1, exactly=True) and _has_rows(shape, images):
            return
        raise ModelError(
            f"the output {self.output!r} of {self.name} has the shape {tuple(shape)} for a batch of {images}: expected "
            f"a row of scores for each image. Choose another with {option('output')}; activations and filters of "
            "layers need no scores.",
            code="not-per-image",
            shape=tuple(shape),
            images=images,
        )

    def _checked(
        self, request: Pass, rules: Mapping[str, Rule], reductions: Mapping[str, Reduction], calls: Calls
    ) -> None:
        """Refuse a request that this network can't do.

        Raises:
            UsageError: see `Pass.check`; or there is no non-linearity to leave out or to come before, or no norm to
                fold, or the network computes in another precision.
        """
        request.check(rules, reductions, calls)
        without = [path for path in request.preactivations if not self._can_leave_out(calls, path)]
        without += [path for path in request.replace_preactivations if not self._ends_in_nonlinearity(calls, path)]
        if without:
            raise UsageError(
                f"{', '.join(without)}: there is no non-linearity that can be left out or come after.",
                code="no-nonlinearity",
                layers=without,
            )
        if request.folded and not self.folds_norms:
            raise UsageError(
                f"norms are not folded with {self.framework}; ask for it only where `folds_norms`.",
                code="option-misfit",
                name="folded",
            )
        if request.precision != "float32" and not self._can_compute_in(request.precision):
            raise UsageError(
                f"{self.name} was opened in another precision and can't compute in {request.precision}.",
                code="option-misfit",
                name="precision",
            )

    def _ends_in_nonlinearity(self, calls: Calls, path: str) -> bool:
        """True if the operation at `path` ends in a non-linearity of its own, which is called once."""
        return False

    @abstractmethod
    def _can_compute_in(self, precision: str) -> bool:
        """True if a run can compute in `precision` all that computes in float32."""


class Taps:
    """The taps of a run on `images` and their progress; a framework places them."""

    def __init__(
        self,
        calls: Calls,
        request: Pass,
        rules: Mapping[str, Rule],
        reductions: Mapping[str, Reduction],
        images: int | None,
    ) -> None:
        self._images = images
        self._record = {path: reductions.get(path, _itself) for path in request.record}
        self._rules = {path: rules[path] for path in request.replace}
        self._at = {path: calls[path] for path in request.taps}
        self._left = set(request.taps)
        self._stop = request.stop
        self.recorded: dict[str, Structure] = {}

    @property
    def _stops_here(self) -> bool:
        return self._stop and not self._left

    def _is_overwritten(self, call: Call, index: int) -> bool:
        """True if the model goes on and changes this output in place: what a tap keeps of it has to be a copy."""
        return index in call.facts.get("overwritten", ()) and not self._stops_here

    def _check_rows(self, path: str, shape: Sequence[int | None]) -> None:
        """Refuse to record an output that is not the images': the batch may be empty, selected from or taken apart.

        More rows than images are recorded, since windows of images are layers too, but not while a rule adds to them.

        Raises:
            ModelError: it has no values, or fewer rows than images; or, where it is replaced as well, more.
        """
        if _has_rows(shape, self._images, exactly=path in self._rules):
            return
        raise ModelError(
            f"the layer {path} has an output of shape {tuple(shape)} for a batch of {self._images}: expected a row of "
            "values for each image. Choose other layers.",
            code="not-per-image",
            layer=path,
            shape=tuple(shape),
            images=self._images,
        )

    def check_fired(self, early: Sequence[str] = ()) -> None:
        """A tap that did not fire would show an old image or none: refuse. `early` are further paths that are left."""
        left = {*self._left, *early}
        if left:
            raise ModelError(
                f"the layer{'s' if len(left) > 1 else ''} {', '.join(sorted(left))} did not run when the "
                "model was called, so there is nothing to show. Expected the calls seen when the model was opened; "
                "a model whose path depends on its input can't be tapped there.",
                code="layer-not-run",
                layers=sorted(left),
            )


def unless_enough(body: Callable[[], Structure]) -> Structure:
    """The result of `body`, a model's output; None where every tap fired before its end."""
    try:
        return body()
    except Enough:
        return None


def _has_rows(shape: Sequence[int | None], images: int | None, exactly: bool = False) -> bool:
    """True if a tensor has values, and as many rows as there are images, or more where not `exactly`."""
    if not shape or 0 in shape:
        return False
    rows = shape[0]
    if rows is None or images is None:  # not known while a program is traced
        return True
    return rows == images if exactly else rows >= images


def _itself(activation: Tensor) -> Tensor:
    return activation
