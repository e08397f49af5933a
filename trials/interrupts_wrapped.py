"""`interrupts` as a kind of tries: many at once, since it starts a process of its own."""

from __future__ import annotations

import subprocess
from collections import Counter
from typing import Any

from trials.outcomes import Answer, NotTried, Place

_AT_ONCE = 300


def attempt(place: Place, runtime: str) -> Answer:
    """Many interrupts on one runtime."""
    from trials import interrupts

    try:
        return answered(interrupts.run(_AT_ONCE, 1_000_000 * place.seed + place.number, runtime, timeout=480))
    except interrupts.Stuck as stuck:
        return Answer.of("hang", f"an interrupted call did not end: {stuck}")
    except subprocess.TimeoutExpired as error:
        raise NotTried(f"{_AT_ONCE} interrupts took more than {error.timeout:g} s, though each call ended") from error


def answered(found: Any) -> Answer:
    """The counts of `interrupts.run`, in the columns of the table: an interrupted call stands under refused clearly."""
    bad = Counter(other=found.other + found.lost, changed=found.changed)
    fine = Counter(refused=found.interrupted, accepted=max(found.tried - found.interrupted - bad.total(), 0))
    said = [("changed", text) for text in found.changes] + [("other", text) for text in found.others]
    if found.lost:
        said.append(("other", f"{found.lost} signals never reached the user's handler"))
    return Answer(fine + bad, tuple(said), found.tried)
