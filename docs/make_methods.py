"""Write the table of the methods' options into heatmaps.md, from the registry: `python docs/make_methods.py`.

With `--check` nothing is written; the exit status is 1 where the page is not up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from convscope.techniques.heatmaps import METHODS

PAGE = Path(__file__).parent / "heatmaps.md"
BEGIN = "<!-- options: written by python docs/make_methods.py -->\n"
END = "<!-- end of options -->\n"


def table() -> str:
    """The options of all methods as a Markdown table, and the methods without options."""
    lines = ["| method | option | default | values | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, method in METHODS.items():
        for option in method.options:
            own, default, values, about = option.cells
            lines.append(f"| `{name}` | `{own}` | `{default}` | {values} | {about} |")
    without = ", ".join(f"`{name}`" for name, method in METHODS.items() if not method.options)
    return "\n".join([*lines, "", f"Without options: {without}.", ""])


def made(page: str) -> str:
    """The page with the table of now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + table() + "\n" + END + after


def main() -> int:
    """Write the page, or check it."""
    page = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        return int(made(page) != page)
    PAGE.write_text(made(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
