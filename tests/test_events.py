"""Progress events: their types, and what each technique tells."""

import numpy as np
import pytest

import convscope
from convscope import events
from convscope.events import Advanced, Event, ItemFinished, Started


def test_a_stage_is_put_in_front():
    told = []
    events.within(events.within(told.append, "outer"), "inner")(ItemFinished(1, 3, "cat", item=7))
    assert told == [ItemFinished(1, 3, "cat", stages=("outer", "inner"), item=7)]
    assert told[0].label == "outer: inner: cat"


def test_without_a_listener_nothing_happens():
    assert events.within(None, "stage") is None
    events.tell(None, Started(0, 1, "x"))


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("keras")
    import models

    return convscope.open_model(models.plain())


def told(technique, *arguments, **options):
    found = []
    technique(*arguments, **options, progress=found.append)
    assert all(isinstance(event, Event) for event in found)
    assert isinstance(found[0], Started)
    assert found[0].done == 0
    done = [event.done for event in found]
    assert done == sorted(done)
    assert found[-1].done == found[-1].total
    return found


def test_activations_tell_each_item(network, photo):
    found = told(convscope.activations, network, [photo, photo])
    assert [event.item for event in found if isinstance(event, ItemFinished)]


def test_a_heatmap_is_told_with_its_map(network, photo):
    found = told(convscope.heatmap, network, [photo, photo])
    items = [event.item for event in found if isinstance(event, ItemFinished)]
    result = convscope.heatmap(network, [photo, photo])
    assert len(items) == 2
    for item, one, other in zip(items, result.rows, result.maps, strict=True):
        np.testing.assert_array_equal(item.heat, other)
        assert (item.image.name, item.row) == (one.image, one)


def test_a_filter_is_told_when_it_is_finished(network):
    found = []
    options = {"recipe": "classic", "steps": 3, "size": 16}
    convscope.filters(network, network.select("conv")[0].path, [0, 1, 2], progress=found.append, **options)
    assert len([event for event in found if isinstance(event, ItemFinished)]) == 3
    assert any(isinstance(event, Advanced) for event in found)


def test_concepts_tell_how_far_they_are(network, photo):
    told(convscope.concepts, network, [photo, photo[::-1].copy()], 2)
