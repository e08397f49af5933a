"""Targets of the user's own, on Keras and on PyTorch, and what happens where one fails."""

from dataclasses import dataclass

import models
import numpy as np
import pytest

keras = pytest.importorskip("keras")
torch = pytest.importorskip("torch")
from keras import layers  # noqa: E402
from torch import nn  # noqa: E402

import convscope  # noqa: E402
from convscope import open_model  # noqa: E402
from convscope.errors import UsageError  # noqa: E402
from convscope.techniques.heatmaps import Custom, Target  # noqa: E402
from convscope.techniques.heatmaps.evidence import WHOLE  # noqa: E402


class Joined(nn.Module):
    """A branch from before the layer `body.late` that is joined again after it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"early": nn.Conv2d(3, 6, 3, stride=2), "late": nn.Conv2d(6, 6, 3, padding=1)})
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        early = torch.relu(self.body["early"](x))
        joined = torch.cat([early, torch.relu(self.body["late"](early))], dim=1)
        return self.head(joined.mean(dim=(2, 3)))


def joined_in_keras():
    image = layers.Input((20, 24, 3))
    early = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="early")(image)
    late = layers.Conv2D(6, 3, padding="same", activation="relu", name="late")(early)
    x = layers.GlobalAveragePooling2D()(layers.Concatenate()([early, late]))
    return models.seeded(keras.Model(image, layers.Dense(5)(x)))


@pytest.fixture(params=["keras", "torch"])
def network(request):
    if request.param == "keras":
        return open_model(joined_in_keras(), preprocess="0..1")
    return open_model(Joined().eval(), preprocess="0..1", size=(20, 24))


def duck(number):
    class Difference:
        """One class less the mean of all: no base class, and only what has to be."""

        def score(self, ops, logits, activations, arguments):
            return logits[:, number] - ops.mean(logits, axis=-1)

    return Difference()


def test_any_object_with_a_score_is_explained(network, photo):
    found = convscope.heatmap(network, photo, duck(2), "late")
    told = Custom(lambda ops, logits, activations: logits[:, 2] - ops.mean(logits, axis=-1), text="told")
    np.testing.assert_allclose(found.maps, convscope.heatmap(network, photo, told, "late").maps, rtol=1e-5, atol=1e-7)
    assert found.rows[0].class_name == "Difference"
    logits = network.predict(network.prepare(found.images))[0]
    assert found.rows[0].score == pytest.approx(logits[2] - logits.mean(), rel=1e-4)


@dataclass(frozen=True)
class Strongest(Target):
    """A layer's strongest channel, which `resolve` finds for each image and which then stays."""

    record: tuple[str, ...] = ("late",)
    text: str = "the strongest channel"
    scores: bool = False

    def resolve(self, ops, logits, activations, arguments):
        means = ops.mean(activations["late"], axis=(1, 2))
        return (ops.one_hot(ops.argmax(means, axis=-1), means.shape[-1]),)

    def score(self, ops, logits, activations, arguments):
        return ops.sum(ops.mean(activations["late"], axis=(1, 2)) * arguments[0], axis=-1)


def test_a_subclass_reads_layers_by_its_own_names_and_resolves_what_depends_on_the_image(network, photo):
    """In PyTorch the layer is called `body.late`."""
    photos, methods = [photo, photo[::-1].copy()], ["hirescam", "occlusion"]
    found = convscope.heatmap(network, photos, Strongest(), "late", method=methods)
    path = network.layer("late").path
    maps = network.forward(network.prepare(found.images[::2]), (path,))[1][path]
    for index in range(2):
        best = maps[index].mean(axis=(0, 1)).argmax()
        row = found.rows[2 * index]
        assert row.score == pytest.approx(maps[index][..., best].mean(), rel=1e-4)
        np.testing.assert_allclose(
            found.maps[2 * index], maps[index][..., best] / maps[index][..., best].size, rtol=1e-3, atol=1e-6
        )
        assert (row.explained, row.class_index) == ("the strongest channel", None)


def test_an_object_that_was_changed_is_explained_anew(network, photo):
    target = duck(2)
    first = convscope.heatmap(network, photo, target, "late")
    type(target).score = lambda self, ops, logits, activations, arguments: logits[:, 0]
    changed = convscope.heatmap(network, photo, target, "late").maps
    np.testing.assert_allclose(changed, convscope.heatmap(network, photo, 0, "late").maps, rtol=1e-5)
    assert not np.allclose(first.maps, changed)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"record": "late"}, "as a tuple"),
        ({"record": (1,)}, "as a tuple"),
        ({"record": ("lat",)}, "did you mean"),
        ({"text": 5}, "a str as text"),
        ({"scores": 1}, "a bool as scores"),
    ],
)
def test_a_target_that_does_not_keep_to_the_interface_is_refused_in_words(network, photo, attributes, says):
    target = duck(2)
    for name, value in attributes.items():
        setattr(target, name, value)
    with pytest.raises(UsageError, match=says):
        convscope.heatmap(network, photo, target, "late")


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (lambda ops, logits: logits, r"found the shape \(\d+, 5\)"),
        (lambda ops, logits: ops.sum(logits), "found a single number"),
        (lambda ops, logits: None, "found NoneType"),
        (lambda ops, logits: ops.median(logits), "no operation 'median'"),
    ],
)
def test_an_answer_that_is_no_number_for_each_image_is_refused_in_words(network, photo, score, says):
    with pytest.raises(UsageError, match=says):
        convscope.heatmap(network, photo, Custom(lambda ops, logits, activations: score(ops, logits)), "late")


def test_what_is_no_target_is_refused_in_words(network, photo):
    for wrong in (object(), 1.5, Strongest):
        with pytest.raises(UsageError, match="a target is a class"):
            convscope.heatmap(network, photo, wrong, "late")
    with pytest.raises(UsageError, match="a report explains classes"):
        convscope.report(network, photo, "unwritten.html", target=Strongest())


# -- errors in a target ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, TypeError, KeyError, ZeroDivisionError])
def test_an_error_of_a_target_propagates_and_does_not_change_how_the_layer_is_replayed(network, photo, kind):
    """It fails in replays alone, as one does that takes the number of images for one."""
    batches = []

    def function(ops, logits, activations):
        batches.append(logits.shape[0])
        if logits.shape[0] not in (1, None):
            raise kind("of the user's")
        return logits[:, 1]

    with pytest.raises(kind, match="of the user's"):
        convscope.heatmap(network, photo, Custom(function), "early", method="ablation-cam")
    assert max(batches) > 1
    assert network.limitations == set()


def test_the_reason_that_is_expected_is_a_tail_that_needs_more(network, photo):
    """What comes before `late` is joined with it again."""
    convscope.heatmap(network, photo, 1, "late", method="ablation-cam")
    convscope.heatmap(network, photo, 1, "early", method="ablation-cam")
    assert network.limitations == {(WHOLE, network.layer("late").path)}


def test_an_error_of_a_layer_propagates(photo):
    """A class of the user's own, though derived from one that frameworks use for shapes."""

    class Odd(RuntimeError):
        pass

    class Failing(Joined):
        def forward(self, x):
            answer = super().forward(x) if len(x) == 1 else None
            if answer is None or len(answer) > 1:
                raise Odd("of the user's")
            return answer

    network = open_model(Failing().eval(), preprocess="0..1", size=(20, 24))
    with pytest.raises(Exception, match="of the user's"):
        convscope.heatmap(network, photo, 1, "early", method="ablation-cam")
    assert network.limitations == set()


def test_a_target_that_fails_does_not_leave_methods_out(network, photo):
    """With "all", what does not fit the network is left out; what fails is not."""
    calls = []

    class Late(Target):
        def score(self, ops, logits, activations, arguments):
            calls.append(1)
            if len(calls) > 1:
                raise UsageError("of the user's")
            return logits[:, 1]

    target = Late()
    with pytest.raises(UsageError, match="of the user's"):
        convscope.heatmap(network, photo, target, "late", method=["grad-cam", "ablation-cam"])
