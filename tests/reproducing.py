"""Makes results again from their provenance alone, in another process."""

import hashlib
import json
import subprocess
import sys

import numpy as np

import convscope
from convscope.networks import ModelSpec
from convscope.techniques.heatmaps import METHODS, similarity_target


def values_of(result):
    """The SHA-256 of what a result holds."""
    held = {
        "activations": lambda: list(result.arrays.values()),
        "concepts": lambda: [result.values, result.vectors],
        "filters": lambda: [result.values, np.array([row.activations for row in result.rows])],
        "heatmaps": lambda: list(result.maps),
    }[result.kind]()
    digest = hashlib.sha256()
    for array in held:
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def from_provenance(made):
    """The result that a provenance tells of, made anew."""
    network = ModelSpec.from_json(made["network"]["spec"]).open()
    assert network.weights_sha256() == made["network"]["weights_sha256"]
    return {"activations": _activations, "concepts": _concepts, "filters": _filters, "heatmap": _heatmap}[
        made["technique"]
    ](network, made["parameters"], [one["source"] for one in made["pictures"]], _others(made))


def _others(made):
    return {one["role"]: one["source"] for one in made["other_pictures"]}


def _activations(network, given, images, others):
    return convscope.activations(network, images, given["layers"], memory=given["memory"])


def _concepts(network, given, images, others):
    return convscope.concepts(network, images, given["count"], given["layer"], batch=given["batch"])


def _heatmap(network, given, images, others):
    target = given["target"] if len(given["target"]) > 1 else given["target"][0]
    if "like" in others:
        target = similarity_target(network, others["like"], given["target_details"]["layer"])
    return convscope.heatmap(
        network,
        images,
        target,
        given["layer"].split(", ") if given["layer"] else "auto",
        method=[METHODS[one["name"]].with_values(**one["options"]) for one in given["methods"]],
        **{name: given[name] for name in ("against", "smooth", "budget", "check", "precision", "seed", "batch")},
    )


def _filters(network, given, images, others):
    channels = given["channels"]
    # Where they are not channels of a layer, what is raised is a text, or all of a layer's channels by the recipe.
    whole = channels is None and given["recipe"]["raises"] != "channels"
    return convscope.filters(
        network,
        given["layer"],
        None if channels is None else channels[:: given["variants"]],
        objectives=() if channels is not None or whole else given["raised"],
        recipe=given["recipe"]["name"],
        steps=given["recipe"]["steps"],
        size=tuple(given["size"]),
        natural_images=images,
        image=others.get("start"),
        **{name: given[name] for name in ("seed", "seeds", "variants", "frames", "precision", "batch")},
    )


def made_again(results):
    """For each result what its provenance gives in another process: `values_of`, or the error as text."""
    ran = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([result.provenance for result in results]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def _tried(made):
    try:
        return values_of(from_provenance(made))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps([_tried(made) for made in json.loads(sys.stdin.read())]))
