"""One request for one run: every runtime does what each field asks for, or refuses it."""

import dataclasses

import models
import numpy as np
import pytest

keras = pytest.importorskip("keras")
from keras import layers  # noqa: E402

from convscope import open_model  # noqa: E402
from convscope.errors import UsageError  # noqa: E402
from convscope.networks import Pass  # noqa: E402

SIDE = 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
KERNEL = RNG.normal(size=(1, 1, 3, 4)).astype(np.float32)
DENSE = RNG.normal(size=(4, 5)).astype(np.float32)
GAMMA, BETA = np.array([1.5, 0.5, 1.0, 2.0], np.float32), np.array([0.1, -0.2, 0.0, 0.3], np.float32)
MEAN, VARIANCE = np.array([0.2, 0.0, -0.3, 0.1], np.float32), np.array([0.5, 1.0, 2.0, 1.5], np.float32)
EPSILON = 1e-3


def of_keras():
    network = models.seeded(
        keras.Sequential(
            [
                layers.Input((SIDE, SIDE, 3)),
                layers.Conv2D(4, 1, use_bias=False, name="conv"),
                layers.BatchNormalization(epsilon=EPSILON, name="norm"),
                layers.ReLU(name="relu"),
                layers.GlobalAveragePooling2D(name="pool"),
                layers.Dense(5, activation="softmax", use_bias=False, name="head"),
            ]
        )
    )
    network.set_weights([KERNEL, GAMMA, BETA, MEAN, VARIANCE, DENSE])
    return open_model(network)


def of_torch():
    torch = pytest.importorskip("torch")
    nn = torch.nn
    parts = {
        "conv": nn.Conv2d(3, 4, 1, bias=False),
        "norm": nn.BatchNorm2d(4, eps=EPSILON),
        "relu": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "dense": nn.Linear(4, 5, bias=False),
        "head": nn.Softmax(dim=1),
    }
    module = nn.Sequential()
    for name, part in parts.items():
        module.add_module(name, part)
    values = {"weight": GAMMA, "bias": BETA, "running_mean": MEAN, "running_var": VARIANCE}
    with torch.no_grad():
        parts["conv"].weight.copy_(torch.from_numpy(KERNEL.transpose(3, 2, 0, 1)))
        parts["dense"].weight.copy_(torch.from_numpy(DENSE.T))
        for name, value in values.items():
            getattr(parts["norm"], name).copy_(torch.from_numpy(value))
    return open_model(module, size=SIDE)


@pytest.fixture(scope="module", params=["keras", "torch"])
def network(request):
    return of_keras() if request.param == "keras" else of_torch()


def normed(x):
    return (x @ KERNEL[0, 0] - MEAN) / np.sqrt(VARIANCE + EPSILON) * GAMMA + BETA


def relu(x):
    return np.maximum(x, 0)


def scores(maps):
    return maps.mean(axis=(1, 2)) @ DENSE


def softmax(z):
    return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


def ran(network, request, rules=None, reductions=None):
    """The logits, None where there are none, and what was recorded."""

    def program(run, x):
        seen = run(x, request, rules, reductions)
        return ([] if seen.logits is None else [seen.logits]), dict(seen.activations)

    logits, recorded = network.compile(program)(network.tensor(X))
    return (network.numpy(logits[0]) if logits else None), {path: network.numpy(a) for path, a in recorded.items()}


def close(found, wanted, tolerance=1e-4):
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def test_record(network):
    logits, recorded = ran(network, Pass(record=("norm", "relu")))
    close(recorded["norm"], normed(X))
    close(recorded["relu"], relu(normed(X)))
    close(logits, scores(relu(normed(X))))


def test_replace(network):
    logits, recorded = ran(network, Pass(record=("norm",), replace=("norm",)), {"norm": lambda a: a * 2 + 1})
    close(recorded["norm"], normed(X) * 2 + 1)
    close(logits, scores(relu(normed(X) * 2 + 1)))


def test_preactivations(network):
    logits, recorded = ran(network, Pass(record=("relu",), preactivations=("relu",)))
    assert recorded["relu"].min() < 0
    close(recorded["relu"], normed(X))
    close(logits, scores(normed(X)))


def test_logits(network):
    close(ran(network, Pass(record=("head",)))[1]["head"], scores(relu(normed(X))))
    logits, recorded = ran(network, Pass(record=("head",), logits=False))
    close(recorded["head"], softmax(scores(relu(normed(X)))))
    close(logits, softmax(scores(relu(normed(X)))))


def test_stop(network):
    logits, recorded = ran(network, Pass(record=("norm",), stop=True))
    assert logits is None
    close(recorded["norm"], normed(X))


def test_precision(network):
    exact, near = (ran(network, Pass(record=("norm",), precision=kind))[1]["norm"] for kind in ("float32", "bfloat16"))
    close(exact, normed(X))
    assert near.dtype == np.float32
    assert 1e-4 < np.abs(near - exact).max() < 0.1 * np.abs(exact).max()


def test_folded(network):
    request = Pass(record=("relu",), folded=True)
    if network.folds_norms:
        logits, recorded = ran(network, request)
        close(recorded["relu"], relu(normed(X)))
        close(logits, scores(relu(normed(X))))
    else:
        with pytest.raises(UsageError, match="folded"):
            ran(network, request)


def test_replace_preactivations(network):
    """Of a layer that ends in a non-linearity of its own; a runtime whose layers have none refuses it."""
    rules = {"head": lambda a: a * 2}
    request = Pass(record=("head",), replace_preactivations=("head",), logits=False)
    if network.layer("head").kind == "dense":
        close(ran(network, request, rules)[1]["head"], softmax(2 * scores(relu(normed(X)))))
    else:
        with pytest.raises(UsageError, match="head: there is no non-linearity"):
            ran(network, request, rules)


def test_reductions(network):
    reductions = {"norm": lambda a: network.ops.max(a, axis=(1, 2))}
    recorded = ran(network, Pass(record=("norm", "relu")), reductions=reductions)[1]
    close(recorded["norm"], normed(X).max(axis=(1, 2)))
    close(recorded["relu"], relu(normed(X)))


@pytest.mark.parametrize(
    ("request_", "rules", "reductions", "said"),
    [
        (Pass(record=("norms",)), None, None, "norms.*norm"),
        (Pass(replace=("norm",)), None, None, r"a rule for each of \['norm'\]"),
        (Pass(record=("norm",)), {"norm": abs}, None, r"found rules for \['norm'\]"),
        (Pass(record=("norm",)), None, {"relu": abs}, "reductions"),
        (Pass(preactivations=("norm",)), None, None, "norm: there is no non-linearity"),
        (Pass(replace_preactivations=("conv",)), {"conv": abs}, None, "conv: there is no non-linearity"),
        (Pass(precision="float16"), None, None, "float16"),
        (Pass(precision="int8"), None, None, "int8"),
    ],
)
def test_what_can_not_be_done_is_refused(network, request_, rules, reductions, said):
    with pytest.raises(UsageError, match=said):
        ran(network, request_, rules, reductions)


def test_a_network_of_another_precision_does_not_change_it():
    torch = pytest.importorskip("torch")
    network = open_model(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), size=SIDE, precision="float16")
    with pytest.raises(UsageError, match="another precision"):
        ran(network, Pass(precision="bfloat16"))


def test_every_field_has_a_test():
    assert {field.name for field in dataclasses.fields(Pass)} == {
        name.removeprefix("test_") for name in globals() if name.startswith("test_")
    } & {field.name for field in dataclasses.fields(Pass)}


def counting(network, request):
    return lambda run, x: run(x, request).logits


def test_a_request_is_the_key_of_its_program(network):
    one = network.program(counting, Pass(record=("norm",)))
    assert network.program(counting, Pass(record=("norm",))) is one
    others = [
        Pass(record=("relu",)),
        Pass(record=("norm",), stop=True),
        Pass(record=("norm",), logits=False),
        Pass(record=("norm",), precision="bfloat16"),
        Pass(record=("norm",), preactivations=("relu",)),
    ]
    assert len({id(network.program(counting, other)) for other in (Pass(record=("norm",)), *others)}) == 6


def test_a_function_that_encloses_values_makes_no_program(network):
    with pytest.raises(TypeError, match="may enclose more"):
        network.program(lambda network: lambda run, x: run(x).logits)
