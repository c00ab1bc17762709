"""From measurements to advice: how long a round takes over a link, and what that speaks for.

A round's push is encoded by each worker at the same time, comes in through the hub's link one
after the other, and is decoded there:

    time = encode + workers × (bytes / bandwidth + decode)

What is the same for all compressions (computing, waking up, the pull) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from zps.errors import ConfigError
from zps.tuning.measure import Measurement

__all__ = ["Advice", "Link", "Rates", "advise", "break_even", "round_s"]

#: A compression must be this much faster than none: measurements are not exact, and a codec is one
#: thing more that can matter to how a model learns.
MIN_GAIN = 1.1

_BANDWIDTH = re.compile(r"([0-9]*\.?[0-9]+) *([kKMGT]?)(bit|b|B)(/s|ps)?")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured of a way to the hub: bytes a second there and back, and how."""

    to_hub: float
    from_hub: float
    how: str

    def __str__(self) -> str:
        there, back = (
            f"{human_bandwidth(rate)} ({_scaled(rate, 'B/s')})"
            for rate in (self.to_hub, self.from_hub)
        )
        return f"{there} to the hub, {back} back, {self.how}"


@dataclass(frozen=True, slots=True)
class Link:
    """The way to the hub.

    bandwidth  bytes a second that a gradient is sent with; None: shared memory, nothing is sent
    measured   None: somebody has said what the bandwidth is
    """

    bandwidth: float | None = None
    measured: Rates | None = None

    @classmethod
    def parse(cls, text: str | None) -> Link:
        """ "10Gbit/s", "1 Gbps", "125MB/s"; None is shared memory. Raises ConfigError."""
        if text is None:
            return cls()
        match = _BANDWIDTH.fullmatch(text.strip())
        if match is None or float(match[1]) == 0:
            raise ConfigError(
                f"--bandwidth {text}: write it as 10Gbit/s or 125MB/s (b for bits, B for bytes)"
            )
        bits = 1 if match[3] == "B" else 8
        return cls(float(match[1]) * 1000 ** _POWERS[match[2]] / bits)

    def __str__(self) -> str:
        if self.bandwidth is None:
            return "shared memory"
        return human_bandwidth(self.bandwidth) + " (measured)" * (self.measured is not None)


@dataclass(frozen=True, slots=True)
class Advice:
    """What to set, and why."""

    compression: str
    reason: str

    def __str__(self) -> str:
        value = self.compression
        return f"ZPS_COMPRESSION={value}" if value.isalnum() else f"ZPS_COMPRESSION='{value}'"


def round_s(measured: Measurement, link: Link, workers: int = 1) -> float:
    """Seconds from gradients in `workers` workers to their sum in the hub."""
    transfer = 0.0 if link.bandwidth is None else measured.nbytes / link.bandwidth
    return measured.encode_s + workers * (transfer + measured.decode_s)


def break_even(measured: Measurement, plain: Measurement, workers: int = 1) -> float | None:
    """The bandwidth below which `measured` takes less time than `plain`; None: at none.

    Bytes a second; infinite where it is faster without any link.
    """
    saved = plain.nbytes - measured.nbytes
    paid_s = round_s(measured, Link(), workers) - round_s(plain, Link(), workers)
    if saved <= 0:
        return None if paid_s >= 0 else float("inf")
    return workers * saved / paid_s if paid_s > 0 else float("inf")


def advise(
    measured: Sequence[Measurement], link: Link, *, workers: int = 1, max_error: float = 0.1
) -> Advice:
    """The fastest compression that loses little enough; `none` unless another is clearly faster.

    measured   at least that of `none`
    max_error  the most that the sum of a few rounds may be wrong by, relative to its norm
    Raises ConfigError without `none` to compare with.
    """
    plain = next((m for m in measured if m.compression == "none"), None)
    if plain is None:
        raise ConfigError("there is nothing to compare with: measure 'none', too")
    plain_s = round_s(plain, link, workers)
    fair = [m for m in measured if m.total_error <= max_error]
    best = min(fair, key=lambda m: round_s(m, link, workers), default=plain)
    best_s = round_s(best, link, workers)
    if best is plain or plain_s < MIN_GAIN * best_s:
        return Advice("none", _why_none(plain_s, best, best_s, plain, link))
    reason = (
        f"over {link} a round takes {_ms(best_s)} with it and {_ms(plain_s)} without "
        f"({plain_s / best_s:.1f} × faster); after {best.rounds} rounds the sum of the gradients "
        f"is {best.total_error:.2%} off"
    )
    return Advice(best.compression, reason + _too_wrong(measured, best_s, link, workers, max_error))


def human_bandwidth(bytes_s: float) -> str:
    """Bits a second with a unit: "8.50 Gbit/s"."""
    return _scaled(bytes_s * 8, "bit/s")


def _scaled(value: float, unit: str) -> str:
    prefixes = iter(("k", "M", "G", "T"))
    prefix = ""
    while value >= 1000 and (larger := next(prefixes, "")):
        value, prefix = value / 1000, larger
    return f"{value:.3g} {prefix}{unit}"


def _why_none(
    plain_s: float, best: Measurement, best_s: float, plain: Measurement, link: Link
) -> str:
    if best is plain:
        return f"over {link} nothing that loses little enough is faster than {_ms(plain_s)} a round"
    return (
        f"over {link} a round takes {_ms(plain_s)} as it is and {_ms(best_s)} with "
        f"{best.compression}: too little for a codec"
    )


def _too_wrong(
    measured: Sequence[Measurement], best_s: float, link: Link, workers: int, max_error: float
) -> str:
    """What would have been faster still, and is too wrong."""
    lost = [
        f"{m.compression} ({m.total_error:.0%} off)"
        for m in measured
        if m.total_error > max_error and round_s(m, link, workers) < best_s
    ]
    return f". Faster, but over the limit of {max_error:.0%}: {', '.join(lost)}" if lost else ""


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
