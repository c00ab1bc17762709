"""A report for people: a table, and a picture of time against error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from zps.errors import UnsupportedError
from zps.tuning.cost import human_bandwidth
from zps.tuning.tune import Report, Row

__all__ = ["plot", "table"]

_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_CHOSEN, _FAIR, _WRONG = "#0b7285", "#74b9c9", "#c9ced4"

#: Errors below it are drawn at it: a logarithmic axis has no zero.
_LEAST_ERROR = 1e-5


def table(report: Report) -> Table:
    """One line for each compression, in the order measured; the advised one is bold."""
    shown = Table(
        title=f"a round of {report.workers} worker{'s' * (report.workers > 1)} over {report.link}",
        title_justify="left",
    )
    shown.add_column("compression")
    columns = ("B/param", "encode ms", "decode ms", "round ms", "faster below")
    errors = ("error", "cosine", "error of sum", "cosine of sum")
    for name in (*columns, *errors):
        shown.add_column(name, justify="right")
    for row in report.rows:
        m = row.measured
        shown.add_row(
            m.compression,
            f"{m.bytes_per_parameter:.3g}",
            f"{m.encode_s * 1e3:.3g}",
            f"{m.decode_s * 1e3:.3g}",
            f"{row.round_s * 1e3:.3g}",
            _below(row),
            f"{m.error:.2%}",
            f"{m.cosine:.4f}",
            f"{m.total_error:.2%}",
            f"{m.total_cosine:.4f}",
            style=_style(report, row),
        )
    rounds = report.rows[0].measured.rounds
    shown.caption = f"sum: over {rounds} rounds, with error feedback where the codec has it"
    if report.link.measured is not None:
        shown.caption += f"\nlink: {report.link.measured}"
    shown.caption_justify = "left"
    return shown


def plot(report: Report, path: Path) -> None:
    """Save a picture, in the format that the file's ending names (png, svg, pdf).

    Raises UnsupportedError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("a plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(9, 5.4), dpi=160, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    _draw_frame(axes, report)
    for row in sorted(report.rows, key=lambda row: -row.measured.nbytes):
        _draw_bubble(axes, report, row)
    figure.savefig(path)


def _below(row: Row) -> str:
    if row.measured.compression == "none":
        return ""
    if row.below is None:
        return "never"
    return "always" if row.below == float("inf") else human_bandwidth(row.below)


def _style(report: Report, row: Row) -> str | None:
    if row.measured.compression == report.advice.compression:
        return "bold green"
    return "dim" if row.measured.total_error > report.max_error else None


def _colour(report: Report, row: Row) -> str:
    style = _style(report, row)
    return {"bold green": _CHOSEN, "dim": _WRONG}.get(style or "", _FAIR)


def _error(row: Row) -> float:
    return max(row.measured.total_error, _LEAST_ERROR)


def _draw_frame(axes: Any, report: Report) -> None:
    times = [row.round_s * 1e3 for row in report.rows]
    errors = [_error(row) for row in report.rows]
    axes.set(xscale="log", yscale="log")
    axes.set_xlim(min(times) / 1.6, max(times) * 1.9)
    axes.set_ylim(_LEAST_ERROR / 3, max(2.0, max(errors) * 3))
    axes.axhspan(report.max_error, axes.get_ylim()[1], color="#f7f8f9", zorder=0)
    axes.axhline(report.max_error, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"limit {report.max_error:.0%}",
        (0.995, report.max_error),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=_MUTED,
        fontsize=8,
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: _minor(value))
    axes.yaxis.set_major_formatter(lambda value, _: _percent(value))
    axes.yaxis.set_minor_formatter(lambda *_: "")
    axes.grid(which="major", color=_GRID, linewidth=0.8, zorder=0)
    axes.tick_params(which="both", colors=_MUTED, length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("milliseconds a round", color=_INK, fontsize=9)
    axes.set_ylabel("error of the sum of gradients", color=_INK, fontsize=9)
    axes.set_title(
        str(report.advice), loc="left", color=_INK, fontsize=13, fontweight="bold", pad=24
    )
    axes.annotate(
        f"{report.workers} worker{'s' * (report.workers > 1)} over {report.link}; "
        "the area of a bubble, and the number beside it, are bytes a parameter",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 9),
        textcoords="offset points",
        color=_MUTED,
        fontsize=9,
    )


def _draw_bubble(axes: Any, report: Report, row: Row) -> None:
    m = row.measured
    area = 90 + 900 * m.bytes_per_parameter / 4
    point = (row.round_s * 1e3, _error(row))
    axes.scatter(
        *point, s=area, color=_colour(report, row), edgecolor="white", linewidth=1.2,
        zorder=3,
    )  # fmt: skip
    chosen = m.compression == report.advice.compression
    axes.annotate(
        f"{m.compression}  {m.bytes_per_parameter:.2g} B",
        point,
        xytext=((area**0.5) / 2 + 4, 0),
        textcoords="offset points",
        va="center",
        color=_INK if m.total_error <= report.max_error else _MUTED,
        fontsize=9,
        fontweight="bold" if chosen else "normal",
        zorder=4,
    )


def _percent(value: float) -> str:
    return f"≤ {_LEAST_ERROR * 100:g} %" if value <= _LEAST_ERROR else f"{value * 100:g} %"


def _minor(value: float) -> str:
    """Only 2 and 5 of each decade: more would run into each other."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""
