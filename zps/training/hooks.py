"""Gradients on their way out: each leaves when it is ready, each bucket when it is full.

A post-accumulate-grad hook copies the gradient into this worker's slot while it is hot in cache and
pushes the bucket once all of its parameters have fired. What did not fire leaves at the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from zps.errors import GradientModified, UnsupportedError
from zps.memory.control import Outcome
from zps.worker.gradients import check_like, encode, nonfinite
from zps.worker.link import PushInfo
from zps.worker.work import Work
from zps.worker.worker import Worker

Params = list[tuple[str, torch.nn.Parameter]]


class GradientStream:
    """The gradients of one round after another, from `p.grad` to the hub."""

    def __init__(
        self,
        worker: Worker,
        params: Params,
        *,
        overlap: bool,
        info: Callable[[bool, bool], PushInfo],
    ):
        """info(first, finite) gives what travels with a push; `first` is true once a round."""
        self._worker = worker
        self._params = params
        self._overlap = overlap
        self._info = info
        layout = worker.layout
        self._buckets_of = [
            sorted({layout.pieces[p].bucket for p in layout.pieces_of(i)})
            for i in range(len(params))
        ]
        sizes = np.zeros(len(layout.buckets), np.int64)
        for buckets in self._buckets_of:
            sizes[buckets] += 1
        self._sizes = sizes
        self._hooked: set[int] = set()
        self._paused = False
        # In the first round nothing leaves early: by its end it is known whether this loop changes
        # gradients before the step (clipping, a GradScaler), which must then stay possible.
        self._streaming = False
        self._cut_short = False
        self._finite = True
        self._begin()

    def hook_all(self) -> None:
        """Hook every parameter that requires a gradient by now; later ones join when they do."""
        for index, (_, param) in enumerate(self._params):
            if param.requires_grad and index not in self._hooked:
                register: Any = param.register_post_accumulate_grad_hook  # torch has no types here
                register(lambda _, i=index: self._on_ready(i))
                self._hooked.add(index)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let gradients accumulate here; nothing leaves."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def round_is_open(self) -> bool:
        """Whether gradients of the current round have left."""
        return bool(self._works)

    def finish(self, *, in_place_ok: bool, finite: bool = True) -> tuple[Outcome, ...]:
        """Send what has not left, wait for the round, and begin the next.

        in_place_ok  gradients may have been changed since backward (a GradScaler did)
        finite       False: this worker found infinities itself; the round is to be skipped
        Raises GradientModified, NonFiniteGradient, WaitTimeout, HubLost.
        """
        with self._noting_errors():
            return self._finish(in_place_ok, finite)

    def _finish(self, in_place_ok: bool, finite: bool) -> tuple[Outcome, ...]:
        if not in_place_ok:
            self._check_unmodified()
        elif self._left:
            raise GradientModified(
                "a GradScaler took over in the middle of a run, when scaled gradients had already "
                "left; use it from the first step, or overlap=False"
            )
        if not self._pushed.all():  # it has all left when a wait that timed out is tried again
            rest = [i for i in range(len(self._params)) if i not in self._left]
            absent = [i for i in rest if self._params[i][1].grad is None]
            self._finite = self._finite and finite
            for index in rest:
                self._finite = self._encode(index) and self._finite
            self._push([int(b) for b in np.flatnonzero(~self._pushed)], absent)
        works = list(self._works)
        for work in works:
            work.wait()
        self._streaming = self._overlap and not in_place_ok
        self._begin()
        return tuple(outcome for work in works for outcome in work.outcomes)

    def forget(self) -> None:
        """The gradients are about to be cleared: begin the round anew.

        If an error cut it short when part of it had left, the rest follows as nothing, so that the
        others need not wait for it. Raises GradientModified if what left was not to be stepped.
        """
        if self._works and not self._cut_short:
            self._cut_short = True
            raise GradientModified(
                f"zero_grad() on rank {self._worker.rank} came between backward and step, when "
                "gradients had left for the hub. Put a backward that is not followed by a step in "
                "`with opt.no_sync():`, or use overlap=False"
            )
        buckets = [int(b) for b in np.flatnonzero(~self._pushed)]
        if self._works and buckets:
            nothing = replace(self._info(False, True), samples=0.0)
            self._works.append(self._worker.push_buckets(buckets, nothing))
            self._pushed[buckets] = True
        for work in self._works:
            work.wait()
        self._begin()

    # --- parts --------------------------------------------------------------------------------

    def _begin(self) -> None:
        # parameter -> its gradient and the gradient's version: when it left, and when it was ready
        self._left: dict[int, tuple[torch.Tensor, int]] = {}
        self._seen: dict[int, tuple[torch.Tensor, int]] = {}
        self._missing = self._sizes.copy()
        self._pushed = np.zeros(len(self._sizes), bool)
        self._works: list[Work] = []
        self._finite = True  # all gradients of the round so far
        self._cut_short = False  # an error came between the first gradient and the step

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._cut_short = True
            raise

    def _on_ready(self, index: int) -> None:
        if self._paused or self._worker.closed:  # the model outlives the job
            return
        with self._noting_errors():
            self._take(index)

    def _take(self, index: int) -> None:
        name, param = self._params[index]
        assert param.grad is not None
        if not self._streaming:
            self._seen[index] = param.grad, param.grad._version
            return
        if index in self._left:
            raise GradientModified(
                f"the gradient of {name!r} on rank {self._worker.rank} grew after it had left: "
                "backward ran twice in one step. Put all but the last in `with opt.no_sync():`, or "
                "use overlap=False"
            )
        self._finite = self._encode(index) and self._finite
        self._left[index] = param.grad, param.grad._version
        full = []
        for bucket in self._buckets_of[index]:
            self._missing[bucket] -= 1
            if not self._missing[bucket]:
                full.append(bucket)
        self._push(full, [])

    def _encode(self, index: int) -> bool:
        """Bring one gradient into its slot; whether it is finite. None is zero, and absent."""
        name, param = self._params[index]
        slot = self._worker.slot(name)
        gradient = param.grad
        if gradient is None:
            slot.zero_()
            return True
        if gradient.is_sparse:
            raise UnsupportedError(
                f"the gradient of {name!r} is sparse, which this version does not exchange; "
                "use sparse=False"
            )
        check_like(name, slot, gradient, self._worker.rank)
        policy = self._worker.settings.nonfinite
        finite = encode(gradient, slot) or policy == "allow"
        if not finite and policy == "raise" and not self._scaled():
            raise nonfinite(name, self._worker.rank)
        return finite

    def _scaled(self) -> bool:
        """Under a GradScaler an infinity is expected, and skips the round."""
        return self._info(False, True).hold

    def _push(self, buckets: list[int], absent: list[int]) -> None:
        if not buckets:
            return
        info = self._info(not self._works, self._finite)
        if absent:
            info = replace(info, absent=np.array(absent, np.uint32))
        self._works.append(self._worker.push_buckets(buckets, info))
        self._pushed[buckets] = True

    def _check_unmodified(self) -> None:
        early = self._overlap and not self._streaming
        for index, (gradient, version) in (self._seen if early else self._left).items():
            name, param = self._params[index]
            if param.grad is not gradient or gradient._version != version:
                raise GradientModified(
                    f"the gradient of {name!r} on rank {self._worker.rank} was changed after it "
                    "had left for the hub (by clipping between backward and step?). Pass "
                    "max_grad_norm= to zps.Optimizer to clip the averaged gradient, or "
                    "overlap=False to send gradients at the step"
                )
