"""`python -m trials --minutes N`: run what fits, print a table, exit with 1 if anything was found.

The exit status is 2 if nothing was found, and something could not be tried.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from trials import bases
from trials.kinds import GROUPS, Kind, all_kinds, chosen
from trials.outcomes import FINDINGS, HEADS, UNTRIED
from trials.supervisor import Finding, Plan, Row, Run, set_environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trial, or repeat one try; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trials", description=__doc__)
    parser.add_argument("--minutes", type=float, default=4, help="how long, beside making the valid files once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAMES", help=f"groups ({', '.join(GROUPS)}) or kinds, with commas")
    parser.add_argument("--jobs", type=int, default=2, help="workers side by side")
    parser.add_argument("--json", metavar="FILE", help="write counts and findings there too")
    parser.add_argument("--repeat", metavar="KIND:SEED:NUMBER", help="repeat one try in the foreground")
    options = parser.parse_args(arguments)
    known = all_kinds()
    if options.repeat:
        return _repeat(options.repeat, known)
    try:
        kinds = chosen(options.only, known)
    except ValueError as error:
        parser.error(str(error))
    absent = {kind.name: kind.missing() for kind in kinds}
    for name, missing in absent.items():
        if missing:
            print(f"{name} is left out: {', '.join(missing)} not installed", file=sys.stderr)
    kinds = [kind for kind in kinds if not absent[kind.name]]
    scratch = Path(tempfile.mkdtemp(prefix="convscope-trials-"))
    try:
        made = bases.made({kind.name for kind in kinds})
        run = Run(Plan(kinds, 60 * options.minutes, options.seed, options.jobs, scratch, made))
        begun = time.monotonic()
        run.go()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(table(list(run.rows.values())))
    print(f"\nseed {options.seed}, {(time.monotonic() - begun) / 60:.1f} minutes, {options.jobs} jobs")
    print(listed(run.findings))
    if options.json:
        Path(options.json).write_text(json.dumps(_plain(run), indent=1))
    columns = {finding.column for finding in run.findings}
    return 1 if columns - {UNTRIED} else 2 if columns else 0


def table(rows: Sequence[Row]) -> str:
    """The rows as text in columns, a line for each group before its kinds."""
    lines = [["", "tried", *HEADS.values()]]
    for group in GROUPS:
        inside = [row for row in rows if row.kind.group == group]
        if inside:
            lines.append(
                _cells(group.upper(), sum(row.tried for row in inside), sum((row.counts for row in inside), Counter()))
            )
            lines += [_cells(f"  {row.kind.name}", row.tried, row.counts) for row in inside]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cells(name: str, tried: int, counts: Counter[str]) -> list[str]:
    return [name, str(tried), *(str(counts[column]) for column in HEADS)]


def listed(findings: Sequence[Finding], most: int = 6) -> str:
    """The findings, alike ones together."""
    alike: dict[tuple[str, str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        alike[(finding.column, finding.repeat.partition(":")[0], _gist(finding.text))].append(finding)
    untried = sum(finding.column == UNTRIED for finding in findings)
    lines = [f"{len(findings) - untried or 'no'} findings" + (f", {untried} not tried" if untried else "")]
    for (column, kind, _), inside in sorted(alike.items()):
        lines.append(f"\n[{HEADS[column]}] {kind}, {len(inside)} times: {inside[0].text[:400]}")
        lines += [f"    python -m trials --repeat {finding.repeat}" for finding in inside[:most]]
    return "\n".join(lines)


def _gist(text: str) -> str:
    """What stays the same among findings of one cause: the exception and its place, or the first words."""
    said = re.split(r": |b['\"]", text)[0]
    return re.sub(r"\d+", "#", said)[:60]


def _plain(run: Run) -> dict:
    return {
        "seed": run.plan.seed,
        "rows": {
            name: {"tried": row.tried, **{column: row.counts[column] for column in HEADS}}
            for name, row in run.rows.items()
        },
        "findings": [vars(finding) for finding in run.findings],
    }


def _repeat(text: str, known: dict[str, Kind]) -> int:
    """One try in this process, with tracebacks."""
    name, seed, number = text.split(":")
    scratch = Path(tempfile.mkdtemp(prefix="convscope-trials-"))
    (scratch / "tmp").mkdir()
    set_environment(scratch)
    from trials.worker import Worker

    try:
        worker = Worker(known[name].runtime, scratch, bases.made({name}))
        answer = worker.answer(name, int(seed), int(number), loud=True)
    finally:
        kept = scratch / "try"
        print(f"its files are in {kept}", file=sys.stderr)
    print(json.dumps(answer, indent=1))
    return 1 if any(answer["counts"].get(column) for column in FINDINGS) else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # frameworks' threads must not keep it from ending
