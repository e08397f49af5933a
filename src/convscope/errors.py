"""The errors that convscope raises on purpose.

Each message has the expected value, the found value and the remedy; each error has a code and data for programs.
A message names a parameter with `option("size")`: the library writes it as Python does (`size=`), and a shell that has
another spelling gives it to `ConvscopeError.text` (the command line: `--input-size N or HxW`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

LONGEST_LINE = 1000
_MOST_COMPARED = 10_000  # names that a word is compared to, at some microseconds each
# Marks around the name of a parameter: characters for private use, which no message has otherwise.
_OPEN, _CLOSE = "\ue000", "\ue001"
# Compiled here: an error may be made where the memory has run out.
_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


def option(name: str) -> str:
    """A parameter in the message of an error, which each shell spells in its own way.

    Args:
        name: of the parameter in Python. Where commands spell parameters of one name differently, the function's name
            stands before it: "open_model.size". With a value: "trust=True"; as a call: "limits.using:seconds=300".

    Example:
        >>> error = UsageError(f"give one with {option('image')}.")
        >>> str(error)
        'give one with image=.'
        >>> error.text(lambda name: f"--{name} IMAGE")
        'give one with --image IMAGE.'
    """
    return f"{_OPEN}{name}{_CLOSE}"


def bulleted(lines: Sequence[str], most: int) -> str:
    """The first `most` of some lines for the end of a message, each on a line of its own, and how many more there are.

    Example:
        >>> print("found:" + bulleted(["a cat", "a dog", "a cup"], 1))
        found:
          - a cat
          - and 2 more
    """
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  - {line}" for line in [*lines[:most], *more])


def _in_python(name: str) -> str:
    function, _, arguments = name.rpartition(":")
    if function:
        return f"{function}({arguments})"
    return name if "=" in name else f"{name.rpartition('.')[2]}="


def cut(text: str) -> str:
    """A text whose lines have at most `LONGEST_LINE` characters: of a longer one the beginning and the end are kept.

    Example:
        >>> len(cut("a" * 5000)) <= LONGEST_LINE
        True
    """
    return "\n".join(map(_cut_line, text.split("\n")))


def _cut_line(line: str) -> str:
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE * 2 // 3]} … {line[-LONGEST_LINE // 3 + 3 :]}"


class ConvscopeError(Exception):
    """Something outside convscope is not as it has to be: a file, a model, a backend (exit code 1).

    A name from a file can be as long as the file, so each line of the message is cut to `LONGEST_LINE` characters.

    Args:
        message: the expected value, the found value, the remedy; parameters as `option` writes them.
        code: kind of the error, for programs: words joined by "-", such as "channel-out-of-range"; it stays when the
            message is worded better. `docs/errors.md` lists all. The class's own where it is left out, as a user's own
            method may.
        data: the subject of the message, as plain values, such as `channel=70, count=64`.

    Example:
        >>> error = ConvscopeError("no channel 70.", code="channel-out-of-range", channel=70, count=64)
        >>> error.code, error.data["channel"], error.exit_code
        ('channel-out-of-range', 70, 1)
    """

    exit_code = 1
    kind: ClassVar[str] = "failed"

    def __init__(self, message: str = "", *, code: str | None = None, **data: object) -> None:
        self.code, self.data, self._message = code or self.kind, data, message
        super().__init__(self.text(_in_python))

    @property
    def message(self) -> str:
        """The text with its parameters as `option` marks them, for the message of another error."""
        return self._message

    def text(self, spelling: Callable[[str], str]) -> str:
        """The message, with each parameter as `spelling` writes its name."""
        spelled = _MARKED.sub(lambda found: spelling(found[1]), self._message)
        # A message that was shortened can have lost one of two marks.
        return cut(_MARKS.sub("", spelled))


class UsageError(ConvscopeError):
    """A requested value does not exist or does not fit: a layer, a channel, a class, an option (exit code 2).

    Example:
        >>> network.layer("block9")
        Traceback (most recent call last):
        convscope.errors.UsageError: no layer 'block9'; ...
    """

    exit_code = 2
    kind = "wrong-use"


class ImageError(ConvscopeError):
    """An image can't be read.

    Example:
        >>> convscope.heatmap(network, "no-such-file.jpg")
        Traceback (most recent call last):
        convscope.errors.ImageError: ...
    """

    kind = "image"


class ModelError(ConvscopeError):
    """A model can't be opened or can't be run.

    Example:
        >>> convscope.open_model("no-such-file.keras")
        Traceback (most recent call last):
        convscope.errors.ModelError: ...
    """

    kind = "model"


class OutOfMemoryError(ModelError, MemoryError):
    """The memory does not suffice to run a model. Each framework has an error of its own for that.

    Example:
        >>> issubclass(OutOfMemoryError, MemoryError)
        True
    """

    kind = "out-of-memory"


class Unreadable(ConvscopeError):
    """A file can't be read; the text is the reason alone, for whoever asked for the file to make a message of.

    Its code is "file-missing", "is-folder" or "no-regular-file" where there is no file to read, "input-too-large" where
    it is beyond a limit (`limit` in the data), and else what is wrong with its content, such as "not-text".

    Example:
        >>> Unreadable("it is empty", code="file-empty").code
        'file-empty'
    """

    kind = "unreadable"


class BackendError(ConvscopeError):
    """A framework is missing, or another one is already in use in this process.

    Example:
        >>> BackendError("jax is not installed.", code="backend-missing", name="jax").data
        {'name': 'jax'}
    """

    kind = "backend"


def nearest(word: str, choices: Iterable[str], count: int = 3) -> str:
    """The `choices` most like `word` as text for a message, or all of the first few when none is alike.

    A choice that is a path, "outer/inner/conv", is also known by its last part.
    """
    choices = list(dict.fromkeys(choices))
    known = {choice.lower().rpartition("/")[2]: choice for choice in reversed(choices)}
    known |= {choice.lower(): choice for choice in choices}
    compared = list(known)[:_MOST_COMPARED] + [word.lower()] * (word.lower() in known)
    alike = difflib.get_close_matches(word.lower(), dict.fromkeys(compared), n=2 * count, cutoff=0.4)
    close = list(dict.fromkeys(known[name] for name in alike))[:count]
    close = close or [choice for choice in choices if word.lower() in choice.lower()][:count]
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    shown = ", ".join(repr(choice) for choice in choices[:8]) + (", …" if len(choices) > 8 else "")
    return f"there is {shown}" if choices else "there is none"


def one_line(error: BaseException) -> str:
    """The text of an error, in one line without colours, for a message of our own (which spells parameters itself).

    Libraries put names and bytes of files into it: what is not to be printed is written as an escape.
    """
    if isinstance(error, ConvscopeError):
        return error.message
    # Keras names the place first, and the error after that.
    text = _COLOURS.sub("", str(error)).rsplit("Exception encountered:", 1)[-1]
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("Exception encountered when calling")]
    return printable(lines[0][:300]) if lines else type(error).__name__


def printable(text: str) -> str:
    """A text with escapes, as `repr` has them, in place of characters that are not printed, and of private ones.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
