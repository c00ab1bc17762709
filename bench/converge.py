"""Which loss is reached after how much time, and after how many bytes, by mode and by codec?

    python -m bench converge

Two workers learn the digits of scikit-learn, a small network on real data. What counts is the time
and the bytes until the training loss is below a target: a mode that makes rounds cheaper may need
more of them, and a codec that sends a thirtieth may, too. Every way starts anew for every restart,
with another seed, and they take turns. A way that does not learn is an error.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.table import Table

from . import report, suites
from .options import Options
from .out import Out
from .peers.base import BenchError
from .peers.zps_round import Zps

TARGET = 0.2  # of the training loss, which begins at 2.3
LEAST_ACCURACY = 0.85
_ROUNDS_S = 300.0


@dataclass(frozen=True, slots=True)
class Way:
    """A mode and a codec of the gradients."""

    mode: str
    codec: str

    @property
    def name(self) -> str:
        return self.mode if self.codec == "none" else f"{self.mode} {self.codec}"


BASE = Way("bsp", "none")
WAYS = (
    BASE,
    Way("ssp", "none"),
    Way("async", "none"),
    Way("bsp", "int8"),
    Way("bsp", "onebit"),
    Way("bsp", "topk:ratio=0.01"),
)
_QUICK_WAYS = (BASE, Way("bsp", "onebit"))

Curve = dict[str, Any]  # peers.digits_loop.Curve


def prepare(options: Options) -> suites.Job:
    """All ways with the first number of workers; a note where scikit-learn is missing."""
    if reason := Zps.available():
        raise BenchError(f"converge: {reason}")
    world = options.workers[0] if options.workers else 2
    ways = options.by_level(_QUICK_WAYS, WAYS, WAYS)
    epochs = options.by_level(10, 20, 30)

    def job(out: Out) -> None:
        if find_spec("sklearn") is None:
            out.note("converge is skipped: scikit-learn is not installed (zps-engine[examples])")
            return
        tell(measure(ways, world, epochs, options, out), world, out)

    return job


def measure(
    ways: Sequence[Way], world: int, epochs: int, options: Options, out: Out
) -> dict[Way, list[Curve]]:
    """The curves of each way, one for each restart."""
    found: dict[Way, list[Curve]] = {way: [] for way in ways}
    steps = len(ways) * options.restarts
    with out.progress(steps) as tick, TemporaryDirectory(prefix="bench-") as folder:
        data = Path(folder) / "digits.npz"
        write_digits(data)
        for restart in range(options.restarts):
            for way in ways if restart % 2 == 0 else tuple(reversed(ways)):
                tick(way.name)
                curve = learn(way, data, world, epochs, options.seed + restart)
                check(way, curve)
                found[way].append(curve)
    return found


def write_digits(data: Path) -> None:
    """Train images, test images, train labels, test labels: the same for every worker."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    pixels = [(part / 16).astype(np.float32) for part in parts[:2]]
    np.savez(data, *pixels, *(part.astype(np.int64) for part in parts[2:]))


def learn(way: Way, data: Path, world: int, epochs: int, seed: int) -> Curve:
    """One job from start to end. Raises BenchError when it fails."""
    with TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder) / "curve.json"
        command = [sys.executable, "-m", "zps", "launch", "-n", str(world), "--mode", way.mode]
        command += ["--set", f"compression={way.codec}"]
        command += ["-m", f"{__package__}.peers.digits_loop"]
        command += [str(data), str(file), str(epochs), str(seed)]
        done = subprocess.run(
            command,
            env=suites.environ(ZPS_LOG_LEVEL="error"),
            capture_output=True,
            text=True,
            timeout=_ROUNDS_S,
        )
        if done.returncode:
            raise BenchError(f"{way.name}: the job has failed:\n{done.stderr[-2000:]}")
        curve: Curve = json.loads(file.read_text())
    return curve


def check(way: Way, curve: Curve) -> None:
    """Raises BenchError unless this way has learnt to recognise digits."""
    if curve["accuracy"] < LEAST_ACCURACY:
        raise BenchError(
            f"{way.name}: it recognises {curve['accuracy']:.1%} of the digits, "
            f"less than {LEAST_ACCURACY:.0%}: it does not learn"
        )


def until(curve: Curve, target: float = TARGET) -> dict[str, float] | None:
    """Rounds, seconds and pushed bytes until the loss was below `target`; None: it never was."""
    for rounds, seconds, loss in zip(curve["rounds"], curve["seconds"], curve["loss"], strict=True):
        if loss < target:
            return {"rounds": rounds, "seconds": seconds, "bytes": rounds * curve["push_bytes"]}
    return None


def tell(found: Mapping[Way, list[Curve]], world: int, out: Out) -> None:
    """A row and a record for each way."""
    base = _to_target(found[BASE])
    table = Table(title=f"converge: digits, {world} workers, until the loss is below {TARGET}")
    for title in ("way", "rounds", "s", "MB pushed", "÷ bsp: time", "÷ bsp: bytes", "accuracy"):
        table.add_column(title, justify="right" if table.columns else "left")
    for way, curves in found.items():
        reached = _to_target(curves)
        accuracy = median(curve["accuracy"] for curve in curves)
        ratios = {what: _over(reached, base, what) for what in ("rounds", "seconds", "bytes")}
        table.add_row(
            way.name,
            *(_cell(reached, what, scale) for what, scale in (("rounds", 1), ("seconds", 1))),
            _cell(reached, "bytes", 1e-6),
            *(f"{ratios[what]:.2f}" if ratios[what] else "" for what in ("seconds", "bytes")),
            f"{accuracy:.1%}",
        )
        out.record(
            {
                "bench": "converge",
                "what": way.name,
                "mode": way.mode,
                "codec": way.codec,
                "workers": world,
                "target": TARGET,
                "to_target": reached,
                "over_bsp": ratios,
                "accuracy": round(accuracy, 4),
                "curves": curves,
                **report.facts(),
            }
        )
    out.show(table)


def _to_target(curves: Sequence[Curve]) -> dict[str, float] | None:
    reached = [until(curve) for curve in curves]
    whole = [part for part in reached if part is not None]
    if len(whole) < len(reached):
        return None
    return {what: median(part[what] for part in whole) for what in whole[0]}


def _over(
    one: Mapping[str, float] | None, other: Mapping[str, float] | None, what: str
) -> float | None:
    if one is None or other is None or not other[what]:
        return None
    return round(one[what] / other[what], 3)


def _cell(reached: Mapping[str, float] | None, what: str, scale: float) -> str:
    return "never" if reached is None else f"{reached[what] * scale:.3g}"
