"""Values, drawing and storing, used from outside: tiles as bytes, every result of a folder, versions of manifests."""

import io
import json
import random
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, replace

import numpy as np
import pytest
from expecting import raises
from PIL import Image
from saved_results import MAKERS

import convscope
from convscope import render, store
from convscope.errors import ConvscopeError, UsageError
from convscope.networks.preprocessing import CERTAINTIES, Preprocessing
from convscope.results import Filters, Heatmap, Origin, RecipeParameters, Result

pytestmark = pytest.mark.without_keras


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def places(sheet, tile):
    """Every place (row, column) at which the tile's pixels are in the sheet, by a slow search."""
    height, width = tile.shape[:2]
    corner = np.argwhere((sheet[: len(sheet) - height + 1, : sheet.shape[1] - width + 1] == tile[0, 0]).all(axis=-1))
    return [(int(y), int(x)) for y, x in corner if np.array_equal(sheet[y : y + height, x : x + width], tile)]


# -- values to pixels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_a_tile_of_a_channel_is_the_sheets_pixels_at_its_place(shared):
    found = MAKERS["activations"]()
    sheet = render.activations.sheet(found, "a/conv", 1, shared)
    where = [places(sheet, pixels(render.activations.tile(found, "a/conv", c, 1, shared=shared))) for c in (0, 1)]
    assert [len(one) for one in where] == [1, 1]
    (first,), (second,) = where
    width = pixels(render.activations.tile(found, "a/conv", 0, 1, shared=shared)).shape[1]
    assert second == (first[0], first[1] + width + 2)  # beside each other, two pixels between them


def test_a_tile_on_a_scale_is_its_formula():
    values = np.array([[-1.0, 0.0], [1.0, 3.0]], np.float32)
    from matplotlib import colormaps

    expected = colormaps["viridis"](np.rint((values + 1) / 4 * 255).astype(int) / 255, bytes=True)[..., :3]
    found = pixels(render.tile(values, (-1, 3), side=40))
    np.testing.assert_array_equal(found, expected.repeat(20, axis=0).repeat(20, axis=1))


def test_a_tile_of_a_filter_is_the_sheets_pixels_at_its_place():
    found = replace(MAKERS["filters"](), style="classic")
    sheet = render.filters.sheet(found)
    for index in (0, 1):
        tile = pixels(render.filters.tile(found, index))
        side = tile.shape[1]
        assert (0, index * (side + 5)) in places(sheet, tile)


@pytest.mark.parametrize(
    ("values", "options"), [(np.zeros((2, 2, 2)), {}), (np.zeros((0, 2)), {}), (np.eye(2), {"side": 0})]
)
def test_what_is_no_tile_is_refused(values, options):
    with raises(UsageError, "array-misfit"):
        render.tile(values, **options)


def test_a_result_of_your_own_is_drawn():
    @dataclass(frozen=True, eq=False, repr=False)
    class Mine(Result):
        kind = "mine"

    render.renderings.register(Mine, lambda result: iter([("grey", np.full((2, 3, 3), 128, np.uint8))]))
    assert '<img src="data:image/png' in Mine()._repr_html_()
    with pytest.raises(TypeError, match=r"store\.save\.register"):
        convscope.save(Mine(), "nowhere")


# -- typed state -----------------------------------------------------------------------------------------


def test_results_are_frozen_and_their_state_is_typed():
    found = Filters(parameters=replace(MAKERS["filters"]().parameters, recipe=RecipeParameters("fast", 9)))
    assert (found.parameters.recipe.steps, found.parameters.seed, found.parameters.interrupted) == (9, 0, False)
    assert found.provenance["parameters"]["recipe"] == {"name": "fast", "steps": 9}
    with pytest.raises(FrozenInstanceError):
        found.parameters.seed = 1


def test_what_is_written_as_provenance_changes_nothing_that_is_drawn_or_said():
    """Provenance is written and never read: any other gives the same renderings."""
    for make in MAKERS.values():
        one = make()
        other = replace(
            one, origin=Origin("net", (9, 8), {"network": None, "parameters": 7}, {"layer": "x", "seed": "y"})
        )
        for (name, drawn), (name_2, drawn_2) in zip(render.renderings(one), render.renderings(other), strict=True):
            assert name == name_2
            np.testing.assert_array_equal(drawn, drawn_2)
        assert one._repr_html_() == other._repr_html_()
        assert repr(one) == repr(other)


def test_values_load_neither_drawing_nor_storing():
    code = "import sys, convscope.results; print([name for name in sys.modules if name.startswith('convscope.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "convscope.render" not in done.stdout
    assert "convscope.store" not in done.stdout


# -- on disk ---------------------------------------------------------------------------------------------


def test_every_result_of_a_folder_is_loaded(tmp_path):
    folder = store.Folder(tmp_path)
    for kind in ("heatmaps", "filters", "heatmaps", "activations"):
        convscope.save(MAKERS[kind](), folder)
    kinds = [result.kind for result in convscope.load_all(tmp_path)]
    assert kinds == ["activations", "filters", "heatmaps", "heatmaps"]
    assert [type(one) for one in convscope.load_all(tmp_path, "heatmaps")] == [Heatmap, Heatmap]
    assert convscope.load_all(tmp_path, "concepts") == ()
    with raises(UsageError, "result-kind-unknown", name="heatmap", match="did you mean 'heatmaps'"):
        convscope.load_all(tmp_path, "heatmap")


@pytest.mark.parametrize("certainty", CERTAINTIES)
def test_filters_keep_all_that_is_known_of_the_preprocessing(certainty, tmp_path):
    known = Preprocessing("own", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), True, certainty, "a reason", "resnet50", "torch")
    convscope.save(replace(MAKERS["filters"](), preprocessing=known), tmp_path)
    assert convscope.load(tmp_path).preprocessing == known


@pytest.fixture(params=MAKERS)
def manifest(request, tmp_path):
    convscope.save(MAKERS[request.param](), tmp_path)
    return tmp_path / f"{request.param}.json"


def change(file, **entries):
    report = json.loads(file.read_text())
    report.update(entries)
    file.write_text(json.dumps({name: value for name, value in report.items() if value is not ...}))


def test_a_newer_schema_is_refused_with_the_version_that_it_needs(manifest):
    change(manifest, schema=store.SCHEMA + 1, needs="7.1.0")
    with raises(
        ConvscopeError, "schema-newer", found=3, needs="convscope 7.1.0", match=r"it needs convscope 7\.1\.0 or newer\."
    ):
        convscope.load(manifest.parent)
    with raises(ConvscopeError, "schema-newer", found=3, needs="convscope 7.1.0"):
        convscope.load_all(manifest.parent)


def test_a_newer_schema_is_refused_whatever_else_is_new(manifest):
    """Nothing of a newer manifest is read but its version, and what it says that it needs can't steer a terminal."""
    for number in range(20):
        rng = random.Random(number)
        report = {"schema": rng.randrange(3, 99), "needs": rng.choice(["\x1b[2J", "", None, 3, ["1"], "9.0" * 40])}
        report |= {rng.choice(["filters", "results", "x"]): rng.choice([1, [], {}, None]) for _ in range(3)}
        manifest.write_text(json.dumps(report))
        with raises(
            ConvscopeError,
            "schema-newer",
            needs="",
            match=r"found schema \d+: it needs a newer version of convscope\.$",
        ):
            convscope.load(manifest)


@pytest.mark.parametrize("number", [0, -1, 1.5, "1", None, True, [1], 2**40])
def test_a_schema_that_is_no_version_is_one_clear_error(manifest, number):
    change(manifest, schema=number)
    with raises(ConvscopeError, "result-invalid", where="schema", expected="a whole number from 1 to 2147483647"):
        convscope.load(manifest)


@pytest.mark.parametrize("number", [1, ...])
def test_a_result_of_a_development_version_is_refused(manifest, number):
    change(manifest, schema=number, needs=...)
    with raises(ConvscopeError, "schema-older", found=1, match="make the result again"):
        convscope.load(manifest.parent)


@pytest.mark.parametrize(
    ("entry", "value"),
    [(entry, value) for entry in ("provenance", "network", "parameters") for value in (None, [], 3)]
    + [("network", {"name": "n"}), ("network", {"name": "n", "input_size": [9]}), ("network", {"name": 3})],
)
def test_a_manifest_with_a_damaged_entry_is_one_clear_error(manifest, entry, value):
    change(manifest, **{entry: value})
    with pytest.raises(ConvscopeError, match=rf"at {entry}.*save the result again"):
        convscope.load(manifest)


def test_a_provenance_is_kept_and_not_read(manifest):
    """Whatever stands in it, the result is the same, and its provenance is what was loaded."""
    before = convscope.load(manifest)
    change(manifest, provenance={"network": 3, "pictures": "none", "parameters": []})
    after = convscope.load(manifest)
    assert after.parameters == before.parameters
    assert (after.origin.network, after.origin.input_size) == (before.origin.network, before.origin.input_size)
    assert after.provenance == {"network": 3, "pictures": "none", "parameters": before.provenance["parameters"]}


def test_a_parameter_of_another_type_is_one_clear_error(manifest):
    report = json.loads(manifest.read_text())
    name = next(iter(set(report["parameters"]) & {"memory", "seed", "check", "count"}))
    report["parameters"][name] = {"x": 1}
    manifest.write_text(json.dumps(report))
    with pytest.raises(ConvscopeError, match=rf"at parameters\.{name}, found an object"):
        convscope.load(manifest)
