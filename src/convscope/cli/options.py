"""Options that commands share, and the values made from them: a network, images, a folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convscope import limits
from convscope.cli.shell import Shell
from convscope.errors import BackendError, ConvscopeError, UsageError

if TYPE_CHECKING:
    from convscope.images.image import InputImage
    from convscope.networks import Named, Network
    from convscope.networks.feeding import Feed

Choice = Any  # the value of an option, which click has read


def common(command: Callable) -> Callable:
    """The options that all commands take, and a `Shell` in place of `quiet` and `json`; `limit` holds meanwhile."""

    @click.option("--quiet", "-q", is_flag=True, help="Print errors only, and JSON or the table of layers.")
    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
    @click.option(
        "--limit",
        "limited",
        multiple=True,
        metavar="NAME=VALUE",
        help="Raise or lower a limit on what one file may take, such as weights=32GiB. Limits: pixels, file, weights, "
        "text, entries, nodes, values, depth, seconds.",
    )
    @click.option(
        "--debug", is_flag=True, expose_value=False, help="Show the whole traceback of an error."
    )  # see `main`
    @wraps(command)
    def with_shell(*args: object, quiet: bool, as_json: bool, limited: tuple[str, ...], **options: object) -> object:
        shell = Shell(quiet, as_json)
        with shell.others(), limits.using(**limits.parse(limited)):
            _start_reader(options)
            return command(shell, *args, **options)

    return with_shell


def _start_reader(options: dict[str, object]) -> None:
    """Start the process that reads files while this one imports its modules."""
    from convscope import isolation

    images = any(options.get(name) for name in ("images", "image", "photos", "photo", "like"))
    with suppress(ConvscopeError):  # reported by the command that needs it
        isolation.start(*(("convscope.images.decode",) if images else ()))


def model_options(command: Callable, precision: bool = True) -> Callable:
    """The options for opening a model, gathered into one dictionary `opening`.

    Without `precision` that one is left out, for a command that has one of its own.
    """

    @click.option(
        "--weights",
        metavar="FILE",
        help="Weights of a model that code makes (MODEL is file.py:function); FILE::KEY where a checkpoint holds "
        "several.",
    )
    @click.option("--backend", help="Keras backend: tensorflow, jax or torch.")
    @click.option("--device", help="Device of PyTorch: cpu, cuda, cuda:1 or mps.")
    @_option_if(precision, "--precision", help="Precision of PyTorch: float32, bfloat16 or float16 (autocast).")
    @click.option(
        "--preprocess",
        metavar="HOW",
        help="Preprocessing: none, 0..1, -0.5..0.5, -1..1, caffe, torch, or MEAN,STD in pixel units (for each channel: "
        "all means, then all deviations); detected, measured or guessed by default.",
    )
    @click.option("--classes", metavar="FILE", help="Class names: one per line, or JSON.")
    @click.option("--input", metavar="NAME", help="Input that takes the image, of a model with several.")
    @click.option("--output", metavar="NAME", help="Output to explain, of a model with several.")
    @click.option(
        "--head",
        help="Meaning of outputs that are logits: softmax or sigmoid; or linear, to take any outputs as they are.",
    )
    @click.option(
        "--feed",
        metavar="NAME=FILE",
        multiple=True,
        help="Array or image for another input, which gets zeros otherwise.",
    )
    @click.option("--input-size", metavar="N or HxW", help="Size to resize images to, for a model that takes any size.")
    @click.option("--trust", is_flag=True, help="Run code that the model file contains (Lambda layers, pickles).")
    @wraps(command)
    def gathered(*args: object, **options: object) -> object:
        names: tuple[str, ...] = ("weights", "backend", "device", "precision", "preprocess", "classes")
        names += ("input", "output", "head", "feed", "input_size", "trust")
        opening = {name: options.pop(name) for name in names if precision or name != "precision"}
        return command(*args, opening=opening, **options)

    return gathered


def _option_if(wanted: bool, *names: str, **about: Choice) -> Callable:
    return click.option(*names, **about) if wanted else lambda command: command


def writable(context: click.Context, option: click.Parameter, path: str) -> str:
    """`path` unchanged, if it can be written to: an error is better before the work than after it."""
    wanted = Path(path).absolute()
    try:
        os.stat(wanted)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise click.BadParameter(
                f"{path!r} can't be made ({error.strerror}). Choose another place.", context, option
            ) from None
    there = next(folder for folder in [wanted, *wanted.parents] if os.path.exists(folder))
    if there != wanted and not os.path.isdir(there):
        raise click.BadParameter(
            f"{path!r} can't be made: {str(there)!r} is a file. Choose another place.", context, option
        )
    if not os.access(there, os.W_OK):
        raise click.BadParameter(
            f"{path!r} can't be written: no permission to write to {str(there)!r}. Choose another place.",
            context,
            option,
        )
    return path


IMAGES = click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
FOLDER = click.Path(file_okay=False)
OUT = click.option(
    "--out", "-o", required=True, metavar="DIR", type=FOLDER, callback=writable, help="Folder to write to."
)
SEED = click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Random seed.")


def several(text: str) -> str | list[str]:
    """A text, or several with commas between them."""
    return [part.strip() for part in text.split(",")] if "," in text else text


def written(out: str, files: list[str]) -> dict[str, object]:
    """The JSON of a result, the last of its files, as it was written."""
    return json.loads((Path(out) / files[-1]).read_text(encoding="utf-8"))


def opened(shell: Shell, model: str, opening: dict[str, object]) -> Network:
    """The network that a command works on, with its detected and guessed properties printed for people."""
    from convscope.networks import Named, open_model

    asked = Named(model)
    network = open_model(asked, **ready(asked, opening))
    height, width = network.inputs.size
    shell.say(f"{network.name}: {network.source.name} on {network.framework}, {network.backend}")
    for note in network.source.notes:
        shell.say(f"  opened: {note}")
    kind = {1: "grey", 3: "RGB"}.get(network.inputs.channels, f"{network.inputs.channels} channels")
    free = "it takes any size" if network.inputs.free else ""
    about = "; ".join(part for part in (network.inputs.note, free) if part)
    shell.say(f"  input: {height}x{width} {kind}{f' ({about})' if about else ''}")
    for name, value in network.inputs.others.items():
        shell.say(f"  input {name!r} is fed {value}")
    if len(network.outputs) > 1:
        shell.say(f"  output: {network.output!r} of {', '.join(network.outputs)} (--output chooses)")
    shell.say(f"  preprocessing: {network.preprocessing.text}")
    if network.contradiction:
        shell.say(f"  note: {network.contradiction}")
    named = network.class_names or network.head.linear
    shell.say(f"  head: {network.head.text}{'' if named else '; classes have numbers, no names'}")
    return network


def ready(model: Named, opening: dict[str, Choice]) -> dict[str, Choice]:
    """The options of `open_model`; Keras is imported already where it will be needed."""
    from convscope.networks import choose_backend

    options = dict(opening)
    options["size"], options["feed"] = _size(options.pop("input_size")), _fed(options["feed"])
    if model.needs_keras:  # this reports a fault of a file before the seconds that a framework takes to import
        with _notices_held_back():
            choose_backend(options["backend"])
    return options


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) > 2:
        raise UsageError(
            f"--input-size {text!r} is not understood; expected pixels such as 224 or 180x240.",
            code="size-not-understood",
            found=text,
        )
    return int(parts[0]), int(parts[-1])


def _fed(pairs: tuple[str, ...]) -> dict[str, Feed]:
    from convscope.networks.feeding import read_feed

    found = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not equals or not name:
            raise UsageError(
                f"--feed {pair!r} is not understood; expected NAME=FILE.npy with an array (1, ...), or NAME=IMAGE.",
                code="feed-invalid",
                text=pair,
            )
        found[name] = file
    return read_feed(found)


@contextmanager
def _notices_held_back() -> Iterator[None]:
    """Keep the C++ output of a framework on stderr while it is imported; show it only if the import fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it counts every new program as a mistake
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        saved = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except (ImportError, BackendError):  # a backend that can't be imported is reported as BackendError
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def read(shell: Shell, images: tuple[str, ...]) -> list[InputImage]:
    """The images of files, folders (of images, or of classes) and tables, all of which have to be readable."""
    from convscope.images.decode import read_images

    with _warnings_said(shell):
        found = read_images(images)
    say_notes(shell, found)
    return found


@contextmanager
def _warnings_said(shell: Shell) -> Iterator[None]:
    """Print warnings for people: which folders are not read."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        shell.say(f"  {warning.message}")


def say_notes(shell: Shell, images: Iterable[InputImage]) -> None:
    """Print the notes on each image for people."""
    for image in images:
        for note in image.notes:
            shell.say(f"  {image.name}: {note}")


def readable(shell: Shell, images: tuple[str, ...]) -> list[InputImage]:
    """The images that can be read; the others are counted and named."""
    return read_and_left_out(shell, images)[0] if images else []


def read_and_left_out(shell: Shell, images: tuple[str, ...]) -> tuple[list[InputImage], int]:
    """The images that can be read, and how many can't: these are named."""
    from convscope.images.decode import read_readable_images

    with _warnings_said(shell):
        found, failures = read_readable_images(images)
    if failures:
        shell.say(f"  {len(failures)} of {len(found) + len(failures)} images can't be read and are left out:")
    for failure in failures:
        shell.say(f"  - {failure}")
    return found, len(failures)
