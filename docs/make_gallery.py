"""Make the gallery of `docs/filters.md` by running the commands in it: `python docs/make_gallery.py [NAME ...]`.

A block of commands that follows a line `<!-- gallery NAME FILE -->` is run in the root of the repository, with a folder
of its own in the place of `out`; the FILE that it writes becomes `docs/images/NAME.webp`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from convscope.files import write_file
from convscope.render.encode import encode_webp

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "filters.md"
BLOCK = re.compile(r"<!-- gallery (?P<name>\S+) (?P<file>\S+) -->\n```bash\n(?P<command>.*?)```", re.DOTALL)
WIDEST = 1200  # pixels


def main(names: list[str]) -> None:
    """Run the blocks of those names, of all where none is given."""
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        if not names or block["name"] in names:
            make(block["name"], block["file"], block["command"])


def make(name: str, file: str, command: str) -> None:
    """Run one block and keep its image."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(sys.executable).parent
        environment = os.environ | {"PATH": f"{here}:{os.environ['PATH']}"}
        subprocess.run(
            command.replace("--out out", f"--out {folder}"), shell=True, cwd=ROOT, check=True, env=environment
        )
        kept = ROOT / "docs" / "images" / f"{name}.webp"
        found = Path(folder) / file
        write_file(kept, found.read_bytes() if found.suffix == ".webp" else webp(found))
        print(f"{kept.relative_to(ROOT)}: {kept.stat().st_size / 1000:.0f} kB")


def webp(file: Path) -> bytes:
    """An image, at most `WIDEST` pixels wide, small enough for a repository."""
    image = Image.open(file).convert("RGB")
    image.thumbnail((WIDEST, 10 * WIDEST), Image.Resampling.LANCZOS)
    return encode_webp(np.asarray(image), quality=80)


if __name__ == "__main__":
    main(sys.argv[1:])
