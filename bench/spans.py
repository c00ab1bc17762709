"""Reads what the engine's processes have written about their own time: Chrome's trace format.

With ZPS_TRACE=path.json each process writes one file, path.hub0.json, path.worker1.json: an object
with "traceEvents", of which the complete ones ("ph": "X") have a name and a duration in
microseconds. Names that are not there simply have no share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .peers.base import BenchError

# In the order of a round. What the hub does happens while the worker waits.
BEFORE = ("encode", "signal")
HUB = ("recv", "decide", "apply", "reply")
AFTER = ("copy",)
WAIT = "wait"
REST = "wake"  # of the wait, what the hub does not account for: wake-ups, and waiting for others

_ROLE = re.compile(r"\.(hub|worker)(\d+)\.json$")


def files_of(path: Path) -> dict[str, list[Path]]:
    """Role → the files that processes of that role have written for ZPS_TRACE=`path`."""
    found: dict[str, list[Path]] = {"hub": [], "worker": []}
    for file in sorted(path.parent.glob(f"{path.stem}.*.json")):
        if named := _ROLE.search(file.name):
            found[named[1]].append(file)
    return found


def totals(path: Path, since_us: float = 0.0) -> dict[str, float]:
    """Name → microseconds of all its complete events that began at `since_us` or later.

    Raises BenchError for another format.
    """
    try:
        events = json.loads(path.read_text())["traceEvents"]
        every = [event for event in events if event.get("ph") == "X"]
        complete = [event for event in every if float(event["ts"]) >= since_us]
        sums: dict[str, float] = {}
        for event in complete:
            sums[event["name"]] = sums.get(event["name"], 0.0) + float(event["dur"])
        return sums
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{path} is not a trace: {error!r}") from None


def breakdown(path: Path, rounds: int, since_us: float = 0.0) -> dict[str, float]:
    """Name → microseconds of one of `rounds` rounds, in the order in which they happen.

    since_us  when the first of them began, by the monotonic clock; what began earlier is left out

    A mean over the workers, and over the hubs. Raises BenchError when nobody has written.
    """
    files = files_of(path)
    if not any(files.values()):
        raise BenchError(f"no process has written a trace beside {path}")
    worker = _mean([totals(file, since_us) for file in files["worker"]], rounds)
    hub = _mean([totals(file, since_us) for file in files["hub"]], rounds)
    parts = {name: worker[name] for name in BEFORE if name in worker}
    parts |= {name: hub[name] for name in HUB if name in hub}
    if WAIT in worker:
        parts[REST] = max(0.0, worker[WAIT] - sum(hub.get(name, 0.0) for name in HUB))
    return parts | {name: worker[name] for name in AFTER if name in worker}


def _mean(processes: list[Mapping[str, Any]], rounds: int) -> dict[str, float]:
    names = {name for process in processes for name in process}
    return {
        name: sum(process.get(name, 0.0) for process in processes) / len(processes) / rounds
        for name in names
    }
