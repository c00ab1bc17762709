"""The report of a run: goals beside what was measured, tables of ratios, and how to read it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from . import goals
from .harness import human
from .out import Record

Cells = Sequence[str]

_HOW_TO_READ = """\
## How to read it

- **Ratios are the result.** Times depend on this machine, and on what else it did; they are shown
  so that a ratio can be judged, and mean nothing beside those of another run.
- A ratio is one of medians, the other's time over that of the first column: more than 1 means that
  the first column is faster. In parentheses is its 95 % interval, from resampling restarts and
  cycles. **If it contains 1, nothing was found; if it contains the goal, the goal is open.**
- Everybody's result was compared with NumPy's before anything was timed; a participant with wrong
  weights ends its suite.
- Participants took turns (A B C C B A) with all processes alive; "others" is the share of all
  cores that processes outside of the comparison used meanwhile. Above a few per cent, measure again
  with `--calm 0.05`.
- "cpu" is the processor time, user and system, of all processes of a participant a round.
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
    return _markdown(("goal", "", "measured", "95 % interval", ""), _goal_rows(records))


def goals_table(records: Sequence[Record]) -> Table:
    """The goals that this run says something about, for the terminal."""
    table = Table(title="goals", title_justify="left")
    for title in ("goal", "bound", "measured", "95 % interval", ""):
        table.add_column(title)
    colours = {"met": "green", "missed": "red", "open": "yellow"}
    for row in _goal_rows(records):
        if row[-1] in colours:
            table.add_row(*row[:-1], f"[{colours[row[-1]]}]{row[-1]}[/]")
    return table


def _goal_rows(records: Sequence[Record]) -> list[Cells]:
    rows: list[Cells] = []
    for goal, judged in goals.judge(records):
        bound = f"{'≤' if goal.at_most else '≥'} {goal.bound:g}"
        if judged is None:
            rows.append((goal.text, bound, "", "", "not measured"))
            continue
        interval = "" if judged.interval is None else "{:.2f}–{:.2f}".format(*judged.interval)
        rows.append((goal.text, bound, f"{judged.value:.3g}", interval, verdict(judged)))
    return rows


def verdict(judged: goals.Judged) -> str:
    """`met` or `missed` if the whole interval says so, otherwise `open`."""
    if not judged.certain:
        return "open"
    return "met" if judged.met else "missed"


# --- one section a suite -------------------------------------------------------------------------


def _names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["bench"] for record in records))


def _section(name: str, records: Sequence[Record]) -> str:
    own = [record for record in records if record["bench"] == name]
    compared = [record for record in own if "peers" in record and "p50_us" in record]
    others = [record for record in own if record not in compared]
    parts = [f"## {name}"]
    if compared:
        parts.append(_ratios(compared))
    if others:
        parts.append(_OTHERS.get(name, _plain)(others))
    return "\n\n".join(parts)


def _ratios(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        for peer, found in record["peers"].items():
            rows.append(
                (
                    f"{record['what']} vs {peer}",
                    human(record["size"]),
                    str(record["workers"]),
                    f"{found['ratio']:.2f} ({_interval(found)})",
                    f"{found['goal']:g}" if "goal" in found else "",
                    f"{record['p50_us'] / 1e3:.3f} / {found['p50_us'] / 1e3:.3f}",
                    f"{_cpu(record)} / {_cpu(found)}",
                    f"{_threads(record)} / {_threads(found)}",
                    f"{record['other_cpu']:.0%}",
                )
            )
    titles = ("", "parameters", "n", "ratio", "goal", "p50 ms", "cpu ms", "threads", "others")
    return _markdown(titles, rows)


def _interval(found: Record) -> str:
    return "{:.2f}–{:.2f}".format(*found["ratio_ci95"])


def _cpu(found: Record) -> str:
    total = found.get("cpu_us", {}).get("total")
    return "?" if total is None else f"{total / 1e3:.3f}"


def _threads(found: Record) -> str:
    return str(found["threads"].get("total", "?"))


def _kernels(records: Sequence[Record]) -> str:
    rows: list[Cells] = [
        (
            record["what"],
            str(record.get("codec") or record.get("memory")),
            str(record["contributors"]),
            human(record["elements"]),
            f"{record['ratio']:.2f} ({_interval(record)})",
            f"{record['goal']:g}",
            f"{record['gbps']:.1f}",
        )
        for record in records
    ]
    titles = ("kernel", "codec or memory", "contributors", "elements", "ratio", "goal", "GB/s")
    return _markdown(titles, rows)


def _scale(records: Sequence[Record]) -> str:
    rows = [
        (
            record["what"],
            point["name"],
            f"{point['p50_us'] / 1e3:.3f}",
            f"{point['relative']:.2f} ({'{:.2f}–{:.2f}'.format(*point['relative_ci95'])})",
        )
        for record in records
        for point in record["points"]
    ]
    return _markdown(("part", "", "p50 ms", "relative to the smallest"), rows)


def _soak(records: Sequence[Record]) -> str:
    return "\n".join(
        f"- {'**steady**' if record['steady'] else '**not steady**'}: {record['rounds']} rounds in "
        f"{record['seconds']:.0f} s, memory {record['memory_growth']:+.2%}, time of a round "
        f"{record['latency_drift']:+.1%}{''.join(f'; {fault}' for fault in record['faults'])}"
        for record in records
    )


def _converge(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        reached, ratios = record["to_target"], record["over_bsp"]
        rows.append(
            (
                record["what"],
                "never" if reached is None else f"{reached['rounds']:g}",
                "" if ratios["seconds"] is None else f"{ratios['seconds']:.2f}",
                "" if ratios["bytes"] is None else f"{ratios['bytes']:.3f}",
                f"{record['accuracy']:.1%}",
            )
        )
    target = records[0]["target"]
    titles = ("way", f"rounds to loss {target}", "time ÷ bsp", "bytes ÷ bsp", "test accuracy")
    return _markdown(titles, rows)


def _breakdown(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        whole = sum(record["parts_us"].values())
        shares = (f"{name} {us / whole:.0%}" for name, us in record["parts_us"].items())
        rows.append((human(record["size"]), str(record["workers"]), ", ".join(shares)))
    return _markdown(("parameters", "n", "share of a round"), rows)


def _plain(records: Sequence[Record]) -> str:
    """What has no table of its own: its figures, one line a record."""
    lines = []
    for record in records:
        about = {name: value for name, value in record.items() if name not in _NOT_FIGURES}
        told = ", ".join(f"{name} {_brief(value)}" for name, value in about.items())
        lines.append(f"- {record['what']}: {told}")
    return "\n".join(lines)


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_brief(part)}" for name, part in value.items()) + ")"
    return str(value)


_NOT_FIGURES = {"bench", "what", "machine", "version", "commit", "changed"}
_OTHERS: dict[str, Callable[[Sequence[Record]], str]] = {
    "kernels": _kernels,
    "codecs": _kernels,
    "scale": _scale,
    "soak": _soak,
    "converge": _converge,
    "breakdown": _breakdown,
}


def _markdown(titles: Cells, rows: Sequence[Cells]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
