"""Do heatmaps find known regions? convscope's methods and those of other tools.

    python -m benchmarks.heatmaps [--cases 20] [--few 4] [--out docs/heatmaps-truth.md]

Three kinds of images: 2x2 mosaics of images of known classes, mosaics of the shipped demo's classes, and small images
planted on others. Each method explains the same class of the same images; all maps are measured in one way. Methods
that replay the network for every image are given fewer of them (`--few`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import truth
from benchmarks.ascents import NotMeasured, opened
from benchmarks.filters import machine, write
from benchmarks.heatmap_tools import PEERS
from benchmarks.truth import Case
from convscope import heatmap, open_model
from convscope.techniques.heatmaps import faithfulness as faith
from convscope.techniques.heatmaps.evidence import ImageView, TraceSpec, trace
from convscope.techniques.heatmaps.methods import METHODS, results_of
from convscope.techniques.heatmaps.targets import goal_of

SLOW = ("score-cam", "rise", "occlusion", "ablation-cam", "smoothgrad", "integrated-gradients", "score", "ablation")
CURVES = 6  # cases whose deletion and insertion are measured
CHECKED = 3  # cases whose badge is measured, in the tables of mosaics
Maker = Callable[[Sequence[Case]], list[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Setting:
    """A network with its cases."""

    title: str
    key: str
    network: Any
    cases: list[Case]


def main() -> None:
    """Print the tables, or write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--few", type=int, default=4)
    parser.add_argument("--only", help="part of a table's title")
    parser.add_argument("--out", help="a Markdown file to write")
    options = parser.parse_args()
    write(page(options.cases, options.few, options.only), options.out)


def page(cases: int, few: int, only: str | None = None) -> Iterator[str]:
    """The page, line after line."""
    yield "# Do heatmaps find the known regions?\n"
    yield f"Made by `python -m benchmarks.heatmaps --cases {cases} --few {few}`. {machine()}\n"
    yield f"{cases} images of each kind; {few} for methods that replay the network.\n"
    yield "- points: share of images whose highest place lies on the class (a constant map points nowhere)"
    yield "- mass: share of the positive part that lies on it"
    yield "- overlap: the best ratio of intersection to union with it over all thresholds"
    yield "- deletion, insertion: area under the probability while the most important pixels go (less is better) or"
    yield f"  come back (more is better); {CURVES} images at most"
    yield f"- badge: the verdict on {CHECKED} mosaics, likeness to maps of scrambled weights (less is better) and of"
    yield "  noisy copies (more is better); see docs/heatmaps.md"
    yield "- seconds: for an image, in one batch, the second time\n"
    rows: list[str] = []
    for make in settings(cases):
        try:
            setting = make()
        except NotMeasured as reason:
            yield f"Not measured: {reason}\n"
            continue
        if only is None or only in setting.title:
            for line in table(setting, few):
                rows.append(line)
                yield line
    yield from in_short(rows)


def in_short(lines: Sequence[str]) -> Iterator[str]:
    """Of tables that were printed, for each method that is in all of them the means of its places."""
    found: dict[str, list[list[float]]] = {}
    for line in lines:
        name, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) > 2 and not cells[0].startswith(("not measured", "points", "---")):
            found.setdefault(name, []).append([float(cell) for cell in (*cells[:3], cells[-1])])
    tables = max(map(len, found.values()), default=0)
    means = {name: np.mean(rows, axis=0) for name, rows in found.items() if len(rows) == tables}
    if tables < 2:
        return
    yield f"## In short: means over {tables} tables\n"
    yield "| method | points | mass | overlap | mean of the three | images of each kind |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, mean in sorted(means.items(), key=lambda item: -item[1][:3].mean()):
        numbers = " | ".join(f"{number:.2f}" for number in (*mean[:3], mean[:3].mean()))
        yield f"| {name} | {numbers} | {mean[3]:.0f} |"
    left_out = [name for name in found if name not in means]
    yield f"\nNot in all of the tables: {', '.join(left_out) or 'none'}. Of the slower methods fewer images."
    yield ""


def settings(count: int) -> list[Callable[[], Setting]]:
    """The cases to measure, made when they are needed."""

    def of(name: str, kind: str, make: Callable) -> Callable[[], Setting]:
        def made() -> Setting:
            network = opened(name)
            return Setting(f"{name}, {kind}", name, network, make(network, count))

        return made

    def demo() -> Setting:
        from convscope.demo import CLASSES, MODEL

        cases = truth.demo_mosaics(count)
        network = open_model(str(MODEL), classes=CLASSES, size=cases[0].mask.shape)
        return Setting("the demo's network, mosaics", "demo", network, cases)

    networks = ("MobileNet", "SqueezeNet")
    return [
        *(of(name, "mosaics of images", truth.photo_mosaics) for name in networks),
        *(of(name, "planted images", truth.planted) for name in networks),
        demo,
    ]


def table(setting: Setting, few: int) -> Iterator[str]:
    """Images of one kind."""
    yield f"## {setting.title}\n"
    yield "| method | points | mass | overlap | deletion | insertion | badge | seconds | images |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    judged = "mosaics" in setting.title
    for name, maps in truth.controls(setting.cases).items():
        yield row(f"control: {name}", setting, maps, np.nan, control_badge(setting, name) if judged else "")
    for name in METHODS:
        yield measured(name, setting, few, ours(setting, name), badge if judged else None)
    for tool, makers in PEERS.get(setting.key, {}).items():
        for name, make in makers.items():
            yield measured(f"{tool}: {name}", setting, few, lambda cases, make=make: make(setting.network, cases))
    yield ""


def measured(name: str, setting: Setting, few: int, make: Maker, judge: Callable | None = None) -> str:
    """A method's row."""
    cases = setting.cases[:few] if any(slow in name.lower() for slow in SLOW) else setting.cases
    try:
        make(cases[:2])
        begun = time.perf_counter()
        maps = make(cases)
    except Exception as reason:  # whatever another tool raises
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        return f"| {name} | not measured: {lines[0][:120]} | | | | | | | |"
    seconds = (time.perf_counter() - begun) / len(cases)
    return row(name, setting, maps, seconds, judge(setting, name) if judge else "")


def ours(setting: Setting, name: str) -> Maker:
    """A method of convscope."""

    def make(cases: Sequence[Case]) -> list[np.ndarray]:
        found = heatmap(setting.network, [case.pixels for case in cases], [case.target for case in cases], method=name)
        return list(found.maps)

    return make


def row(name: str, setting: Setting, maps: Sequence[np.ndarray], seconds: float, badge: str) -> str:
    """Means over the images that there are maps for."""
    cases = setting.cases[: len(maps)]
    pairs = list(zip(maps, cases, strict=True))
    numbers = [
        np.mean([measure(*pair) for pair in pairs]) for measure in (truth.pointed, truth.mass, truth.best_overlap)
    ]
    curves = np.mean([curve(setting, *pair) for pair in pairs[:CURVES]], axis=0)
    time_ = "" if np.isnan(seconds) else f"{seconds:.3f}"
    cells = " | ".join(f"{number:.2f}" for number in (*numbers, *curves))
    return f"| {name} | {cells} | {badge} | {time_} | {len(cases)} |"


def curve(setting: Setting, raw: np.ndarray, case: Case) -> tuple[float, float]:
    """Deletion and insertion."""
    one = single(setting, case)
    places = faith.ranked(raw, one.x.shape[1:3], np.random.default_rng(0))
    return faith.deletion(one, places), faith.insertion(one, places)


def single(setting: Setting, case: Case) -> ImageView:
    """The case's image and score."""
    network = setting.network
    x = network.prepare(truth.images_of([case.pixels]))
    goal = goal_of(network, case.target, None, 1, lambda: np.zeros((1, 1)))
    return next(trace(TraceSpec(network, None, goal.target), x, goal.arguments).views())


def badge(setting: Setting, name: str) -> str:
    """The verdicts on the first few images, and the means of their numbers."""
    network, method, found = setting.network, METHODS[name], []
    method = method.with_budget(CHEAP[name]) if name in CHEAP else method
    layer = None if method.at_image else network.last_spatial_layer()
    for case in setting.cases[:CHECKED]:
        one = single(setting, case)
        rows = tuple(argument[None] for argument in one.arguments)

        def remake(x: np.ndarray, one: ImageView = one, rows: tuple = rows) -> np.ndarray:
            (made,) = results_of(method, trace(TraceSpec(network, layer, one.target), x, rows, resolved=True))
            return made.heat

        found.append(judged(one, remake))
    return verdicts(found)


def judged(one: ImageView, remake: Callable[[np.ndarray], np.ndarray]) -> tuple[str, float, float]:
    """The badge, likeness to maps of scrambled weights and of noisy copies."""
    raw = remake(one.x)
    scrambled = faith.randomisation(one, raw, remake)
    steady = faith.stability(one.x, raw, remake, np.random.default_rng(0))
    return faith.verdict(raw, scrambled, steady)[0], np.nan if scrambled is None else scrambled, steady


CHEAP = {"score-cam": 32, "rise": 128, "smoothgrad": 16, "integrated-gradients": 16}  # budgets while checking


def control_badge(setting: Setting, name: str) -> str:
    """The same for a map that does not depend on the network."""
    found, random = [], np.random.default_rng(5)
    makers: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "random": lambda x: random.random((7, 7)),
        "centre": lambda x: truth.centre_map(x.shape[1:3]),
        "edges": lambda x: truth.edges(x[0]),
    }
    for case in setting.cases[:CHECKED]:
        found.append(judged(single(setting, case), makers[name]))
    return verdicts(found)


def verdicts(found: Sequence[tuple[str, float, float]]) -> str:
    """ "pass 3, doubtful 1 (0.31; 0.92)": numbers of verdicts, mean likeness to scrambled maps, mean stability."""
    names = [name for name, _, _ in found]
    told = ", ".join(f"{name} {names.count(name)}" for name in ("pass", "doubtful", "fail") if name in names)
    scrambled, steady = (float(np.mean([one[place] for one in found])) for place in (1, 2))
    return f"{told} ({scrambled:.2f}; {steady:.2f})"


if __name__ == "__main__":
    main()
