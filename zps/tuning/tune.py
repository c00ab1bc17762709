"""`zps.tune`: measure compressions on a model's gradients, and say which to set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from zps.codec.spec import Compression
from zps.config import Settings
from zps.core.layout import Param
from zps.errors import UnknownName
from zps.tuning.bandwidth import measure_link
from zps.tuning.cost import Advice, Link, advise, break_even, round_s
from zps.tuning.measure import CANDIDATES, Gradients, Measurement, measure
from zps.tuning.runner import CodecRunner, NativeRunner

if TYPE_CHECKING:
    import torch

__all__ = ["Report", "Row", "report_on", "tune"]


@dataclass(frozen=True, slots=True)
class Row:
    """A measurement, and what follows from it for the link."""

    measured: Measurement
    round_s: float
    below: float | None
    """The bandwidth, bytes a second, below which it is faster than none; None: at none."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured, and the advice."""

    rows: tuple[Row, ...]
    link: Link
    workers: int
    max_error: float
    advice: Advice

    def to_json(self) -> str:
        """One object; times in seconds, bandwidths in bytes a second; link: if it was measured."""
        rows = [
            {
                **asdict(row.measured),
                "bytes_per_parameter": row.measured.bytes_per_parameter,
                "round_s": row.round_s,
                # JSON has no infinity, which here means: without any link, too
                "faster_below": "always" if row.below == float("inf") else row.below,
            }
            for row in self.rows
        ]
        found = {
            "advice": asdict(self.advice),
            "bandwidth": self.link.bandwidth,
            "link": None if self.link.measured is None else asdict(self.link.measured),
            "workers": self.workers,
            "max_error": self.max_error,
            "measured": rows,
        }
        return json.dumps(found, indent=2)


def tune(
    model: torch.nn.Module,
    gradients: Iterable[Mapping[str, torch.Tensor]] | None = None,
    *,
    candidates: Sequence[str] = CANDIDATES,
    bandwidth: str | None = None,
    workers: int = 1,
    max_error: float = 0.1,
    settings: Settings | None = None,
    runner: CodecRunner | None = None,
) -> Report:
    """Measure compressions on this model's gradients.

    gradients   of consecutive steps, each by parameter name; None: the one that `p.grad` holds now.
                A parameter that a step does not name has no gradient in it
    candidates  texts as in ZPS_COMPRESSION; `none` is measured in any case
    bandwidth   of the hub's link, such as "10Gbit/s"; "measure": found out, see
                `bandwidth.measure_link`; None: shared memory
    workers     how many push over that link
    max_error   the most that the sum of a few rounds may be wrong by, relative to its norm
    settings    for bucket_bytes and compression_min_bytes; None: `zps.Settings.load()`
    runner      what encodes; None: the kernels that training uses, on one thread
    Returns a Report: `report.advice` is what to set, and why.
    Raises UnknownName, LayoutError, ConfigError (CompressionSyntaxError, of a candidate), and what
    `measure_link` raises.
    """
    settings = Settings.load() if settings is None else settings
    return report_on(
        _gradients(model, gradients),
        compressions=[Compression.parse(text) for text in candidates],
        link=measure_link(settings) if bandwidth == "measure" else Link.parse(bandwidth),
        workers=workers,
        max_error=max_error,
        settings=settings,
        runner=NativeRunner() if runner is None else runner,
    )


def report_on(
    gradients: Gradients,
    *,
    compressions: Sequence[Compression],
    link: Link,
    workers: int,
    max_error: float,
    settings: Settings,
    runner: CodecRunner,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure every compression once, `none` first; `tell` hears which is next."""
    measured = []
    for compression in dict.fromkeys((Compression(), *compressions)):
        tell(str(compression))
        measured.append(
            measure(
                gradients,
                compression,
                runner,
                bucket_bytes=settings.bucket_bytes,
                min_bytes=settings.compression_min_bytes,
            )
        )
    plain = measured[0]
    rows = tuple(
        Row(one, round_s(one, link, workers), break_even(one, plain, workers)) for one in measured
    )
    advice = advise(measured, link, workers=workers, max_error=max_error)
    return Report(rows, link, workers, max_error, advice)


def _gradients(
    model: torch.nn.Module, steps: Iterable[Mapping[str, torch.Tensor]] | None
) -> Gradients:
    import torch

    from zps.tuning.capture import flat

    named = dict(model.named_parameters())
    params = tuple(
        Param(name, tuple(p.shape), str(p.dtype).removeprefix("torch."))
        for name, p in named.items()
    )
    if steps is None:
        found = all(param.grad is None for param in named.values())
        return Gradients(params, [] if found else [[flat(param) for param in named.values()]])
    arrays = []
    for step in steps:
        if unknown := step.keys() - named.keys():
            raise UnknownName(f"the model has no parameter {min(unknown)!r}")
        arrays.append(
            [
                step[name].detach().to("cpu", torch.float32, copy=True).flatten().numpy()
                if name in step
                else np.zeros(param.numel(), np.float32)
                for name, param in named.items()
            ]
        )
    return Gradients(params, arrays)
