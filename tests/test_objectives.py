"""Objectives: arithmetic, text, and what they are on a network, against sums written out."""

import random

import numpy as np
import pytest
from expecting import raises

from convscope.errors import UsageError
from convscope.measures import Custom, Diversity, TotalVariation
from convscope.objectives import (
    ENERGY,
    Objective,
    Term,
    as_objective,
    channel,
    class_score,
    direction,
    diversity,
    dot_cosine,
    l2,
    layer,
    likeness,
    logit,
    parse,
    total_variation,
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
        ("-a:3 - 2 * b:*", [Term("a", -1.0, channel=3), Term("b", -2.0, measure=ENERGY)]),
        ("class:tabby - class:281", [Term("class", channel="tabby"), Term("class", -1.0, channel="281")]),
        ("class:tiger cat + a:1", [Term("class", channel="tiger cat"), Term("a", channel=1)]),
        ('class:"a + b"', [Term("class", channel="a + b")]),
        ("1e-1*a:0", [Term("a", 0.1, channel=0)]),
        ("tabby - 0.5*tiger cat", [Term("class", channel="tabby"), Term("class", -0.5, channel="tiger cat")]),
        ("281", [Term("class", channel="281")]),
        (
            "a:[0.5,-1e-3] - .1*tv(input)",
            [Term("a", direction=(0.5, -1e-3)), Term("input", -0.1, measure=TotalVariation())],
        ),
        ("diversity(a/b)", [Term("a/b", measure=Diversity())]),
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
    [("a:3 + b:", 6), ("a:", 0), ("a:3 b:4", 4), ("a:x", 0), ("a:3 + ", 6), ("", 0), ("2*", 2), ("a:3@4", 0)],
)
def test_a_caret_shows_where_text_stops_being_understood(text, place):
    with raises(UsageError, "objective-not-understood", text=text, position=place) as raised:
        parse(text)
    _, shown, caret = str(raised.value).splitlines()
    assert shown == f"  {text}"
    assert caret.index("^") == 2 + place
    assert "expected" in caret


def generated(count):
    """Objectives of all kinds that have a text, with weights and names that are hard to write."""
    drawn = random.Random(0)
    names = [
        "tabby",
        "tiger cat",
        "a + b",
        "- x",
        'say "no"',
        "back\\slash",
        " ends ",
        "two\nlines",
        "3:4",
        "crane (bird)",
    ]
    numbers = [1.0, -1.0, 0.1, 1 / 3, -2e-17, 1e22, 123456.789, 5.0]
    paths = ["conv3", "a/b-c.d#1[0]", "features.0", "input"]
    made = []
    for _ in range(count):
        total = Objective(())
        for _ in range(drawn.randint(1, 4)):
            path = drawn.choice(paths)
            term = drawn.choice(
                [
                    channel(path, drawn.randrange(3000)),
                    unit(path, 1, drawn.randrange(99), 0),
                    logit(drawn.choice(names)),
                    class_score(drawn.randrange(1000)),
                    class_score(drawn.choice(names)),
                    logit(drawn.randrange(1000)),
                    layer(path),
                    direction(path, drawn.choices(numbers, k=3)),
                    diversity(path),
                    likeness(path),
                    total_variation(path),
                    l2(),
                ]
            )
            total = total + drawn.choice([*numbers, drawn.gauss(0, 1)]) * term
        made.append(total)
    return made


def test_every_objective_reads_back_from_its_text_to_the_last_digit():
    for objective in generated(500):
        assert parse(str(objective)) == objective, str(objective)


def test_weights_are_finite_and_directions_too():
    with raises(UsageError, "weight-not-finite", found=float("inf")):
        float("inf") * channel("a", 1)
    with raises(UsageError, "direction-invalid", layer="a", found=1):
        direction("a", [float("nan")])


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
    """What the technique says that the objective is, and the maps and logits of its image."""
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


def weighted(maps, given, power):
    """The dot product times a power of the cosine, written out: means over places, float64."""
    maps, given = maps.astype(np.float64), np.broadcast_to(given, maps.shape).astype(np.float64)
    dot, own, other = ((one * two).sum(axis=-1).mean() for one, two in [(maps, given), (maps, maps), (given, given)])
    return dot * max(dot / np.sqrt(own * other), 0.1) ** power


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_a_dot_product_times_a_power_of_the_cosine(small, power):
    given = np.random.default_rng(0).normal(size=(16, 16, 4)).astype(np.float32)
    result, _, maps = reached(small, dot_cosine("3", given, power))
    assert result.rows[0].activation == pytest.approx(weighted(maps["3"], given, power), rel=1e-4)
    assert result.rows[0].activation > result.rows[0].activations[0]
    vector = given[0, 0]
    result, _, maps = reached(small, dot_cosine("3", vector, power))
    assert result.rows[0].activation == pytest.approx(weighted(maps["3"], vector, power), rel=1e-4)
    result, _, maps = reached(small, dot_cosine("3", vector, power, place=(4, 7)))
    assert result.rows[0].activation == pytest.approx(weighted(maps["3"][4:5, 7:8], vector, power), rel=1e-4)
    with raises(UsageError, "activations-misfit", layer="3", expected=[16, 16, 4], found=[4, 16, 4]):
        reached(small, dot_cosine("3", given[:4]))


class Contrast:
    """A user's own objective: one channel less another, at the brightest place of each."""

    record = ("3",)
    scores = False
    text = "contrast"

    def score(self, ops, logits, activations, arguments):
        return ops.max(activations["3"][..., 0], axis=(1, 2)) - ops.max(activations["3"][..., 1], axis=(1, 2))


def test_a_users_own_objective_in_filters_and_heatmaps(small):
    import convscope

    result, _, maps = reached(small, Contrast())
    row = result.rows[0]
    assert row.activation == pytest.approx(maps["3"][..., 0].max() - maps["3"][..., 1].max(), rel=1e-4)
    assert row.activation > row.activations[0]
    assert row.name == "contrast"
    image = np.random.default_rng(1).integers(0, 255, (16, 16, 3), np.uint8)
    found = convscope.heatmap(small, image, Contrast(), "3", method="hirescam")
    maps = small.forward(small.prepare(found.images), ["3"])[1]["3"][0]
    assert found.rows[0].score == pytest.approx(maps[..., 0].max() - maps[..., 1].max(), rel=1e-4)
    dog = Custom(lambda ops, logits, found: logits[:, 1], text="dog")
    both, _, maps = reached(small, channel("3", 2) + 2 * as_objective(dog))
    assert both.rows[0].name == "3:2 + 2*dog"


def test_a_users_own_regularizer(small):
    """The image itself is `input`: what keeps it from the brightest values."""
    dark = Custom(
        lambda ops, logits, found: ops.mean(found["input"], axis=(1, 2, 3)), ("input",), scores=False, regularizer=True
    )
    free, regularized = (reached(small, channel("3", 1) - weight * as_objective(dark))[0] for weight in (0.0, 1e4))
    assert regularized.values.mean() < free.values.mean() - 0.1
    assert regularized.rows[0].name == "3:1"


@pytest.mark.parametrize(
    ("regularizer", "measure"),
    [
        ("tv(input)", lambda images: np.abs(np.diff(images, axis=1)).mean() + np.abs(np.diff(images, axis=2)).mean()),
        ("l2(input)", lambda images: np.square(images).mean()),
    ],
)
def test_regularizers_of_the_image(small, regularizer, measure):
    free, regularized = (reached(small, f"3:1 - {weight}*{regularizer}")[0] for weight in (0, 1e4))
    assert measure(regularized.values) < 0.95 * measure(free.values)
    with raises(UsageError, "only-regularizers"):
        reached(small, regularizer)


def test_objectives_that_the_network_has_not(small):
    for text, code, data in [
        ("1:6", "channel-out-of-range", {"layer": "1", "channel": 6, "count": 6}),
        ("1:2@16,0", "place-out-of-range", {"layer": "1", "place": [16, 0], "size": [16, 16]}),
        ("class:lynx", "class-unknown", {"name": "lynx"}),
        ("nowhere:1", "layer-unknown", {"name": "nowhere"}),
        (direction("1", [1.0]), "direction-misfit", {"layer": "1", "expected": 6, "found": 1}),
    ]:
        with raises(UsageError, code, **data):
            reached(small, text)


def test_variants_of_one_objective_differ_and_are_the_more_unlike_for_it(small):
    import convscope

    options = {"recipe": "classic", "steps": 12, "precision": "float32", "size": 16, "batch": 4}
    result = convscope.filters(small, "3", [0, 2], variants=2, **options)
    assert [(row.channel, row.variant) for row in result.rows] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert all(row.name == f"3:{row.channel}" for row in result.rows)
    assert not np.allclose(result.values[0], result.values[1])


@pytest.mark.slow(reason="filters from several seeds")
def test_seeds_agree_with_a_number(small):
    import convscope

    rows = convscope.filters(small, "3", [0, 1], recipe="classic", steps=12, seeds=3, size=16, precision="float32").rows
    assert all(-1 <= row.agreement <= 1 for row in rows)
    single = convscope.filters(small, "3", [0, 1], recipe="classic", steps=12, size=16, precision="float32")
    assert [row.agreement for row in single.rows] == [None, None]
    # The agreement of two seeds, from their images' answers less those of noise.
    other = convscope.filters(small, "3", [0], recipe="classic", steps=12, seed=1, size=16, precision="float32")
    both = convscope.filters(small, "3", [0], recipe="classic", steps=12, seeds=2, size=16, precision="float32")
    first = convscope.filters(small, "3", [0], recipe="classic", steps=12, size=16, precision="float32")
    from convscope.techniques.filters.ascent import Plan
    from convscope.techniques.filters.recipes import CLASSIC

    plan = Plan(small, CLASSIC, (16, 16))
    noise = plan.images(np.stack([plan.start((number,)) for number in range(-256, 0)]))
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
    from convscope.techniques.filters.ascent import Plan
    from convscope.techniques.filters.recipes import CLASSIC

    plan = Plan(small, CLASSIC, (16, 16))
    begun = plan.start((2,))
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
    from convscope.techniques.filters.ascent import Slots

    seen, advance = [], Slots.advance

    def tight(self):
        seen.append(len(self.at))
        if len(self.at) > 1:
            raise MemoryError
        return advance(self)

    monkeypatch.setattr(Slots, "advance", tight)
    options = {"recipe": "classic", "steps": 3, "precision": "float32", "size": 16}
    rows = convscope.filters(small, "3", [0, 1, 2, 3], batch=4, **options).rows
    assert seen[:3] == [4, 2, 1]
    monkeypatch.undo()
    alone = convscope.filters(small, "3", [0, 1, 2, 3], batch=1, **options).rows
    assert [row.activation for row in rows] == [row.activation for row in alone]
