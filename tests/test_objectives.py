"""Objectives: arithmetic, text, and what they are on a network, against sums written out."""

import numpy as np
import pytest

from convscope.errors import UsageError
from convscope.techniques.filters.objectives import (
    Term,
    channel,
    direction,
    layer,
    logit,
    parse,
    unit,
)


def test_arithmetic_makes_new_objectives_and_changes_none():
    a, b = channel("a", 3), channel("b", 9)
    both = a + 0.5 * b
    assert [(term.layer, term.channel, term.weight) for term in both.terms] == [("a", 3, 1.0), ("b", 9, 0.5)]
    assert [term.weight for term in (-both).terms] == [-1.0, -0.5]
    assert [term.weight for term in (2 * both - a).terms] == [2.0, 1.0, -1.0]
    assert a == channel("a", 3)
    assert b == channel("b", 9)
    with pytest.raises(AttributeError):
        a.terms = ()


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("conv3:17", [Term("conv3", channel=17)]),
        ("  conv3:17 ", [Term("conv3", channel=17)]),
        ("a/b-c.d#1[0]:3@4,5", [Term("a/b-c.d#1[0]", channel=3, place=(4, 5))]),
        ("a:3 + 0.5*b:9", [Term("a", channel=3), Term("b", 0.5, channel=9)]),
        ("-a:3 - 2 * b:*", [Term("a", -1.0, channel=3), Term("b", -2.0, measure="energy")]),
        ("class:tabby - class:281", [Term("class", channel="tabby"), Term("class", -1.0, channel="281")]),
        ("class:tiger cat + a:1", [Term("class", channel="tiger cat"), Term("a", channel=1)]),
        ('class:"a + b"', [Term("class", channel="a + b")]),
        ("1e-1*a:0", [Term("a", 0.1, channel=0)]),
    ],
)
def test_text(text, terms):
    assert list(parse(text).terms) == terms


@pytest.mark.parametrize("text", ["conv3:17", "a:3 + 0.5*b:9", "-a:3 - 2*b:*", "a:3@4,5", "class:tabby - class:281"])
def test_text_and_objective_are_the_same(text):
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [("a:3 + b", 6), ("a", 0), ("a:3 b:4", 4), ("a:x", 0), ("a:3 + ", 6), ("", 0), ("2*", 2), ("a:3@4", 0)],
)
def test_a_caret_shows_where_text_stops_being_understood(text, place):
    with pytest.raises(UsageError) as raised:
        parse(text)
    _, shown, caret = str(raised.value).splitlines()
    assert shown == f"  {text}"
    assert caret.index("^") == 2 + place
    assert "expected" in caret


# -- on a network ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    torch = pytest.importorskip("torch")
    from convscope import open_model

    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(6, 4, 3, padding=1),
        torch.nn.Tanh(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 3),
    )
    return open_model(module, size=(16, 16), preprocess="-1..1", classes=["cat", "dog", "tiger cat"])


def reached(network, objective, **options):
    """What the technique says that the objective is, and the maps and logits of its picture."""
    import convscope

    result = convscope.filters(
        network, objectives=[objective], recipe="classic", steps=2, size=16, precision="float32", **options
    )
    logits, maps = network.forward(result.values, ["1", "3"])
    return result, logits[0], {path: activation[0] for path, activation in maps.items()}


def test_an_objective_is_the_sum_that_its_text_says(small):
    result, logits, maps = reached(small, "1:2 + 0.5*3:1 - class:tiger cat")
    inside = maps["1"][2:-2, 2:-2, 2].mean() + 0.5 * maps["3"][2:-2, 2:-2, 1].mean() - logits[2]
    assert result.rows[0].activation == pytest.approx(inside, rel=1e-4)
    assert result.rows[0].name == "1:2 + 0.5*3:1 - class:2"
    assert result.rows[0].channel is None
    assert result.layer is None


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (unit("3", 1, 4, 7), lambda logits, maps: maps["3"][4, 7, 1]),
        (channel("3", 1), lambda logits, maps: maps["3"][2:-2, 2:-2, 1].mean()),
        (logit("dog"), lambda logits, maps: logits[1]),
        (layer("3"), lambda logits, maps: (maps["3"] ** 2).mean()),
        (direction("3", [1, -2, 0, 3]), lambda logits, maps: (maps["3"][2:-2, 2:-2] @ [1, -2, 0, 3]).mean()),
        (-2 * channel("3", 0), lambda logits, maps: -2 * maps["3"][2:-2, 2:-2, 0].mean()),
    ],
)
def test_each_kind_of_objective(small, objective, expected):
    result, logits, maps = reached(small, objective)
    row = result.rows[0]
    assert row.activation == pytest.approx(expected(logits, maps), rel=1e-4, abs=1e-6)
    assert row.activation > row.activations[0]


def test_objectives_that_the_network_has_not(small):
    for text, said in [
        ("1:6", "0 to 5"),
        ("1:2@16,0", "16x16"),
        ("class:lynx", "lynx"),
        ("nowhere:1", "nowhere"),
        (direction("1", [1.0]), "6 numbers"),
    ]:
        with pytest.raises(UsageError, match=said):
            reached(small, text)


def test_variants_of_one_objective_differ_and_are_the_more_unlike_for_it(small):
    import convscope

    options = {"recipe": "classic", "steps": 12, "precision": "float32", "size": 16, "batch": 4}
    result = convscope.filters(small, "3", [0, 2], variants=2, **options)
    assert [(row.channel, row.variant) for row in result.rows] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert all(row.name == f"3:{row.channel}" for row in result.rows)
    assert not np.allclose(result.values[0], result.values[1])


def test_seeds_agree_with_a_number(small):
    import convscope

    rows = convscope.filters(small, "3", [0, 1], recipe="classic", steps=12, seeds=3, size=16, precision="float32").rows
    assert all(-1 <= row.agreement <= 1 for row in rows)
    single = convscope.filters(small, "3", [0, 1], recipe="classic", steps=12, size=16, precision="float32")
    assert [row.agreement for row in single.rows] == [None, None]
    # The agreement of two seeds, from their pictures' answers less those of noise.
    other = convscope.filters(small, "3", [0], recipe="classic", steps=12, seed=1, size=16, precision="float32")
    both = convscope.filters(small, "3", [0], recipe="classic", steps=12, seeds=2, size=16, precision="float32")
    first = convscope.filters(small, "3", [0], recipe="classic", steps=12, size=16, precision="float32")
    from convscope.techniques.filters.courses import Plan
    from convscope.techniques.filters.recipes import CLASSIC

    plan = Plan(small, CLASSIC, (16, 16))
    climb = plan.climb(plan.bind(channel("3", 0)))
    noise = climb.pictures(np.stack([climb.start((number,)) for number in range(-256, 0)]))
    answer = [
        small.forward(x, ["3"])[1]["3"][:, 2:-2, 2:-2].mean(axis=(1, 2)) for x in (first.values, other.values, noise)
    ]
    one, two = answer[0][0] - answer[2].mean(axis=0), answer[1][0] - answer[2].mean(axis=0)
    assert both.rows[0].agreement == pytest.approx(one @ two / np.linalg.norm(one) / np.linalg.norm(two), abs=1e-3)


def test_frames_begin_at_the_start_and_end_before_the_last_step(small):
    import convscope

    result = convscope.filters(
        small, "3", [0, 1, 2], recipe="classic", steps=9, frames=3, batch=2, size=16, precision="float32"
    )
    assert result.frames.shape == (3, 3, 16, 16, 3)
    from convscope.techniques.filters.courses import Plan
    from convscope.techniques.filters.recipes import CLASSIC

    plan = Plan(small, CLASSIC, (16, 16))
    begun = plan.climb(plan.bind(channel("3", 0))).start((2,))
    np.testing.assert_array_equal(result.frames[2, 0], begun)
    assert result.provenance["parameters"]["frame_steps"] == [0, 4, 8]


def test_what_is_finished_is_kept_when_interrupted(small):
    import convscope

    def after(event):
        if event.done >= 12:
            raise KeyboardInterrupt

    options = {"recipe": "classic", "steps": 5, "batch": 2, "precision": "float32", "size": 16}
    part = convscope.filters(small, "3", [0, 1, 2, 3], progress=after, **options)
    whole = convscope.filters(small, "3", [0, 1, 2, 3], **options)
    assert part.provenance["parameters"]["interrupted"]
    assert not whole.provenance["parameters"]["interrupted"]
    assert [row.channel for row in part.rows] == [0, 1]
    np.testing.assert_array_equal(part.values, whole.values[:2])

    def at_once(event):
        if event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convscope.filters(small, "3", [0, 1], progress=at_once, **options)


def test_memory_that_runs_out_halves_the_batch(small, monkeypatch):
    import convscope
    from convscope.techniques.filters.ascent import _Lanes

    seen, advance = [], _Lanes.advance

    def tight(self):
        seen.append(len(self.at))
        if len(self.at) > 1:
            raise MemoryError
        advance(self)

    monkeypatch.setattr(_Lanes, "advance", tight)
    options = {"recipe": "classic", "steps": 3, "precision": "float32", "size": 16}
    rows = convscope.filters(small, "3", [0, 1, 2, 3], batch=4, **options).rows
    assert seen[:3] == [4, 2, 1]
    monkeypatch.undo()
    alone = convscope.filters(small, "3", [0, 1, 2, 3], batch=1, **options).rows
    assert [row.activation for row in rows] == [row.activation for row in alone]
