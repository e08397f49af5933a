"""Filters as a stream, baselines as values, and parts of the user's own: from public names only."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import convscope  # noqa: E402
from convscope.errors import UsageError  # noqa: E402
from convscope.techniques.filters import RECIPES, FilterOptions, FilterStream, baselines  # noqa: E402

OPTIONS = {"recipe": "classic", "steps": 3, "precision": "float32", "size": 16}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 40, 3, padding=1), torch.nn.Tanh())
    return convscope.open_model(module.eval(), size=(16, 16), preprocess="-1..1", head="linear")


def noise(count):
    return [np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8) for index in range(count)]


def test_a_stream_yields_what_filters_collects_and_holds_a_few_batches(small):
    told = []
    stream = FilterStream(small, "1", options=FilterOptions(**OPTIONS, batch=4, progress=told.append))
    items, after = [], []
    for item in stream:
        items.append(item)
        after.append(told[-1].done / told[-1].total)
    assert after[0] < 0.6
    result = convscope.filters(small, "1", **OPTIONS, batch=4)
    assert sorted(item.index for item in items) == list(range(40))
    for item in items:
        assert item.row == result.rows[item.index]
        np.testing.assert_array_equal(item.image, result.values[item.index])


def test_baselines_give_the_same_verdicts(small):
    options = FilterOptions(**OPTIONS, natural_images=noise(3))
    reached = baselines(small, "1", [0], options)
    expected = convscope.filters(small, "1", range(4), natural_images=noise(3), **OPTIONS)
    found = convscope.filters(small, "1", range(4), baselines=reached, **OPTIONS)
    assert found.rows == expected.rows
    bound = FilterStream(small, "1", [1], options).jobs[0].bound
    maps = small.forward(small.prepare(list(reached.images)), ["1"])[1]["1"]
    np.testing.assert_allclose(reached.natural(bound), maps[:, 2:-2, 2:-2, 1].mean(axis=(1, 2)), rtol=1e-4, atol=1e-6)


def test_baselines_of_something_else_are_refused(small):
    reached = baselines(small, "1", [0], FilterOptions(**OPTIONS))
    for wrong, says in [({"seed": 1}, "seed"), ({"size": 12}, "size"), ({"objectives": ["0:1"]}, "do not cover")]:
        with pytest.raises(UsageError, match=says):
            convscope.filters(small, "1", [0], baselines=reached, **{**OPTIONS, **wrong})
    with pytest.raises(UsageError, match="of their own"):
        convscope.filters(small, "1", [0], baselines=reached, natural_images=noise(1), **OPTIONS)


@dataclass(frozen=True)
class Grey:
    """A parameterization: one brightness for all channels."""

    def start(self, network, size, generator):
        return generator.normal(0, 0.1, (*size, 1)).astype(np.float32)

    def image(self, network, parameters, size):
        return network.ops.repeat(network.ops.tanh(parameters), 3, axis=-1)

    def parameters(self, network, images):
        return np.arctanh(np.clip(images.mean(axis=-1, keepdims=True), -0.99, 0.99))


@dataclass(frozen=True)
class Plain:
    """An optimizer: a step along the gradient."""

    def init(self, parameters):
        return ()

    def step(self, network, parameters, gradient, square, memory):
        return (parameters + 50.0 * gradient,)


@dataclass(frozen=True)
class Flip:
    """A transform: the image and its mirror image."""

    views = 2

    def draw(self, key, step, steps, size):
        return np.zeros((2, 8), np.float32)

    def apply(self, images, draws, middle, half, ops):
        return ops.reshape(ops.stack([images, ops.flip(images, axis=2)], axis=1), (-1, *images.shape[1:]))


def test_parts_of_the_users_own(small):
    recipe = replace(RECIPES["classic"], parameterization=Grey(), optimizer=Plain(), transforms=Flip(), steps=8)
    result = convscope.filters(small, "1", [0, 1], recipe=recipe, size=16, precision="float32")
    assert (np.ptp(result.values, axis=-1) < 1e-6).all()
    assert all(row.activations[-1] > row.activations[0] for row in result.rows)
    pair = np.concatenate([result.values, result.values[:, :, ::-1]])
    means = small.forward(pair, ["1"])[1]["1"][:, 2:-2, 2:-2].mean(axis=(1, 2))
    assert means[[0, 2], 0].mean() > result.rows[0].activations[0]


def test_a_caricature_raises_what_the_layer_answers_to_the_image(small):
    options = {"recipe": "caricature", "size": 16, "precision": "float32", "image": noise(1)[0]}
    result = convscope.filters(small, "1", steps=20, **options)
    maps = small.forward(result.values, ["1"])[1]["1"][0].astype(np.float64)
    given = small.forward(small.prepare(list(convscope.images.decode.read_images(noise(1)))), ["1"])[1]["1"][0]
    dot, own, other = ((a * b).sum(axis=-1).mean() for a, b in [(maps, given), (maps, maps), (given, given)])
    assert result.rows[0].activation == pytest.approx(dot * max(dot / np.sqrt(own * other), 0.1) ** 2, rel=1e-3)
    assert result.rows[0].activation > 2 * abs(result.rows[0].activations[0])
    with pytest.raises(UsageError, match="all channels"):
        convscope.filters(small, "1", [0], steps=1, **options)
    with pytest.raises(UsageError, match="image="):
        convscope.filters(small, "1", **{**options, "image": None})
