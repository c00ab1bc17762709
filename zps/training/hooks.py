"""Gradients on their way out: copied while they are hot, handed over at the step.

With `overlap`, a post-accumulate-grad hook copies each gradient into this worker's slot as soon as
it is ready. The hub gets them at the step, all at once: were it to write weights earlier, the rest
of backward, and whatever a loop does before `step()`, would see half of the next round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from zps.errors import GradientModified, UnsupportedError
from zps.memory.control import Outcome
from zps.worker.gradients import check_like, nonfinite
from zps.worker.link import PushInfo
from zps.worker.work import Work
from zps.worker.worker import Worker

Params = list[tuple[str, torch.nn.Parameter]]


class _Copied(NamedTuple):
    """A gradient that lies in its slot, as it was then."""

    gradient: torch.Tensor
    version: int
    finite: bool
    scale: float

    def is_still(self, gradient: torch.Tensor | None) -> bool:
        return gradient is self.gradient and gradient._version == self.version


class GradientStream:
    """The gradients of one round after another, from `p.grad` to the hub."""

    def __init__(
        self,
        worker: Worker,
        params: Params,
        *,
        overlap: bool,
        info: Callable[[bool], PushInfo],
    ):
        """info(finite) gives what travels with a round's gradients."""
        self._worker = worker
        self._params = params
        self._overlap = overlap
        self._info = info
        self._model = worker.model
        self._coded = [self._model.is_coded(i) for i in range(len(params))]
        self._scale = 1.0
        self._buckets = worker.every_bucket
        self._hooks: dict[int, Any] = {}  # parameter -> its hook's handle
        self._paused = False
        self._work: Work | None = None
        self._begin()

    def hook_all(self) -> None:
        """Hook every parameter that requires a gradient by now; later ones join when they do."""
        if not self._overlap or len(self._hooks) == len(self._params):
            return
        for index, (_, param) in enumerate(self._params):
            if param.requires_grad and index not in self._hooks:
                register: Any = param.register_post_accumulate_grad_hook  # torch has no types here
                self._hooks[index] = register(lambda _, i=index: self._on_ready(i))

    def detach(self) -> None:
        """Leave the model alone: it outlives the job."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let gradients accumulate here; nothing is copied."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def finish(
        self,
        *,
        scaled: bool,
        unscaled: bool = False,
        finite: bool = True,
        scale: float = 1.0,
    ) -> tuple[Outcome, ...]:
        """Hand the round over, wait for it, and begin the next.

        scaled    a GradScaler is at work: it changes gradients after backward, and infinities skip
                  the round for everyone
        unscaled  it has divided the gradients by its scale
        finite    False: the scaler has found some already
        scale     what the gradients are still multiplied by
        Raises GradientModified, NonFiniteGradient (nothing has left then), WaitTimeout (the same
        step may be tried again), HubLost.
        """
        if self._work is None:
            self._scale = scale
            self._work = self._hand_over(scaled, unscaled, finite)
        outcomes = self._work.wait().outcomes
        self._begin()
        return outcomes

    def forget(self) -> None:
        """The gradients are about to be cleared; a round that has left already is waited for."""
        if self._work is not None:
            self._work.wait()
        self._begin()

    # --- parts --------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._work = None
        # parameter -> the gradient that lies in its slot
        self._copied: dict[int, _Copied] = {}

    def _on_ready(self, index: int) -> None:
        gradient = self._params[index][1].grad
        if self._paused:
            self._copied.pop(index, None)  # it has grown; the step copies it once more
        elif self._work is None and gradient is not None:
            self._copy(index, gradient)

    def _hand_over(self, scaled: bool, unscaled: bool, finite: bool) -> Work:
        absent = []
        for index, (_, param) in enumerate(self._params):
            copied = self._copied.get(index)
            # torch counts what `unscale_` writes as no new version of a gradient.
            if copied is not None and copied.is_still(param.grad) and not unscaled:
                if copied.scale != self._scale and self._coded[index] and param.grad is not None:
                    self._copy(index, param.grad)  # what was lost before has another scale
                continue
            if copied is not None and not scaled:
                raise self._modified(index)
            if param.grad is None:
                self._copied.pop(index, None)
                self._model.clear(index)
                absent.append(index)
            else:
                self._copy(index, param.grad)
        bad = [index for index, copied in self._copied.items() if not copied.finite]
        if bad and not scaled and self._worker.settings.nonfinite == "raise":
            raise nonfinite(self._params[min(bad)][0], self._worker.rank)
        info = self._info(finite and not bad)
        if absent:
            info = replace(info, absent=np.array(absent, np.uint32))
        return self._worker.push_buckets(self._buckets, info)

    def _copy(self, index: int, gradient: torch.Tensor) -> None:
        if gradient.is_sparse:
            raise UnsupportedError(
                f"the gradient of {self._params[index][0]!r} is sparse, which this version does "
                "not exchange; use sparse=False"
            )
        check_like(self._model.layout.params[index], gradient, self._worker.rank)
        # Before the step, a scaler's scale is known only as it was: mostly it still is that.
        with self._worker.tracer.span("encode"):
            finite = self._model.load(index, gradient, self._scale)
        finite = finite or self._worker.settings.nonfinite == "allow"
        self._copied[index] = _Copied(gradient, gradient._version, finite, self._scale)

    def _modified(self, index: int) -> GradientModified:
        return GradientModified(
            f"the gradient of {self._params[index][0]!r} on rank {self._worker.rank} was changed "
            "after it had left (by clipping between backward and step?). Pass max_grad_norm= to "
            "zps.Optimizer to clip the averaged gradient, or overlap=False to send gradients as "
            "they are at the step"
        )
