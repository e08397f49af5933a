"""Token grids in Keras: the outputs of transformers that are maps.

The oracle is the model itself, cut in two at the block: its own tokens, reshaped by hand, and the backend's
own gradient of the second half.
"""

import numpy as np
import pytest
from expecting import raises

import convscope
from convscope.errors import UsageError

keras = pytest.importorskip("keras")
import transformers_keras as at_hand  # noqa: E402
from transformers_keras import GRID, SIDE, WIDTH  # noqa: E402

RNG = np.random.default_rng(5)
PHOTO = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def opened(model):
    return convscope.open_model(model, preprocess="0..1")


def halves(model, at):
    """The model up to the output of the layer `at`, and from there on."""
    middle = model.get_layer(at).output
    return keras.Model(model.input, middle), keras.Model(middle, model.output)


def gradient(model, tokens, target):
    """The gradient of one logit at the model's input `tokens` `(1, tokens, c)`, by the backend's own means."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            x = tf.constant(tokens)
            tape.watch(x)
            score = model(x, training=False)[0, target]
        return tape.gradient(score, x).numpy()
    if backend == "jax":
        import jax

        return np.asarray(jax.grad(lambda x: model(x, training=False)[0, target])(tokens))
    x = keras.ops.convert_to_tensor(tokens).requires_grad_()
    model(x, training=False)[0, target].backward()
    return x.grad.cpu().numpy()


KINDS = {
    "class token": (at_hand.vit, 1, 0),
    "no token but the grid": (lambda: at_hand.vit(front=0), 0, 0),
    "registers behind": (lambda: at_hand.vit(front=2, behind=3), 2, 3),
    "convolutions first": (at_hand.hybrid, 0, 0),
    "patches without a convolution": (at_hand.patched, 0, 0),
}


@pytest.mark.parametrize(("make", "front", "behind"), KINDS.values(), ids=KINDS)
def test_blocks_have_the_map_of_their_tokens(make, front, behind):
    model = make()
    network = opened(model)
    layer = network.layer("block0_sum2")
    assert layer.shape == (GRID, GRID, WIDTH)
    assert (layer.tokens.front, layer.tokens.behind) == (front, behind)
    first, second = halves(model, "block0_sum2")
    tokens = keras.ops.convert_to_numpy(first(PHOTO[None].astype(np.float32) / 255, training=False))
    gradients = gradient(second, tokens, 2)
    maps, gradients = (x[0, front : front + GRID**2].reshape(GRID, GRID, -1) for x in (tokens, gradients))
    found = convscope.activations(network, PHOTO, layers="block0_sum2")
    np.testing.assert_allclose(found.arrays["block0_sum2"][0], maps, rtol=1e-4, atol=1e-5)
    heat = convscope.heatmap(network, PHOTO, 2, layer="block0_sum2", method="grad-cam").maps[0]
    expected = np.maximum((gradients.mean((0, 1)) * maps).sum(-1), 0)
    np.testing.assert_allclose(np.maximum(heat, 0), expected, rtol=1e-3, atol=1e-3 * expected.max())


def test_a_grid_that_halves_is_found_again():
    model = at_hand.merging()
    network = opened(model)
    assert network.layer("block0_sum2").shape == (GRID, GRID, WIDTH)
    assert network.layer("merge").shape == (GRID // 2, GRID // 2, WIDTH)
    first, _ = halves(model, "block1_sum2")
    tokens = keras.ops.convert_to_numpy(first(PHOTO[None].astype(np.float32) / 255, training=False))
    found = convscope.activations(network, PHOTO, layers="block1_sum2").arrays["block1_sum2"][0]
    np.testing.assert_allclose(found, tokens[0].reshape(GRID // 2, GRID // 2, WIDTH), rtol=1e-4, atol=1e-5)
    assert network.last_spatial_layer().path == "norm"


def test_the_automatic_layer_is_the_last_whose_grid_is_read():
    network = opened(at_hand.vit())
    assert network.last_spatial_layer().path == "block1_norm1"
    row = convscope.heatmap(network, PHOTO, 2, layer="block1_sum2", method="grad-cam").rows[0]
    assert row.status == "blank"
    assert "class token" in row.reason
    assert "'block1_norm1'" in row.reason


def test_heads_of_an_attention_are_no_maps():
    network = opened(at_hand.vit())
    assert not network.layer("block0_attention/query").spatial
    with raises(UsageError, "layer-without-map", layer="block0_attention/query"):
        convscope.heatmap(network, PHOTO, 2, layer="block0_attention/query")


@pytest.mark.slow(reason="the ascent and three methods are compiled")
def test_filters_and_replays_work_at_blocks():
    network = opened(at_hand.vit())
    result = convscope.filters(network, "block0_sum2", [0, 3], recipe="classic", steps=2)
    assert all(np.isfinite(row.activation) for row in result.rows)
    for method in ("score-cam", "ablation-cam", "layercam"):
        heat = convscope.heatmap(network, PHOTO, 2, layer="block0_sum2", method=method).maps[0]
        assert heat.shape == (GRID, GRID)
        assert heat.any()
