"""The usual preprocessing of a PyTorch module, where it does no scaling of its own."""

from __future__ import annotations

from convscope.networks import preprocessing as pp


def usual_preprocessing(channels: int) -> pp.Preprocessing:
    """The preprocessing that most modules for images of so many channels take, as a guess."""
    if channels != 3:
        reason = "most networks for such images take 0..1; give the preprocessing if yours differs"
        return pp.PRESETS["0..1"].because(pp.GUESS, reason)
    reason = "most networks made with PyTorch take it; give the preprocessing if yours differs"
    return pp.PRESETS["torch"].because(pp.GUESS, reason)
