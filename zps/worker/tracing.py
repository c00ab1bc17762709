"""A worker's spans, which torch.profiler shows too while it is at work."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from zps.trace import Span, Tracer


class WorkerTracer(Tracer):
    """See `Tracer`. In a profile of torch the spans are called `zps.encode` and so on."""

    def __init__(self, path: Path | None):
        super().__init__(path, "worker")

    def span(self, name: str) -> Span:
        span = super().span(name)
        if not torch._C._autograd._profiler_enabled():
            return span
        both = ExitStack()
        both.enter_context(torch.profiler.record_function(f"zps.{name}"))
        both.enter_context(span)
        return both
