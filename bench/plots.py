"""Plots of a run's records, each drawn when there is something to show.

They need matplotlib (extra `bench`), which is loaded only here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .harness import human
from .out import Record
from .stats import PERCENTILES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE_IN = (7.0, 4.4)
_DPI = 144


def unavailable() -> str | None:
    """None, or why nothing can be drawn, and what to do."""
    if find_spec("matplotlib"):
        return None
    return "plots need matplotlib: pip install 'zps-engine[bench]'"


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draws what these records have; returns the files, one a plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for name, plot in PLOTS.items():
        for suffix, chosen in plot[0](records):
            # One look for screens and paper, whatever the user's own style is.
            with pyplot.style.context(["default", _STYLE]):
                figure, axes = pyplot.subplots(figsize=_SIZE_IN, layout="constrained")
                plot[1](figure, axes, chosen)
                path = folder / f"{name}{suffix}.png"
                figure.savefig(path, dpi=_DPI)
                pyplot.close(figure)
            made.append(path)
    return made


_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "font.size": 10,
}


# --- which records make a plot -------------------------------------------------------------------

Chosen = Iterator[tuple[str, list[Record]]]


def _by_workers(*benches: str, least_sizes: int = 1) -> Callable[[Sequence[Record]], Chosen]:
    """Comparisons of these suites, a plot for each number of workers with so many sizes."""

    def choose(records: Sequence[Record]) -> Chosen:
        own = [r for r in records if r["bench"] in benches and "p50_us" in r and "peers" in r]
        for bench, workers in sorted({(r["bench"], r["workers"]) for r in own}):
            chosen = [r for r in own if (r["bench"], r["workers"]) == (bench, workers)]
            if len({r["size"] for r in chosen}) >= least_sizes:
                yield f"-{bench}-n{workers}", chosen

    return choose


def _all(bench: str) -> Callable[[Sequence[Record]], Chosen]:
    def choose(records: Sequence[Record]) -> Chosen:
        if own := [r for r in records if r["bench"] == bench]:
            yield "", own

    return choose


def _each(bench: str) -> Callable[[Sequence[Record]], Chosen]:
    def choose(records: Sequence[Record]) -> Chosen:
        for record in records:
            if record["bench"] == bench:
                yield f"-{record['what']}", [record]

    return choose


def everybody(record: Record) -> dict[str, Record]:
    """Name → figures: the subject and those whom it is compared with."""
    return {record["what"]: record, **record["peers"]}


# --- the plots -----------------------------------------------------------------------------------


def _time_by_size(_: Figure, axes: Axes, records: list[Record]) -> None:
    lines: dict[str, dict[int, Record]] = {}
    for record in records:
        for name, found in everybody(record).items():
            lines.setdefault(name, {})[record["size"]] = found
    for name, points in lines.items():
        sizes = sorted(points)
        axes.loglog(
            [4 * size for size in sizes],
            [points[size]["p50_us"] / 1e3 for size in sizes],
            marker="o",
            linewidth=2.5 if name.startswith("zps") else 1.5,
            label=name,
        )
        axes.fill_between(
            [4 * size for size in sizes],
            [points[size]["p10_us"] / 1e3 for size in sizes],
            [points[size]["p99_us"] / 1e3 for size in sizes],
            alpha=0.1,
        )
    axes.set(
        xlabel="bytes of weights",
        ylabel="ms a round (line: p50, band: p10 to p99)",
        title=f"{records[0]['bench']}: time against size, {records[0]['workers']} workers",
    )
    axes.legend()


def _latency(_: Figure, axes: Axes, records: list[Record]) -> None:
    record = max(records, key=lambda r: r["size"])
    for name, found in everybody(record).items():
        if "quantiles_us" in found:
            quantiles = [us / 1e3 for us in found["quantiles_us"]]
            axes.plot(quantiles, [p / 100 for p in PERCENTILES], label=name)
    axes.set_xscale("log")
    axes.set(
        xlabel="ms a round",
        ylabel="share of rounds that are faster",
        title=f"{record['bench']}: latency at {human(record['size'])}, {record['workers']} workers",
    )
    axes.legend()


def _roofline(_: Figure, axes: Axes, records: list[Record]) -> None:
    applied = [r for r in records if r["what"] != "encode"]
    for name, memory in sorted({(r["what"], r["memory"]) for r in applied}):
        line = [r for r in applied if (r["what"], r["memory"]) == (name, memory)]
        line.sort(key=lambda r: r["contributors"])
        shares = [100 * r["ratio"] for r in line]
        spread = [
            [100 * (r["ratio"] - r["ratio_ci95"][0]) for r in line],
            [100 * (r["ratio_ci95"][1] - r["ratio"]) for r in line],
        ]
        counts = [r["contributors"] for r in line]
        axes.errorbar(counts, shares, yerr=spread, marker="o", label=f"{name}, {memory} memory")
    axes.axhline(100, color="black", linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set(
        xlabel="n: workers whose gradients are added",
        ylabel="% of a stream of the same reads and writes",
        title="fused apply against the memory roofline",
    )
    axes.legend()


def _breakdown(_: Figure, axes: Axes, records: list[Record]) -> None:
    names = list(dict.fromkeys(name for record in records for name in record["parts_us"]))
    places = range(len(records))
    below = [0.0] * len(records)
    for name in names:
        wholes = [sum(r["parts_us"].values()) for r in records]
        shares = [
            100 * r["parts_us"].get(name, 0.0) / whole
            for r, whole in zip(records, wholes, strict=True)
        ]
        axes.bar(places, shares, bottom=below, width=0.6, label=name)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    labels = [
        f"{human(r['size'])}\nn = {r['workers']}\n{sum(r['parts_us'].values()) / 1e3:.3g} ms"
        for r in records
    ]
    axes.set_xticks(places, labels)
    axes.grid(visible=False, axis="x")
    axes.set(ylabel="% of a round", title="where the time of a round goes")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)


def _loss(_: Figure, axes: Axes, records: list[Record], what: str) -> None:
    for record in records:
        curve = record["curves"][0]
        if what == "seconds":
            along = curve["seconds"]
        else:
            along = [rounds * curve["push_bytes"] / 1e6 for rounds in curve["rounds"]]
        axes.plot(along, curve["loss"], label=record["what"])
    axes.axhline(records[0]["target"], color="black", linewidth=1, linestyle=":")
    axes.set_yscale("log")
    if what != "seconds":
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)
    axes.set(
        xlabel="s" if what == "seconds" else "MB that a worker has pushed",
        ylabel="training loss",
        title=f"digits: loss against {'time' if what == 'seconds' else 'bytes'}",
    )
    axes.legend()


def _loss_by_time(figure: Figure, axes: Axes, records: list[Record]) -> None:
    _loss(figure, axes, records, "seconds")


def _loss_by_bytes(figure: Figure, axes: Axes, records: list[Record]) -> None:
    _loss(figure, axes, records, "bytes")


def _scale(_: Figure, axes: Axes, records: list[Record]) -> None:
    (record,) = records
    points = record["points"]
    unit = {"parameters": "size"}.get(record["what"], record["what"])
    along = [point[unit] for point in points]
    values = [point["relative"] for point in points]
    spread = [
        [p["relative"] - p["relative_ci95"][0] for p in points],
        [p["relative_ci95"][1] - p["relative"] for p in points],
    ]
    axes.errorbar(along, values, yerr=spread, marker="o")
    axes.axhline(1, color="black", linewidth=1, linestyle=":")
    axes.axhspan(0.85, 1.15, alpha=0.08, color="green")
    axes.set_xscale("log", base=2 if unit != "size" else 10)
    axes.set_xticks(along, [human(value) for value in along])
    axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.set(
        xlabel=record["what"],
        ylabel="time over linear growth",
        title=f"growth with {record['what']} (flat is linear)",
    )


def _soak(figure: Figure, axes: Axes, records: list[Record]) -> None:
    (record,) = records
    looks = record["looks"]
    along = [look["at_s"] for look in looks]
    axes.plot(along, [look["p50_us"] / 1e3 for look in looks], label="p50 of a round")
    axes.set(xlabel="s", ylabel="ms a round", title=f"soak: {record['rounds']} rounds")
    axes.set_ylim(bottom=0)
    memory: Any = axes.twinx()
    for number in range(len(looks[0]["memory_bytes"])):
        last = number == len(looks[0]["memory_bytes"]) - 1
        name = "hub" if last else f"worker {number}"
        values = [look["memory_bytes"][number] / 2**20 for look in looks]
        memory.plot(along, values, linestyle="--", label=f"{name}, MiB")
    memory.set_ylim(bottom=0)
    memory.set_ylabel("MiB")
    figure.legend(loc="outside lower center", ncols=4)


Draw = Callable[["Figure", "Axes", list[Record]], None]

PLOTS: dict[str, tuple[Callable[[Sequence[Record]], Chosen], Draw]] = {
    "time": (_by_workers("step", "pull", least_sizes=2), _time_by_size),
    "latency": (_by_workers("step", "rtt", "pull", "train"), _latency),
    "roofline": (_all("kernels"), _roofline),
    "breakdown": (_all("breakdown"), _breakdown),
    "loss-by-time": (_all("converge"), _loss_by_time),
    "loss-by-bytes": (_all("converge"), _loss_by_bytes),
    "scale": (_each("scale"), _scale),
    "soak": (_each("soak"), _soak),
}
