"""zps: a parameter server for PyTorch training loops.

    import zps

    zps.init()
    opt = zps.Optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)

Importing zps imports nothing heavy: names are loaded when they are first used, so a hub never pays
for importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zps import errors
    from zps.config import Settings
    from zps.launch.job import init, shutdown
    from zps.training.current import barrier, is_initialized, rank, stats, world_size
    from zps.training.lion import Lion
    from zps.training.optimizer import Optimizer
    from zps.tuning.tune import tune
    from zps.worker.work import Work
    from zps.worker.worker import Worker

_HOMES = {
    "Settings": "zps.config",
    "Worker": "zps.worker.worker",
    "Work": "zps.worker.work",
    "Optimizer": "zps.training.optimizer",
    "Lion": "zps.training.lion",
    "tune": "zps.tuning.tune",
    **dict.fromkeys(("init", "shutdown"), "zps.launch.job"),
    **dict.fromkeys(
        ("rank", "world_size", "barrier", "stats", "is_initialized"), "zps.training.current"
    ),
}

__all__ = [
    "Lion",
    "Optimizer",
    "Settings",
    "Work",
    "Worker",
    "__version__",
    "barrier",
    "errors",
    "init",
    "is_initialized",
    "rank",
    "shutdown",
    "stats",
    "tune",
    "world_size",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("zps.errors")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'zps' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
