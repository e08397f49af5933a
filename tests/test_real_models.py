"""Real trained files with the photographs beside them: what convscope makes of them has to be right."""

import json

import numpy as np
import pytest
from assets import ASSETS, needs_assets

pytest.importorskip("keras")

import convscope
from convscope.images.decode import read_images

pytestmark = needs_assets


def opened(name, **options):
    return convscope.open_model(ASSETS / "keras" / name, **options)


def guesses(network, files):
    """The best class of each photo."""
    photos = read_images(files)
    found = [network.predict(network.prepare(photos[start : start + 32])) for start in range(0, len(photos), 32)]
    return np.concatenate(found)


def animals():
    folders = [sorted((ASSETS / "photos" / name).glob("*.jpg")) for name in ("cats", "dogs")]
    return folders[0] + folders[1], np.repeat([0, 1], [len(folder) for folder in folders])


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("cats_vs_dogs_150px.keras", 0.93),
        ("cats_and_dogs_small_1.h5", 0.58),
        ("dogs_vs_cats_32px.h5", 0.80),
        ("cats_vs_dogs_gray_112px.h5", 0.88),
    ],
)
def test_cats_and_dogs(name, least):
    files, truth = animals()
    assert (guesses(opened(name, preprocess="0..1"), files).argmax(axis=1) == truth).mean() >= least


def test_digits():
    files = sorted((ASSETS / "photos" / "digits").glob("*/*.png"))
    truth = [int(file.parent.name) for file in files]
    assert (guesses(opened("mnist_cnn.h5"), files).argmax(axis=1) == truth).mean() >= 0.97


@pytest.mark.slow(reason="a real network of ImageNet")
def test_imagenet():
    classes = ASSETS / "imagenet_class_index.json"
    network = opened("mobilenet_v1_0.25_224.keras", classes=classes)
    numbers = {code: int(number) for number, (code, _) in json.loads(classes.read_text()).items()}
    files = sorted((ASSETS / "photos" / "imagenet").glob("*.jpg"))
    truth = np.array([numbers[file.name.split("_")[0]] for file in files])
    logits = guesses(network, files)
    assert network.preprocessing.name == "-1..1"
    assert (logits.argmax(axis=1) == truth).mean() >= 0.5
    assert (np.argsort(-logits, axis=1)[:, :5] == truth[:, None]).any(axis=1).mean() >= 0.75


def test_tiny_vgg():
    network = opened("tiny_vgg.keras", classes=ASSETS / "keras" / "tiny_vgg.classes.json")
    files = sorted((ASSETS / "photos" / "tinyvgg").glob("*_*.jpeg"))
    names = [network.class_name(int(best)) for best in guesses(network, files).argmax(axis=1)]
    right = [file.name.split("_")[0] in name for file, name in zip(files, names, strict=True)]
    assert sum(right) >= 13


@pytest.mark.slow(reason="a real network")
def test_the_nested_model_is_reached_and_the_scaling_of_its_base_is_measured():
    network = opened("cat_mood_nested_mobilenetv2.keras")
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("-1..1", "measured")
    assert network.last_spatial_layer().path.startswith("mobilenetv2_0.35_224/")


def test_a_guess_by_name_that_is_not_measured_is_called_a_guess():
    network = opened("mobilenet_v1_0.25_224.keras")
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("-1..1", "guess")
    assert network.measurement.best.name == "-1..1"


def test_the_emotions_networks_scaling_is_measured():
    network = opened("emotions_mini_xception.hdf5")
    assert (network.preprocessing.name, network.preprocessing.certainty) == ("-1..1", "measured")
    assert (network.inputs.size, network.inputs.channels) == ((64, 64), 1)


def test_zeros_of_the_mobilenet_are_counted_after_its_relus():
    network = opened("mobilenet_v1_0.25_224.keras")
    result = convscope.activations(
        network,
        ASSETS / "photos" / "misc" / "cat_keras-squeezenet.jpeg",
        ["conv_pw_1", "conv_pw_6", "conv_pw_13", "conv_pw_*_relu"],
    )
    for number in (1, 6, 13):
        row = result.row(f"conv_pw_{number}")
        after = result[f"conv_pw_{number}_relu"][0]
        assert row.counted_at == f"conv_pw_{number}_relu"
        assert row.zeros == pytest.approx((after == 0).mean(), abs=1e-6)
        assert row.empty_channels == (after == 0).all(axis=(0, 1)).sum()


def test_the_cat_and_the_dog_of_one_photo_are_told_apart():
    """In the well-known photo the dog is above and the cat below: the heatmaps' centres have to be so too."""
    classes = ASSETS / "imagenet_class_index.json"
    network = opened("mobilenet_v1_0.25_224.keras", classes=classes)
    photo = ASSETS / "photos" / "misc" / "both_grad-cam.png"
    result = convscope.heatmap(network, [photo, photo], ["tiger_cat", "bull_mastiff"])
    rows = np.arange(result.maps.shape[1])
    centres = [(np.maximum(raw, 0).sum(axis=1) * rows).sum() / np.maximum(raw, 0).sum() for raw in result.maps]
    assert centres[0] > centres[1] + 1
