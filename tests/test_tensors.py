"""Images that are tensors of the libraries that Keras runs on."""

import numpy as np
import pytest

from convscope.errors import UsageError
from convscope.images.decode import read_image, read_images
from convscope.images.image import fit

UNITS = np.random.default_rng(1).random((6, 5, 3), np.float32)


def read_as_array(tensor, tolerance=0.01):
    np.testing.assert_allclose(fit(read_image(tensor), 6, 5, 3), 255 * UNITS, atol=tolerance)


def test_tensors_of_jax():
    jnp = pytest.importorskip("jax.numpy")
    read_as_array(jnp.asarray(UNITS))
    read_as_array(jnp.asarray(UNITS, jnp.bfloat16), 2)
    assert len(read_images(jnp.asarray(np.stack([UNITS, UNITS])))) == 2


def test_tensors_of_tensorflow():
    tf = pytest.importorskip("tensorflow")
    for tensor in (tf.constant(UNITS), tf.Variable(UNITS), tf.constant(UNITS)[None]):
        read_as_array(tensor)
    read_as_array(tf.cast(UNITS, tf.bfloat16), 2)
    assert len(read_images(tf.stack([UNITS, UNITS]))) == 2
    assert len(read_images(tf.data.Dataset.from_tensors(UNITS).repeat(3).batch(2))) == 3

    @tf.function
    def traced(tensor):
        with pytest.raises(UsageError, match="no values") as error:
            read_image(tensor)
        return tf.constant(error.value.code == "image-kind")

    assert bool(traced(tf.constant(UNITS)))
