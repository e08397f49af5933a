"""How the command line ends: an error in one line and an exit code, and Ctrl-C that can't get lost."""

from __future__ import annotations

import io
import signal
import sys
import threading
import traceback

import click

from convscope import terminal
from convscope.cli.shell import FAILED, INTERRUPTED, USAGE
from convscope.errors import ConvscopeError, cut, one_line


class Interrupts:
    """Ctrl-C that can't get lost.

    Python raises ``KeyboardInterrupt`` wherever the program happens to be: in a callback of the garbage collector,
    where it is printed and dropped, or in the import of a C extension, which makes an ImportError of it. So what was
    asked for is remembered in `seen`, and asked for again a second later if the program still runs.
    """

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> None:
        ours = threading.current_thread() is threading.main_thread()
        self.active = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.active:
            signal.signal(signal.SIGINT, self._stop)
            if hasattr(signal, "setitimer"):
                signal.signal(signal.SIGALRM, self._stop)

    def _stop(self, *_: object) -> None:
        self.seen = True
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 1)
        raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        if self.active:
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)


# How the command line spells the parameters that messages name; others are `--name` with "-" for "_".
_SPELLED = {
    "open_model.size": "--input-size N or HxW",
    "classes": "--classes FILE",
    "weights": "--weights FILE",
    "feed": "--feed NAME=FILE",
    "image": "--photo IMAGE",
    "frames": "--frames N",
    "target": "--class",
    "trust=True": "--trust",
}
# Codes of errors whose cause is code of the user's.
_WITH_TRACEBACK = {"code-failed", "layer-failed", "model-not-runnable"}


def _spelled(name: str) -> str:
    if name.startswith("limits.using:"):
        return f"--limit {name.rpartition(':')[2]}"
    return _SPELLED.get(name) or f"--{name.rpartition('.')[2].replace('_', '-')}"


def explain(problem: BaseException, debug: bool) -> None:
    """Print the error in one line, and exit."""
    try:
        raise problem
    except ConvscopeError as error:
        more = " Re-run with --debug for a traceback." if error.code in _WITH_TRACEBACK else ""
        _leave(error, error.text(_spelled) + more, error.exit_code, debug)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(file=shown)
        print(cut(shown.getvalue()), end="", file=terminal.Guarded(sys.stderr), flush=True)
        sys.exit(USAGE if isinstance(error, click.UsageError) else FAILED)
    except (KeyboardInterrupt, click.Abort) as error:
        # click makes an Abort of an interrupt, and also of the end of a file that somebody reads.
        if isinstance(error.__cause__, EOFError):
            _leave(error.__cause__, _unexpected(error.__cause__), FAILED, debug)
        _tell("interrupted; files already written are whole")
        sys.exit(INTERRUPTED)
    except OSError as error:
        _leave(error, cut(str(error)), FAILED, debug)
    except MemoryError as error:
        remedy = "give fewer images, or a smaller size, --memory or --batch."
        _leave(error, f"the memory does not suffice ({one_line(error)}); {remedy}", FAILED, debug)
    except Exception as error:
        _leave(error, _unexpected(error), FAILED, debug)


def _unexpected(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return f"Internal error: {type(error).__name__}: {text}. Re-run with --debug for a traceback."


def _leave(error: BaseException, text: str, code: int, debug: bool) -> None:
    _tell(
        "".join(traceback.format_exception(error))
        if debug
        else text
        if text.startswith("Internal error: ")
        else f"Error: {text}"
    )
    sys.exit(code)


def _tell(text: str) -> None:
    """Lines on stderr; the first begins at the margin alone, so that a name with a line break imitates none."""
    first, *others = text.splitlines() or [""]
    others = [line if line.startswith(" ") else f"  {line}" for line in others]
    print("\n".join([first, *others]), file=terminal.Guarded(sys.stderr), flush=True)
