"""The tables of a report, one function a suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .harness import human
from .out import Record

Cells = Sequence[str]


def table(titles: Cells, rows: Sequence[Cells]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def section(name: str, records: Sequence[Record]) -> str:
    """What suite `name` found, from its records: ratios first, then what has no peers."""
    compared = [record for record in records if "peers" in record and "p50_us" in record]
    others = [record for record in records if record not in compared]
    parts = [_ratios(compared)] if compared else []
    parts += [_OTHERS.get(name, _plain)(others)] if others else []
    return "\n\n".join(filter(None, parts))


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
    return table(titles, rows)


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
            record["memory"],
            str(record["contributors"]),
            human(record["elements"]),
            f"{record['ratio']:.2f} ({_interval(record)})",
            f"{record['goal']:g}",
            f"{record['gbps']:.1f}",
        )
        for record in records
    ]
    titles = ("kernel", "memory", "contributors", "elements", "ratio", "goal", "GB/s")
    return table(titles, rows)


def _codecs(records: Sequence[Record]) -> str:
    """One row a codec: how near each kernel is to a stream, by its number of contributors."""
    beside = [record for record in records if record["peer"] == "stream"]
    kernels = dict.fromkeys((record["what"], record["contributors"]) for record in beside)
    parts = []
    for elements in dict.fromkeys(record["elements"] for record in beside):
        here = [record for record in beside if record["elements"] == elements]
        found = {(r["codec"], r["what"], r["contributors"]): r for r in here}
        rows = [
            (codec, *(_cell(found.get((codec, *kernel))) for kernel in kernels))
            for codec in dict.fromkeys(record["codec"] for record in here)
        ]
        titles = ("codec", *(f"{what}, n = {contributors}" for what, contributors in kernels))
        goal = f"goal {here[0]['goal']:g} at 25 M and more"
        parts.append(f"A stream's time over the kernel's, {human(elements)} elements; {goal}:")
        parts.append(table(titles, rows))
    parts += [_beside(record) for record in records if record not in beside]
    return "\n\n".join(parts)


def _beside(record: Record) -> str:
    what = f"{record['what']} {record['codec']}, {human(record['elements'])}"
    ratio = f"{record['ratio']:.1f} × as long ({_interval(record)}), goal {record['goal']:g}"
    return f"- {what}: {record['peer']} takes {ratio}"


def _cell(record: Record | None) -> str:
    return "" if record is None else f"{record['ratio']:.2f} ({_interval(record)})"


def _rtt(records: Sequence[Record]) -> str:
    return "\n".join(f"- {server_time(record)}" for record in records)


def server_time(record: Record) -> str:
    """What a round costs the hub's processor, beside what it costs those of other servers."""
    hub = f"a round's processor time, n = {record['workers']}: hub {record['server_us']:.0f} µs"
    others = (
        f"{name} {found['server_us']:.0f} µs: {1 / found['ratio']:.2f} × "
        f"({'{1:.2f}–{0:.2f}'.format(*(1 / end for end in found['ratio_ci95']))})"
        for name, found in record["peers"].items()
    )
    return ", ".join((hub, *others))


def _wire(records: Sequence[Record]) -> str:
    tell = {"link": link, "node": node, "memory": memory}
    lines = [tell[record["what"]](record) for record in records]
    return "\n".join(f"- {line}" for part in lines for line in part)


def link(record: Record) -> list[str]:
    """What crossed the cable in a round, and how much of the cable plain weights fill."""
    lines = []
    for name, ways in record["wire"].items():
        up, down = (
            f"{ways[way]['bytes'] / 1e6:.2f} MB {text} (formula {ways[way]['off']:+.2%})"
            for way, text in (("to_hub", "to the hub"), ("from_hub", "back"))
        )
        lines.append(f"{name}: {up}, {down}")
    found = record["link"]
    goal = f", goal {found['goal']:.0%}" if "goal" in found else ""
    rate = found["plain_tcp_bytes_per_s"] * 8 / 1e6
    return [*lines, f"none: {found['share']:.1%} of the {rate:.0f} Mb/s of plain TCP{goal}"]


def node(record: Record) -> list[str]:
    """What a node of several workers sends and gets a round, beside one worker."""
    (sent, alone), (got, back) = (
        (record[way]["bytes"] / 1e6, record[way]["formula"] / 1e6) for way in ("to_hub", "from_hub")
    )
    return [
        f"node: {record['workers']} workers send {sent:.2f} MB a round, one would send "
        f"{alone:.2f}; they get {got:.2f} MB, one would get {back:.2f}"
    ]


def memory(record: Record) -> list[str]:
    """What a hub holds while one of its workers is late."""
    pushed, held = record["bytes"] / 1e6, record["peak_bytes"] / 1e6
    return [
        f"memory: a hub of {record['workers']} workers who push {pushed:.1f} MB each, one of them "
        f"late, held {held:.0f} MB, {record['ratio']:.2f} × what it must; goal {record['goal']:g}"
    ]


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
    return table(("part", "", "p50 ms", "relative to the smallest"), rows)


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
    return table(titles, rows)


def _breakdown(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        whole = sum(record["parts_us"].values())
        shares = (f"{name} {us / whole:.0%}" for name, us in record["parts_us"].items())
        timed = record.get("round_p50_us")
        times = f"{whole:.0f} / {'?' if timed is None else f'{timed:.0f}'}"
        rows.append((human(record["size"]), str(record["workers"]), times, ", ".join(shares)))
    titles = ("parameters", "n", "µs: sum of the parts / median round", "share of the sum")
    return table(titles, rows)


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
    "codecs": _codecs,
    "rtt": _rtt,
    "wire": _wire,
    "scale": _scale,
    "soak": _soak,
    "converge": _converge,
    "breakdown": _breakdown,
}
