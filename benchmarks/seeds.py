"""The promises of a seed, shown on the demo's network: filters alone, in a batch, and in chunks of other sizes.

python -m benchmarks.seeds [--recipe fast] [--precision float32]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import convscope
from convscope import demo
from convscope.techniques.filters.ascent import Plan
from convscope.techniques.filters.recipes import recipe_named

LAYER = "block3_conv"
CHANNELS = tuple(range(12))
WATCHED = 5  # one of them


def main() -> None:
    """Print each promise and the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    network = convscope.open_model(demo.MODEL)

    def climbed(channels: Sequence[int], batch: int, seed: int = 0) -> convscope.results.Filters:
        return convscope.filters(
            network,
            LAYER,
            channels,
            recipe=options.recipe,
            size=64,
            seed=seed,
            batch=batch,
            precision=options.precision,
        )

    plan = Plan(network, recipe_named(options.recipe), (64, 64))
    alone, together = plan.start((WATCHED,)), [plan.start((number,)) for number in CHANNELS][WATCHED]
    print(f"{LAYER} of the demo's network, recipe {options.recipe}, {options.precision}, {network.backend}")
    print(f"start images, alone and among {len(CHANNELS)}: {_apart(alone, together)}")
    first = climbed(CHANNELS, 4)
    place = CHANNELS.index(WATCHED)
    print(f"final image, the same call again: {_apart(first.values, climbed(CHANNELS, 4).values)}")
    others = climbed((40, 41, WATCHED, 50, 51), 4)
    print(f"final image, beside other filters, same batch: {_apart(first.values[place], others.values[2])}")
    print(f"final image, another seed: {_apart(first.values, climbed(CHANNELS, 4, seed=1).values)}")
    reached = np.array([row.activation for row in first.rows])
    for batch in (1, 3, 12):
        now = np.array([row.activation for row in climbed(CHANNELS, batch).rows])
        apart = np.abs(now - reached) / np.maximum(np.abs(reached), 1e-12)
        print(
            f"final activations, batch {batch} and 4: apart {np.median(apart):.1e} (median), {apart.max():.1e} (most)"
        )


def _apart(one: np.ndarray, other: np.ndarray) -> str:
    return "equal to the bit" if np.array_equal(one, other) else f"{np.abs(one - other).max():.2g} apart at most"


if __name__ == "__main__":
    main()
