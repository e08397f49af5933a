"""One small network on each installed runtime, a process each: activations, gradients, heatmaps and steps agree."""

import agreement
import numpy as np
import pytest


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    installed = agreement.installed()
    if len(installed) < 2:
        pytest.skip(f"agreement needs two runtimes; installed: {', '.join(installed) or 'none'}")
    folder = tmp_path_factory.mktemp("answers")
    return {runtime: agreement.ask(runtime, folder / f"{runtime}.npz") for runtime in installed}


def test_runtimes_agree_to_1e_4(answers):
    reference = answers[agreement.installed()[0]]
    for runtime in agreement.installed()[1:]:
        assert answers[runtime].keys() == reference.keys()
        for name, expected in reference.items():
            tolerance = 0.05 if name == "final" else 1e-4
            apart = agreement.apart(answers[runtime][name], expected)
            assert apart <= tolerance, f"{name} on {runtime}: {apart:.2e} of its largest value"


def test_start_images_are_bit_equal(answers):
    first, *others = (found["start"] for found in answers.values())
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_the_comparison_would_notice(answers):
    found = next(iter(answers.values()))
    assert np.abs(found["heatmap elu"]).max() > 1e-3
    assert np.abs(found["gradient conv"]).max() > 1e-3
    assert np.abs(found["step: update"]).max() > 1e-2
    assert all(np.isfinite(values).all() for values in found.values())
    assert len(found) == len(agreement.LAYERS) - 1 + 1 + 6 + 4 + 5 + 4 + 1
