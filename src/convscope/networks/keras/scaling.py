"""The usual preprocessing of a Keras model, by its family, where it does no scaling of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from convscope.networks import preprocessing as pp


@dataclass(frozen=True)
class FamilyMatch:
    """The family of `keras.applications` that a model belongs to.

    Attributes:
        family: the family.
        name: the name of the model, or of a model in it, by which it belongs to it.
        certain: `keras.applications` made the model.
    """

    family: pp.Family
    name: str
    certain: bool


def usual_preprocessing(match: FamilyMatch | None) -> pp.Preprocessing:
    """The preprocessing of the model's family, else a guess that is marked as one."""
    if match is not None:
        return _of_family(match)
    reason = "most networks trained from scratch take 0..1; give the preprocessing if yours differs"
    return pp.PRESETS["0..1"].because(pp.GUESS, reason)


def _of_family(match: FamilyMatch) -> pp.Preprocessing:
    preset = pp.PRESETS[match.family.preset]
    if match.certain:
        return preset.because(pp.FOUND, "as keras.applications does for this model")
    reason = f"as keras.applications does for {match.name!r}, which this model has by its name"
    return replace(preset, certainty=pp.GUESS, reason=reason, named_after=match.name)
