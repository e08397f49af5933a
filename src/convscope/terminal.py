"""Text on its way to the terminal: text from files, names and other libraries can't control it.

A file can call a layer or a class anything: an escape sequence that clears the screen, letters that turn the line
round, a line break that counterfeits a message. `safe` is the one place where text is made harmless, by a list of what
may pass; `Guarded` is a stream that does it with whatever is written to it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import unicodedata
from functools import lru_cache
from typing import TextIO

# Letters, marks, numbers, punctuation and symbols. Not in it: controls, formats (which turn the direction of the line,
# or can't be seen), separators of lines, spaces but two (English has one, Chinese the other), halves of surrogates, and
# what is private or unknown.
_HARMLESS = frozenset({
    "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po",
    "Sm", "Sc", "Sk", "So",
})  # fmt: skip


def safe(text: str, lines: bool = False) -> str:
    """Text with everything that is not harmless written as an escape, such as ``\\x1b`` or ``\\u202e``.

    Args:
        text: text from any source.
        lines: line breaks and tabs may stay; for text whose lines are of our own making.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if lines and one in "\n\t" else _safe_letter(one) for one in text)


@lru_cache(4096)
def _safe_letter(one: str) -> str:
    # Some marks and letters are not drawn at all, and texts that appear equal would differ by them.
    if one in " \u3000" or (unicodedata.category(one) in _HARMLESS and one not in _UNSEEN):
        return one
    return one.encode("unicode_escape").decode()


_UNSEEN = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\u2800"  # joiners and fillers that count as letters or symbols
    + "".join(map(chr, [*range(0x180B, 0x1810), *range(0xE0100, 0xE01F0)]))  # selectors of variants, which stack up
)


def safe_json(text: str) -> str:
    """A JSON text, as `json.dumps` makes it, with unsafe characters as JSON's own escapes: the same value."""
    return re.sub(r"[^\n -~]", _json_escape, text)


def _json_escape(found: re.Match[str]) -> str:
    one = found[0]
    if safe(one) == one:
        return one
    units = one.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


class Lenient(io.TextIOBase):
    """A stream for people: where it is closed or full, nobody reads it, and the work goes on."""

    def __init__(self, target: TextIO | Lenient | None) -> None:
        self._target = target

    def write(self, text: str) -> int:
        """Write, or drop, the text."""
        if self._target is not None:
            with contextlib.suppress(OSError, ValueError):
                self._target.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the streams that are open."""
        if self._target is not None:
            with contextlib.suppress(OSError, ValueError):
                self._target.flush()

    def isatty(self) -> bool:
        """True if a person may read the output."""
        return self._target is not None and not self._target.closed and self._target.isatty()

    def fileno(self) -> int:
        """The descriptor of the target."""
        if self._target is None:
            raise io.UnsupportedOperation("fileno")
        return self._target.fileno()

    def writable(self) -> bool:
        """Always."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the target."""
        return getattr(self._target, "encoding", None) or "utf-8"


class Guarded(Lenient):
    """A stream for text that other code prints, which reaches its target only as `safe` lets it."""

    def write(self, text: str) -> int:
        """Write, or drop, the text."""
        # A bar of progress of another library goes back to the start of its line, and does so at the start of a text.
        back = "\r" if text.startswith("\r") else ""
        super().write(back + safe(text[len(back) :].replace("\r\n", "\n"), lines=True))
        return len(text)

    def isatty(self) -> bool:
        """True if a person may read the output."""
        return False  # so nobody colours what is written here: the escapes would be shown


def fill_closed() -> None:
    """Open closed ones of stdin, stdout and stderr: else the next file that is opened gets the printed text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free


def let_go() -> None:
    """Flush stdout and stderr; text that can't be written is dropped, so that Python prints no error when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except ValueError:
            pass
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            with contextlib.suppress(OSError):
                stream.flush()
