"""The output of a command: results on stdout, text for people on stderr, and its exit codes."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

import click

from convscope import terminal
from convscope.errors import ConvscopeError

if TYPE_CHECKING:
    from rich.console import Console

    from convscope.events import Progress

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Shell:
    """Where a command prints: results on stdout, everything for people on stderr.

    Args:
        quiet: print errors only, and the command's essential output (JSON, the table of layers).
        as_json: results are one JSON document on stdout.
    """

    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet, self.as_json = quiet, as_json
        self._stdout, self._stderr = sys.stdout, terminal.Lenient(sys.stderr)

    @contextmanager
    def others(self) -> Iterator[None]:
        """Output of other code (Keras while it downloads) can't mix with results, nor control the terminal."""
        stderr = terminal.Guarded(self._stderr)
        with redirect_stdout(io.StringIO() if self.quiet else stderr), redirect_stderr(stderr):
            yield

    def say(self, text: str) -> None:
        """A line for people."""
        if not self.quiet:
            text = terminal.safe(text)
            self._console().print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def print(self, text: str) -> None:
        """A line of the result."""
        click.echo(terminal.safe(text), file=self._stdout)

    def result(self, data: dict[str, object], text: Callable[[], None], essential: bool = False) -> None:
        """Print `data` with --json, else call `text`; an `essential` text also where it is quiet."""
        if not self.as_json and self.quiet and not essential:
            return
        if self._stdout is None:
            if self.as_json or essential:
                raise ConvscopeError(
                    "the result can't be printed, because stdout is closed. Run the command with stdout open.",
                    code="output-closed",
                )
            return
        try:
            if self.as_json:
                self._json(data)
            else:
                text()
            self._stdout.flush()
        except BrokenPipeError:  # whoever reads it has read enough
            sys.exit(FAILED)
        except OSError as error:
            raise ConvscopeError(
                f"the result can't be printed on stdout ({error.strerror or error}). Redirect it to another file.",
                code="output-not-writable",
                reason=error.strerror or str(error),
            ) from error

    def _json(self, data: dict[str, object]) -> None:
        from convscope.files import dump

        # Bytes: JSON is UTF-8, whatever the terminal is.
        click.echo(terminal.safe_json(dump(data)).encode(), nl=False, file=self._stdout)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A bar on stderr, for work that takes long; none where nobody would see it."""
        if self.quiet or not self._stderr.isatty():
            yield None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=self._console(), transient=True) as bar:
            task = bar.add_task("", total=None)
            # The bar prints the output of other code above itself.
            with redirect_stderr(terminal.Guarded(sys.stderr)), redirect_stdout(terminal.Guarded(sys.stdout)):
                yield lambda event: bar.update(
                    task, completed=event.done, total=event.total, description=terminal.safe(event.label)
                )

    def table(self, title: str, columns: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> None:
        """A table on stdout."""
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table

        table = Table(box=SIMPLE)
        rows = [[terminal.safe(cell) for cell in row] for row in rows]
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        # Where stdout is a file there is no width to fit: let no cell be cut.
        width = (
            None
            if self._stdout.isatty()
            else max(100, max((sum(map(len, row)) + 4 * len(row) for row in rows), default=0))
        )
        console = Console(file=self._stdout, width=width, markup=False, highlight=False, emoji=False)
        console.print(terminal.safe(title), style="bold", soft_wrap=True)
        console.print(table)

    def _console(self) -> Console:
        from rich.console import Console

        return Console(file=self._stderr)  # type: ignore[arg-type]
