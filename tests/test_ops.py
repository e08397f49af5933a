"""The operations that targets may use: complete on every runtime, with NumPy's values, axes and broadcasting."""

import inspect

import models
import numpy as np
import pytest

keras = pytest.importorskip("keras")
from keras import layers  # noqa: E402

from convscope import open_model  # noqa: E402
from convscope.errors import UsageError  # noqa: E402
from convscope.networks.ops import NAMES, Operations  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4)).astype(np.float32)
Y = RNG.normal(size=(3, 1)).astype(np.float32)
POSITIVE = np.abs(X) + 0.1
COUNTS = RNG.integers(-2, 3, (2, 3, 4)).astype(np.int32)
ROUGH = np.array([[0.5, 1.5, -2.5, np.nan], [np.inf, -np.inf, 0.0, -0.4]], np.float32)


@pytest.fixture(scope="module", params=["keras", "torch"])
def network(request):
    if request.param == "keras":
        return open_model(models.seeded(keras.Sequential([layers.Input((8, 8, 3)), layers.Conv2D(4, 3)])))
    torch = pytest.importorskip("torch")
    return open_model(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def logsumexp(x, axis=None, keepdims=False):
    return np.log(np.exp(x.astype(np.float64)).sum(axis=axis, keepdims=keepdims))


def constant(value):
    return lambda *_, **__: value


# What NumPy calls otherwise, or has not.
ORACLES = {
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "softmax": softmax,
    "logsumexp": logsumexp,
    "stop_gradient": lambda x: x,
    "one_hot": lambda x, classes, dtype="float32": np.eye(classes, dtype=dtype)[x],
    "cast": lambda x, dtype: x.astype(dtype),
    "convert_to_tensor": np.asarray,
}
ELEMENTWISE = (
    "abs", "negative", "sign", "exp", "square", "sin", "cos", "tanh", "sigmoid", "relu", "floor", "ceil", "round",
    "stop_gradient",
)  # fmt: skip
OF_POSITIVE = ("log", "log1p", "sqrt", "rsqrt")
OF_TWO = (
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "equal", "not_equal", "less", "less_equal",
    "greater", "greater_equal", "logical_and", "logical_or",
)  # fmt: skip
REDUCTIONS = ["sum", "mean", "var", "std", "max", "min", "prod", "any", "all", "logsumexp"]
AXES = (None, 0, -1, (0, 2), (1, 2), (0, 1, 2))

CASES = [
    *((name, (X,), {}) for name in ELEMENTWISE),
    *((name, (POSITIVE,), {}) for name in OF_POSITIVE),
    *((name, (ROUGH,), {}) for name in ("isfinite", "isnan", "round", "floor", "ceil", "abs", "logical_not")),
    *((name, (COUNTS,), {}) for name in ("abs", "negative", "sign", "square", "logical_not")),
    *((name, pair, {}) for name in OF_TWO for pair in ((X, Y), (Y, X), (X, X), (X, 0.5), (0.5, X), (COUNTS, COUNTS))),
    *((name, (COUNTS, 1), {}) for name in OF_TWO),
    *(("power", pair, {}) for pair in ((POSITIVE, Y), (POSITIVE, 2.0), (2.0, X))),
    *((name, (X,), {"axis": a, "keepdims": k}) for name in REDUCTIONS for a in AXES for k in (False, True)),
    *((name, (COUNTS,), {"axis": a}) for name in ("sum", "mean", "max", "min", "any", "all", "var") for a in (None, 1)),
    *((name, (COUNTS > 0,), {"axis": 1}) for name in ("sum", "mean", "any", "all")),
    *(("count_nonzero", (one,), {"axis": a}) for one in (X, COUNTS) for a in AXES),
    *((name, (X,), {"axis": a}) for name in ("argmax", "argmin") for a in (None, 0, -1)),
    *((name, (X,), {"axis": a}) for name in ("softmax", "cumsum", "sort", "argsort") for a in (0, 1, -1)),
    ("softmax", (X,), {}),
    ("sort", (X,), {}),
    ("argsort", (X,), {}),
    ("sum", (X, (1, 2)), {}),
    ("where", (X > 0, X, Y), {}),
    ("where", (X > 0, X, 0.0), {}),
    ("where", (X > 0, 1.0, 0.0), {}),
    ("clip", (X, -0.5, 0.5), {}),
    ("matmul", (X, np.swapaxes(X, 1, 2)), {}),
    ("matmul", (X, Y[:2].repeat(2, 0)), {}),
    ("einsum", ("abc,bd->ad", X, Y), {}),
    ("reshape", (X, (6, -1)), {}),
    ("reshape", (X, (-1,)), {}),
    ("transpose", (X,), {}),
    ("transpose", (X, (2, 0, 1)), {}),
    ("squeeze", (Y,), {}),
    ("squeeze", (Y,), {"axis": -1}),
    *(("expand_dims", (X,), {"axis": a}) for a in (0, 1, -1)),
    ("broadcast_to", (Y, (2, 3, 4)), {}),
    *(("concatenate", ([X, X],), {"axis": a}) for a in (0, 1, -1)),
    ("concatenate", ([X, X],), {}),
    *(("stack", ([X, X],), {"axis": a}) for a in (0, 1, -1)),
    ("pad", (X, ((1, 0), (0, 2), (1, 1))), {}),
    *(("repeat", (X, 3), {"axis": a}) for a in (0, -1)),
    ("tile", (X, (1, 2, 3)), {}),
    *(("flip", (X,), {"axis": a}) for a in (0, -1)),
    *(("take", (X, np.array(i)), {"axis": a}) for a in (0, 1, -1) for i in ([1, 0, 1], [-1, 0], [[0, 1], [1, 1]], 1)),
    ("take_along_axis", (X, X.argsort(axis=1)), {"axis": 1}),
    ("zeros", ((2, 3),), {}),
    ("zeros", ((2, 3),), {"dtype": "int32"}),
    ("zeros", ((),), {}),
    ("ones", ((2, 3),), {}),
    ("zeros_like", (COUNTS,), {}),
    ("ones_like", (X,), {}),
    ("arange", (5,), {}),
    ("arange", (1, 8, 3), {}),
    ("arange", (3,), {"dtype": "float32"}),
    ("one_hot", (np.array([0, 2, 1]), 4), {"dtype": "float32"}),
    *(("cast", (X, dtype), {}) for dtype in ("float32", "int32", "bool")),
    ("convert_to_tensor", ([[1.0, 2.0]],), {}),
]


def test_every_operation_has_a_case():
    assert {name for name, *_ in CASES} == set(NAMES)


def of_numpy(name, arguments, options):
    oracle = ORACLES.get(name) or getattr(np, name)
    if name == "arange":
        options = {"dtype": "int32", **options}
    return np.asarray(oracle(*arguments, **options))


@pytest.mark.parametrize(("name", "arguments", "options"), CASES)
def test_values_are_those_of_numpy(network, name, arguments, options):
    def tensor(value):
        if isinstance(value, list) and isinstance(value[0], np.ndarray):
            return [network.tensor(one) for one in value]
        return network.tensor(value) if isinstance(value, np.ndarray) else value

    found = network.numpy(getattr(network.ops, name)(*map(tensor, arguments), **options))
    wanted = of_numpy(name, arguments, options)
    assert found.shape == wanted.shape
    assert (found.dtype == bool) == (wanted.dtype == bool)
    if wanted.dtype.kind == "f":
        assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_called_as_the_list_says(network, name):
    """Of those that are always given by place the name does not matter."""
    wanted = inspect.signature(getattr(Operations, name)).parameters.values()
    named = {one.name for one in wanted if one.kind is not one.POSITIONAL_ONLY} & {"axis", "axes", "keepdims", "dtype"}
    if named:
        assert named <= set(inspect.signature(getattr(network.ops, name)).parameters)


def test_nothing_else_is_there_and_the_message_says_what_is(network):
    assert {name for name in vars(network.ops) if not name.startswith("_")} == set(NAMES)
    assert not hasattr(network.ops, "median")
    with pytest.raises(UsageError, match=r"no operation 'absolute'; did you mean 'abs'.*argmax, argmin.*own functions"):
        network.ops.absolute(X)


@pytest.mark.parametrize("name", [*OF_POSITIVE, *REDUCTIONS, "softmax", "sort", "cumsum", "abs", "maximum", "where"])
def test_gradients_pass(network, name):
    """Against differences; of what can be differentiated, some of each kind."""
    if name in ("any", "all"):
        pytest.skip("no gradient")
    ops, weights = network.ops, np.linspace(1, 2, X.size, dtype=np.float32).reshape(X.shape)

    def made(x):
        if name == "where":
            return ops.where(ops.greater(x, 0.5), x, 2 * x)
        return ops.maximum(x, 0.5) if name == "maximum" else getattr(ops, name)(x, *((1,) if name == "cumsum" else ()))

    def value(x):
        found = made(x)
        total = ops.sum(found * network.tensor(weights)) if len(found.shape) else found
        return total, total

    program = network.compile(lambda run, x: network.value_and_grad(value)(x))
    ((_, _), gradient) = program(network.tensor(POSITIVE))
    step = RNG.normal(size=X.shape).astype(np.float32)
    ends = [float(network.numpy(program(network.tensor(POSITIVE + sign * 1e-3 * step))[0][0])) for sign in (1, -1)]
    slope = float((network.numpy(gradient) * step).sum())
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.05, abs=0.05)
