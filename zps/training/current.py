"""The worker that `zps.init()` made for this process, as torch.distributed has a default group."""

from __future__ import annotations

from typing import Any

from zps.errors import Closed
from zps.worker.worker import Worker

_current: Worker | None = None


def set_current(worker: Worker | None) -> None:
    """Make `worker` the process's own; for `zps.init` and `zps.shutdown`."""
    global _current
    _current = worker


def current() -> Worker:
    """The process's worker. Raises Closed before `zps.init()` and after `zps.shutdown()`."""
    if _current is None:
        raise Closed("zps is not running here: call zps.init() first")
    return _current


def is_initialized() -> bool:
    """Whether `zps.init()` has been called, and `zps.shutdown()` not since."""
    return _current is not None


def rank() -> int:
    """This worker's rank, from 0."""
    return current().rank


def world_size() -> int:
    """The number of workers the job was started with."""
    return current().world_size


def barrier() -> None:
    """Return once every live worker has called it, and its optimizer has declared its model."""
    current().barrier()


def stats() -> dict[str, Any]:
    """The hub's own account: live ranks, versions, dropped and skipped rounds, staleness."""
    return current().stats()
