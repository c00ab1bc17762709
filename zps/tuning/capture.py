"""The gradients of a training script: it is run here, and stopped after a few steps."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from zps.config import variable
from zps.core.layout import Param
from zps.errors import ConfigError, UnsupportedError
from zps.launch import job
from zps.training.current import is_initialized
from zps.training.optimizer import Optimizer
from zps.tuning.measure import Gradients
from zps.tuning.runner import Float32

__all__ = ["Recorder", "flat", "run"]

#: Elements that all steps together may have, 1 GiB of them: a large model gets fewer steps.
MAX_ELEMENTS = 2**28

#: What would make the script one of several workers, or a worker of a hub that is not its own.
_FOREIGN = (
    *(variable(name) for name in ("hub", "rank", "world_size", "nodes", "node_rank", "node_hub")),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)


class _Enough(BaseException):
    """Ends the script; no Exception, so that it has no business catching it."""


class Recorder:
    """Keeps what the first optimizer that steps finds in its gradients, before each step.

    A step with a gradient that is not finite (a GradScaler skips it) is not kept.
    """

    def __init__(self, steps: int) -> None:
        self._limit = steps
        self._optimizer: torch.optim.Optimizer | None = None
        self._params: tuple[Param, ...] = ()
        self._steps: list[list[Float32]] = []

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """The hook. Raises _Enough when the last step has been kept."""
        if self._optimizer is None:
            self._begin(optimizer)
        if optimizer is not self._optimizer:
            return  # the one that zps.Optimizer wraps, with apply="worker", or another model's
        arrays = [flat(param) for _, param in _named(optimizer)]
        if all(np.isfinite(array).all() for array in arrays):
            self._steps.append(arrays)
        if len(self._steps) >= self._limit:
            raise _Enough

    def gradients(self) -> Gradients:
        """What was kept. Raises ConfigError if nothing was."""
        if not self._steps:
            raise ConfigError("the script ended before an optimizer took a step with gradients")
        return Gradients(self._params, self._steps)

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._params = tuple(
            Param(name, tuple(param.shape), str(param.dtype).removeprefix("torch."))
            for name, param in _named(optimizer)
        )
        elements = sum(param.numel for param in self._params)
        self._limit = max(1, min(self._limit, MAX_ELEMENTS // max(elements, 1)))


def run(script: str, args: Sequence[str] = (), *, steps: int, module: bool = False) -> Gradients:
    """Run a script with `args` as `python script.py args` would, until `steps` steps are kept.

    It is a single worker with a hub of its own, and what it prints goes to stderr. Its optimizer
    may be a zps.Optimizer or any of torch's; names of parameters are known of the first only.
    Raises ConfigError if there is no such script or it took no step, and whatever the script does.
    """
    if not module and not Path(script).is_file():
        raise ConfigError(f"there is no script {script!r}")
    recorder = Recorder(steps)
    hook = register_optimizer_step_pre_hook(recorder)
    try:
        with _as_main(script, args, module), redirect_stdout(sys.stderr):
            _run(script, module)
    finally:
        hook.remove()
        if is_initialized():
            job.shutdown()
    return recorder.gradients()


def flat(param: torch.Tensor) -> Float32:
    """A copy of a parameter's gradient: (numel,) float32; zeros where there is none."""
    gradient = param.grad
    if gradient is None:
        return np.zeros(param.numel(), np.float32)
    if gradient.is_sparse:
        raise UnsupportedError("a gradient is sparse, which this version does not exchange")
    copied: Float32 = (
        gradient.detach().to("cpu", torch.float32, copy=True).contiguous().flatten().numpy()
    )
    return copied


def _run(script: str, module: bool) -> None:
    with suppress(_Enough):
        try:
            if module:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
        except SystemExit as end:  # a short script that has ended well has still taken steps
            if end.code not in (None, 0):
                raise ConfigError(f"{script} ended with {end.code!r}") from end


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    if isinstance(optimizer, Optimizer):
        return list(optimizer.named_parameters())
    return [
        (f"group{g}.{i}", param)
        for g, group in enumerate(optimizer.param_groups)
        for i, param in enumerate(group["params"])
    ]


@contextmanager
def _as_main(script: str, args: Sequence[str], module: bool) -> Iterator[None]:
    """Arguments, import path and environment as the script would find them, one worker alone."""
    argv, path = sys.argv, list(sys.path)
    taken = {name: os.environ.pop(name) for name in _FOREIGN if name in os.environ}
    sys.argv = [script, *args]
    sys.path.insert(0, os.getcwd() if module else str(Path(script).parent.resolve()))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
        os.environ.update(taken)
