"""Deep Feature Factorisation against tables whose factors are known."""

import models
import numpy as np
import pytest
from expecting import raises

keras = pytest.importorskip("keras")
from test_heatmaps import NAMES, gap_network, maps_and_head  # noqa: E402

import convscope  # noqa: E402
from convscope import open_model  # noqa: E402
from convscope.errors import UsageError  # noqa: E402
from convscope.render.colour import palette  # noqa: E402
from convscope.render.concepts import panel  # noqa: E402
from convscope.techniques.heatmaps.concepts import factorised  # noqa: E402


def test_factors_that_do_not_overlap_are_found():
    random = np.random.default_rng(0)
    shares, vectors = np.zeros((60, 3)), np.zeros((3, 9))
    for k in range(3):
        shares[20 * k : 20 * (k + 1), k] = (3 - k) * (1 + random.random(20))
        vectors[k, 3 * k : 3 * (k + 1)] = 0.2 + random.random(3)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = factorised(shares @ vectors, 3)
    np.testing.assert_allclose(found[0], shares, atol=0.02)
    np.testing.assert_allclose(found[1], vectors, atol=0.02)


def test_of_a_table_without_factors_the_error_is_near_the_least():
    """No product of that rank is nearer than the one of the singular vectors, which may be negative."""
    table = np.random.default_rng(1).random((40, 12))
    shares, vectors = factorised(table, 4)
    assert (shares >= 0).all()
    assert (vectors >= 0).all()
    error = ((table - shares @ vectors) ** 2).sum()
    least = (np.linalg.svd(table)[1][4:] ** 2).sum()
    assert least <= error < 1.35 * least
    again = factorised(table, 4)
    np.testing.assert_array_equal(shares, again[0])


def test_concepts_of_a_network(photo, tmp_path):
    model = gap_network()
    network = open_model(model, preprocess="0..1", classes=NAMES)
    photos = [photo, photo[::-1].copy()]
    found = convscope.concepts(network, photos, 3)
    maps, kernel, bias = maps_and_head(model, network.prepare(found.images))
    assert found.values.shape == (*maps.shape[:3], 3)
    whole = found.values @ found.vectors
    rest = ((maps - whole) ** 2).sum()
    for row in found.rows:
        others = [k for k in range(3) if k != row.number]
        without = ((maps - found.values[..., others] @ found.vectors[others]) ** 2).sum()
        assert row.share == pytest.approx((without - rest) / (maps**2).sum(), rel=1e-2, abs=1e-4)
        # Of a map that is the same everywhere the pooled vector is the concept itself.
        strength = np.percentile(found.values[..., row.number], 99)
        logits = strength * found.vectors[row.number] @ kernel + bias
        assert row.predictions[0].name == NAMES[int(np.argmax(logits))]
        assert row.predictions[0].logit == pytest.approx(logits.max(), rel=1e-3)
    convscope.save(found, tmp_path)
    again = convscope.load(tmp_path)
    np.testing.assert_array_equal(again.values, found.values)
    assert again.rows == found.rows
    assert panel(found, 1).dtype == np.uint8


def test_what_can_not_be_factorised_is_said(photo):
    network = open_model(models.plain(), preprocess="0..1")
    with raises(UsageError, "concepts-out-of-range", found=99):
        convscope.concepts(network, photo, 99)
    with raises(UsageError, "layer-without-map", layer="out"):
        convscope.concepts(network, photo, 2, "out")


def test_colours_of_concepts_differ():
    assert len({tuple(one) for one in palette(16)}) == 16
