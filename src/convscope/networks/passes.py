"""The request for one run of a network (`Pass`), and its result (`Record`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from convscope.errors import UsageError, nearest
from convscope.networks.foreign import Structure, Tensor

Rule = Callable[[Tensor], Tensor]
Reduction = Callable[[Tensor], Structure]
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Pass:
    """One request for one run of the network. It is hashable, so it is part of the key of a compiled program.

    Every runtime follows each field, or refuses it with a `UsageError`.

    Attributes:
        record: paths of the layers whose output is recorded.
        replace: paths of the layers whose output a rule replaces; the rules are given beside the request.
        replace_preactivations: paths of the layers where a rule changes the argument of the layer's own non-linearity.
        preactivations: paths whose non-linearity is left out, so that its argument is recorded and passed on
            instead of its output; see `Network.nonlinearities`.
        logits: the softmax or sigmoid of the head is left out.
        stop: the run ends when all that is recorded and replaced has been computed; there are no logits then.
        precision: "bfloat16" for operations in float32; with "float32" the network computes as it was opened.
            Recorded and returned is float32 in either case.
        folded: batch norms of fixed statistics are one multiplication and addition, exact up to rounding; only where
            `Network.folds_norms`.

    Example:
        >>> Pass(record=("conv1",), stop=True) == Pass(record=("conv1",), stop=True)
        True
    """

    record: tuple[str, ...] = ()
    replace: tuple[str, ...] = ()
    replace_preactivations: tuple[str, ...] = ()
    preactivations: tuple[str, ...] = ()
    logits: bool = True
    stop: bool = False
    precision: str = "float32"
    folded: bool = False

    @property
    def taps(self) -> frozenset[str]:
        """Paths of the layers whose output is recorded or replaced."""
        return frozenset((*self.record, *self.replace))

    @property
    def paths(self) -> frozenset[str]:
        """All paths that are named."""
        return self.taps | frozenset((*self.replace_preactivations, *self.preactivations))

    def check(self, rules: Iterable[str], reductions: Iterable[str], known: Mapping[str, object]) -> None:
        """Make sure that the request fits its rules and reductions, and the network.

        Args:
            rules, reductions: the paths that they are given for.
            known: the layers at this size of image, by path.

        Raises:
            UsageError: a path is not known, a rule is missing or not asked for, or a precision is not known.
        """
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"precision {self.precision!r} is not known; expected {' or '.join(PRECISIONS)}.",
                code="precision-unknown",
                name=self.precision,
            )
        for path in self.paths:
            if path not in known:
                raise UsageError(
                    f"no layer {path!r} runs at this size of image; {nearest(path, known)}",
                    code="layer-unknown",
                    name=path,
                )
        wanted, given = {*self.replace, *self.replace_preactivations}, set(rules)
        if wanted != given:
            raise UsageError(
                f"expected a rule for each of {sorted(wanted)}, found rules for {sorted(given)}.",
                code="rules-misfit",
                expected=sorted(wanted),
                found=sorted(given),
            )
        if not set(reductions) <= set(self.record):
            raise UsageError(
                f"expected reductions of {sorted(self.record)}, found some of {sorted(reductions)}.",
                code="rules-misfit",
                expected=sorted(self.record),
                found=sorted(reductions),
            )


PLAIN = Pass()


@dataclass(frozen=True)
class Record:
    """The result of one run of the network, as tensors of its framework.

    Attributes:
        logits: `(n, classes)`, see `Head.logits`; None if the run stopped before the output.
        activations: for each recorded path `(n, h, w, c)` or `(n, c)`, float32, or the reduction of it.

    Example:
        >>> def kept(network, request):
        ...     return lambda run, x: run(x, request).activations["average"]
        >>> x = network.tensor(np.zeros((2, 224, 224, 3), np.float32))
        >>> network.numpy(network.program(kept, Pass(record=("average",), stop=True))(x)).shape
        (2, 96)
    """

    logits: Tensor
    activations: Mapping[str, Structure]


class Run(Protocol):
    """The network inside of a compiled program.

    Example:
        >>> def largest(network, request):
        ...     return lambda run, x: network.ops.max(run(x, request).activations["average"], axis=-1)
        >>> x = network.tensor(np.zeros((2, 224, 224, 3), np.float32))
        >>> network.numpy(network.program(largest, Pass(record=("average",), stop=True))(x)).shape
        (2,)
    """

    def __call__(
        self,
        x: Tensor,
        request: Pass = PLAIN,
        rules: Mapping[str, Rule] | None = None,
        reductions: Mapping[str, Reduction] | None = None,
    ) -> Record:
        """One run on images.

        Args:
            x: images `(n, h, w, c)` after preprocessing.
            request: the request.
            rules: for each path in `replace` or `replace_preactivations` from an activation, channels last and
                float32, to its replacement.
            reductions: for some of the recorded paths from an activation to the recorded reduction of it.

        Raises:
            UsageError: this runtime can't follow the request; ModelError: a layer did not run.
        """
