"""The report of a run: goals beside what was measured, tables of ratios, and how to read it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from . import goals, sections
from .out import Record
from .sections import Cells

_HOW_TO_READ = """\
## How to read it

- **Ratios are the result.** Times depend on this machine, and on what else it did; they are shown
  so that a ratio can be judged, and mean nothing beside those of another run.
- A ratio is the other's time over that of the first column: more than 1 means that the first column
  is faster. It is one of medians of the same cycle, and the geometric mean of all starts; in
  parentheses is its 95 % interval. **If it contains 1, nothing was found; if it contains the goal,
  or if everything was started only once, the goal is open.**
- Everybody's result was compared with NumPy's before anything was timed; a participant with wrong
  weights ends its suite.
- Participants took turns (A B C C B A) with all processes alive; "others" is the share of all
  cores that processes outside of the comparison used meanwhile. Above a few per cent, measure again
  with `--calm 0.05`.
- "cpu" is the processor time, user and system, of all processes of a participant a round; that of
  servers also between rounds.
"""


def render(records: Sequence[Record], plots: Iterable[Path], folder: Path) -> str:
    """The whole report; `plots` are shown by their paths relative to `folder`."""
    parts = ["# zps: benchmark report", _origin(records), "## Goals", _goals(records)]
    parts += [_section(name, records) for name in _names(records)]
    pictures = [f"![{path.stem}]({os.path.relpath(path, folder)})" for path in plots]
    if pictures:
        parts += ["## Plots", "\n\n".join(pictures)]
    return "\n\n".join([*parts, _HOW_TO_READ])


# --- where it was measured -----------------------------------------------------------------------


def _origin(records: Sequence[Record]) -> str:
    machines = dict.fromkeys(_machine(record) for record in records if "machine" in record)
    return "\n".join(f"- {text}" for text in machines) or "Nothing was measured."


def _machine(record: Record) -> str:
    machine = record["machine"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("python", "torch", "numpy", "pyzmq")
    )
    changed = " with changes" if record.get("changed") else ""
    commit = f"commit `{record['commit']}`{changed}"
    origin = commit if record.get("commit") else f"zps {record.get('version')}"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, {versions}; {origin}"
    )


# --- goals ---------------------------------------------------------------------------------------


def _goals(records: Sequence[Record]) -> str:
    rows = _goal_rows(records)
    parts = [sections.table(("goal", "", "measured", "95 % interval", ""), rows)] if rows else []
    if missing := [goal.text for goal, judged in goals.judge(records) if judged is None]:
        parts.append(f"Not measured in this run: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def goals_table(records: Sequence[Record]) -> Table:
    """The goals that this run says something about, for the terminal."""
    table = Table(title="goals", title_justify="left")
    for title in ("goal", "bound", "measured", "95 % interval", ""):
        table.add_column(title)
    for row in _goal_rows(records):
        table.add_row(*row[:-1], f"[{goals.COLOURS[row[-1]]}]{row[-1]}[/]")
    return table


def _goal_rows(records: Sequence[Record]) -> list[Cells]:
    rows: list[Cells] = []
    for goal, judged in goals.judge(records):
        if judged is not None:
            bound = f"{'≤' if goal.at_most else '≥'} {goal.bound:g}"
            interval = "" if judged.interval is None else "{:.2f}–{:.2f}".format(*judged.interval)
            rows.append((goal.text, bound, f"{judged.value:.3g}", interval, judged.verdict))
    return rows


# --- one section a suite -------------------------------------------------------------------------


def _names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["bench"] for record in records))


def _section(name: str, records: Sequence[Record]) -> str:
    own = [record for record in records if record["bench"] == name]
    return f"## {name}\n\n{sections.section(name, own)}"
