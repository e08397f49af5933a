"""A head in its typed fields: each combination that a network can have, and the numbers that follow from it."""

import json

import numpy as np
import pytest
from expecting import raises

from convscope.errors import UsageError
from convscope.networks import Head, Layer
from convscope.networks.layers import KINDS, select_layers

OUTPUTS = np.array([[0.2, 0.7, 0.1], [0.05, 0.15, 0.8]], np.float32)
ONE = np.array([[0.25], [0.9]], np.float32)


class NumPy:
    """The operations that a head uses, by their definitions."""

    log, maximum, clip = staticmethod(np.log), staticmethod(np.maximum), staticmethod(np.clip)
    concatenate = staticmethod(np.concatenate)


# A head, its word in provenance, the name of its score, and what the scores of probabilities p (or outputs) are.
HEADS = [
    (Head(3, "softmax", undone="soft"), "softmax", "logit", lambda p: p),
    (Head(3, "sigmoid", undone="sig"), "sigmoid", "logit", lambda p: p),
    (Head(3, "softmax"), "softmax_output", "log p", np.log),
    (Head(3, "sigmoid"), "sigmoid_output", "log p/(1-p)", lambda p: np.log(p / (1 - p))),
    (Head(3, "softmax", returns_logits=True), "logits", "logit", lambda p: p),
    (Head(3, "sigmoid", returns_logits=True), "sigmoid_logits", "logit", lambda p: p),
    (Head(3), "linear", "value", lambda p: p),
    (Head(3, spatial=True), "maps", "logit", lambda p: p),
]


@pytest.mark.parametrize(("head", "kind", "score", "scores"), HEADS)
def test_scores_of_each_head(head, kind, score, scores):
    assert (head.describe()["kind"], head.score) == (kind, score)
    np.testing.assert_allclose(head.logits(NumPy, OUTPUTS), scores(OUTPUTS), rtol=1e-5)
    assert json.loads(json.dumps(head.describe()))["layer"] == head.undone
    assert head.has_scores == (kind != "maps")
    assert head.linear == (kind == "linear")
    assert hash(head) == hash(Head(**vars(head)))


@pytest.mark.parametrize(("head", "kind", "score", "scores"), HEADS[:6])
def test_probabilities_come_back_from_scores(head, kind, score, scores):
    """A head that has probabilities as its outputs must give them back."""
    found = head.probabilities(head.logits(NumPy, OUTPUTS))
    if head.log_probabilities:
        wanted = OUTPUTS
    elif kind.startswith("sigmoid"):
        wanted = [[1 / (1 + np.exp(-z)) for z in row] for row in OUTPUTS]
    else:
        wanted = [[1 / sum(np.exp(other - z) for other in row) for z in row] for row in OUTPUTS]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_values_have_no_probabilities():
    assert Head(3).probabilities(OUTPUTS) is None


@pytest.mark.parametrize("returns_logits", [False, True])
def test_one_sigmoid_unit_is_two_classes(returns_logits):
    head = Head(1, "sigmoid", returns_logits=returns_logits)
    assert head.binary
    assert not head.paired
    assert head.classes == 2
    logits = head.logits(NumPy, ONE)
    np.testing.assert_allclose(logits[:, 0], -logits[:, 1])
    one = head.probabilities(logits)
    np.testing.assert_allclose(one.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(one[:, 1:], 1 / (1 + np.exp(-ONE)) if returns_logits else ONE, rtol=1e-5)


def test_two_classes_under_one_softmax_are_a_pair():
    assert [Head(2, name, undone="a").paired for name in ("softmax", "sigmoid")] == [True, False]
    assert not any(head.paired for head in (Head(2), Head(3, "softmax"), Head(2, spatial=True)))


def layer(kind):
    return Layer(f"the_{kind}", kind, kind.title(), (4, 4, 2), 0)


def test_properties_of_layers_partition_the_kinds():
    having = {
        name: {kind for kind in KINDS if getattr(layer(kind), name)}
        for name in ("container", "structural", "passing", "computes", "pads", "convolves")
    }
    assert having["container"] == {"model"} < having["structural"]
    assert having["structural"] | having["passing"] == set(KINDS) - having["computes"]
    assert not having["structural"] & having["passing"]
    assert [having[name] for name in ("pads", "convolves")] == [{"padding"}, {"conv"}]


def test_a_place_counts_no_containers():
    layers = [layer(kind) for kind in ("conv", "model", "pool")]
    assert [one.kind for one in select_layers(layers, ":2")] == ["conv", "pool"]
    with raises(UsageError, "layer-unknown"):
        select_layers(layers, "dense")
