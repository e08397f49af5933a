"""Provenance says all that a result depends on: held against the functions' signatures (made again: test_reproduce)."""

import hashlib
import inspect
import json

import models
import numpy as np
import pytest
from PIL import Image

keras = pytest.importorskip("keras")
from keras import layers  # noqa: E402

import convscope  # noqa: E402
from convscope import open_model  # noqa: E402
from convscope.objectives import channel, direction  # noqa: E402
from convscope.techniques.filters import RECIPES, FilterOptions, baselines  # noqa: E402
from convscope.techniques.heatmaps import Custom, channel_target, similarity_target  # noqa: E402

# What is written does not depend on the backend, and each of these tests computes many results (minutes in all).
on_one_backend = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="one backend is enough, and slow")


def parameter(name):
    return lambda made: made["parameters"][name]


def images(made):
    return made["pictures"]


def other(role):
    return lambda made: [one for one in made["other_pictures"] if one["role"] == role]


# Where each argument of the public functions is in the provenance, or why it is not there.
NO_RESULT = "can't change a result: "
PLACES = {
    convscope.activations: {
        "network": lambda made: made["network"],
        "images": images,
        "layers": parameter("layers"),
        "memory": parameter("memory"),
        "scratch": NO_RESULT + "a folder for temporary files",
        "progress": NO_RESULT + "it only watches",
    },
    convscope.concepts: {
        "network": lambda made: made["network"],
        "images": images,
        "count": parameter("count"),
        "layer": parameter("layer"),
        "batch": parameter("batch"),
        "progress": NO_RESULT + "it only watches",
    },
    convscope.heatmap: {
        "network": lambda made: made["network"],
        "images": images,
        "target": lambda made: (made["parameters"]["target"], made["parameters"]["target_details"]),
        "layer": lambda made: (made["parameters"]["layer"], made["parameters"]["layer_rule"]),
        "against": parameter("against"),
        "method": parameter("methods"),
        "smooth": parameter("smooth"),
        "budget": parameter("budget"),
        "check": parameter("check"),
        "precision": parameter("precision"),
        "seed": parameter("seed"),
        "batch": parameter("batch"),
        "progress": NO_RESULT + "it only watches",
    },
    convscope.filters: {
        "network": lambda made: made["network"],
        "layer": parameter("layer"),
        "channels": parameter("channels"),
        "objectives": parameter("raised"),
        "recipe": parameter("recipe"),
        "steps": lambda made: made["parameters"]["recipe"]["steps"],
        "size": parameter("size"),
        "seed": parameter("seed"),
        "seeds": parameter("seeds"),
        "variants": parameter("variants"),
        "natural_images": images,
        "baselines": images,  # what noise reaches is the same for one network, seed and size; others are refused
        "image": other("start"),
        "frames": parameter("frames"),
        "precision": parameter("precision"),
        "batch": parameter("batch"),
        "progress": NO_RESULT + "it only watches",
    },
    convscope.report: {
        "network": lambda made: made["network"],
        "images": images,
        "path": NO_RESULT + "it is where the page is written",
        "title": NO_RESULT + "it is the page's heading",
        "progress": NO_RESULT + "it only watches",
        **{
            name: lambda made, name=name: made["parameters"]["choices"][name]
            for name in ("target", "layers", "filter_layers", "heatmap_layer", "channels", "check", "seed")
        },
    },
}


@pytest.mark.parametrize("function", PLACES, ids=lambda function: function.__name__)
def test_every_argument_has_its_place(function):
    assert set(inspect.signature(function).parameters) == set(PLACES[function])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    image = layers.Input((24, 24, 3))
    x = layers.Conv2D(4, 3, activation="relu", name="one")(image)
    x = layers.Conv2D(6, 3, strides=2, activation="relu", name="two")(x)
    x = layers.Dense(5, activation="softmax", name="out")(layers.GlobalAveragePooling2D()(x))
    path = tmp_path_factory.mktemp("model") / "net.keras"
    models.seeded(keras.Model(image, x)).save(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "start", "like"):
        Image.fromarray(rng.integers(0, 256, (30, 28, 3), np.uint8)).save(folder / f"{name}.png")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def network(model):
    return open_model(model, preprocess="0..1")


# For each argument two values of which each makes another result: they have to be told apart.
CHANGES = {
    convscope.activations: {"layers": ("one", "two"), "memory": ("1GB", 10_000), "images": ("cat", "dog")},
    convscope.concepts: {"count": (2, 3), "layer": ("one", "two"), "batch": (1, 2), "images": ("cat", "dog")},
    convscope.heatmap: {
        "images": ("cat", "dog"),
        "target": (1, 2),
        "layer": ("one", "two"),
        "against": (3, 4),
        "method": ("grad-cam", "hirescam"),
        "smooth": (False, True),
        "budget": (10, 20),
        "check": (False, True),
        "precision": ("float32", "bfloat16"),
        "seed": (0, 1),
        "batch": (1, 2),
    },
    convscope.filters: {
        "layer": ("one", "two"),
        "channels": ([0], [1]),
        "objectives": ([channel("one", 1)], [2 * channel("one", 1)]),
        "recipe": ("fast", "fourier"),
        "steps": (2, 3),
        "size": (None, 20),
        "seed": (0, 1),
        "seeds": (1, 2),
        "variants": (1, 2),
        "natural_images": ("cat", "dog"),
        "image": ("start", "like"),
        "frames": (0, 1),
        "precision": ("float32", "bfloat16"),
        "batch": (1, 2),
        "baselines": ("cat", "dog"),
    },
}
BASIS = {
    convscope.activations: {"images": "cat"},
    convscope.concepts: {"images": "cat", "count": 2},
    convscope.heatmap: {"images": ["cat", "dog"], "target": 1},
    convscope.filters: {"layer": "one", "channels": [0], "steps": 2},
}
IMAGES = ("images", "natural_images", "image")


def called(function, network, files, options):
    def path(value):
        return [files[one] for one in value] if isinstance(value, list) else files[value]

    given = {name: path(value) if name in IMAGES else value for name, value in options.items()}
    if "baselines" in options:  # of these natural images
        measured = FilterOptions(steps=options["steps"], natural_images=path(options["baselines"]))
        given["baselines"] = baselines(network, options["layer"], options["channels"], measured)
    return function(network, **given)


@on_one_backend
@pytest.mark.parametrize(
    ("function", "name"), [(function, name) for function, names in CHANGES.items() for name in names]
)
@pytest.mark.slow(reason="each value compiles a program of its own")
def test_two_values_of_an_argument_are_told_apart(network, files, function, name):
    if name == "size":
        pytest.skip("this network takes one size; `test_the_size_is_told_apart` has another")
    found = []
    for value in CHANGES[function][name]:
        made = called(function, network, files, {**BASIS[function], name: value}).provenance
        json.dumps(made)
        found.append(PLACES[function][name](made))
    assert found[0] != found[1]


def test_the_size_is_told_apart():
    model = keras.Sequential([layers.Input((None, None, 3)), layers.Conv2D(4, 3, name="c")])
    network = open_model(models.seeded(model))
    made = [convscope.filters(network, "c", [0], steps=1, size=size).provenance for size in (20, 24)]
    sizes = [one["parameters"]["size"] for one in made]
    assert sizes == [[20, 20], [24, 24]]


def test_every_argument_that_changes_a_result_is_tried():
    for function, changes in CHANGES.items():
        for name, place in PLACES[function].items():
            assert name in changes or name == "network" or str(place).startswith(NO_RESULT), (function, name)


# -- images ----------------------------------------------------------------------------------------------


def check_image(entry, path):
    pixels = np.asarray(Image.open(path))
    assert entry["source"] == path
    with open(path, "rb") as file:
        assert entry["sha256"] == hashlib.sha256(file.read()).hexdigest()
    assert entry["pixels_sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()


@on_one_backend
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.slow(reason="every recipe is compiled")
def test_the_start_image_of_every_recipe_is_identified(network, files, recipe):
    needs = RECIPES[recipe].needs_image
    channels = None if RECIPES[recipe].raises == "caricature" else [0]
    made = convscope.filters(
        network,
        "two",
        channels,
        recipe=recipe,
        steps=1,
        image=files["start"] if needs else None,
        natural_images=files["cat"],
    ).provenance
    assert [one["role"] for one in made["other_pictures"]] == ["start"] * needs
    check_image(made["pictures"][0], files["cat"])
    if needs:
        check_image(made["other_pictures"][0], files["start"])
    parts = {name: made["parameters"]["recipe"][name] for name in ("parameterization", "optimizer", "transforms")}
    kinds = {name: part and part["kind"] for name, part in parts.items()}
    chosen = RECIPES[recipe]
    assert kinds == {
        "parameterization": type(chosen.parameterization).__name__,
        "optimizer": type(chosen.optimizer).__name__,
        "transforms": chosen.transforms and type(chosen.transforms).__name__,
    }


def test_an_image_without_a_file_is_identified_by_its_pixels(network, photo):
    made = convscope.filters(network, "two", [0], recipe="deepdream", steps=1, image=photo).provenance
    (entry,) = made["other_pictures"]
    assert (entry["source"], entry["sha256"]) == (None, None)
    assert entry["pixels_sha256"] == hashlib.sha256(photo.tobytes()).hexdigest()


def test_the_image_that_others_are_like_is_identified(network, files):
    target = similarity_target(network, files["like"])
    made = convscope.heatmap(network, files["cat"], target).provenance
    (entry,) = made["other_pictures"]
    assert entry["role"] == "like"
    check_image(entry, files["like"])


def details(network, files, target):
    made = convscope.heatmap(network, files["cat"], target, "one").provenance
    json.dumps(made)
    return made["parameters"]["target_details"]


@on_one_backend
def test_targets_are_told_apart(network, files):
    half = network.layer("two").shape[:2]
    masks = [np.zeros(half, np.float32) for _ in range(2)]
    masks[0][0, 0] = masks[1][1, 1] = 1
    targets = [
        1,
        "two:1",
        "two:2",
        channel_target(network, "two", 1, (0, 0)),
        *(channel_target(network, "two", 1, mask=one) for one in masks),
        similarity_target(network, files["like"], "two"),
        similarity_target(network, files["dog"], "two"),
        Custom(lambda ops, logits, activations: logits[:, 1]),
        Custom(lambda ops, logits, activations: logits[:, 2], ("two",)),
    ]
    found = [details(network, files, target) for target in targets]
    alike = [(a, b) for a in range(len(found)) for b in range(a) if found[a] == found[b]]
    assert alike == [(4, 3)]  # a place, and a mask of that place
    assert found[-1]["code"].startswith("test_provenance.")


@on_one_backend
@pytest.mark.slow(reason="two programs are compiled")
def test_directions_are_told_apart(network):
    vectors = ([1, 0, 0, 0], [0, 1, 0, 0])
    made = [convscope.filters(network, objectives=[direction("one", vector)], steps=1).provenance for vector in vectors]
    assert made[0]["parameters"]["directions"] != made[1]["parameters"]["directions"]
