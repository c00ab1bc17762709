"""What a node hub owns of the model: the weights as its workers see them, and one gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from zps import native
from zps.core.layout import Layout
from zps.hub.store import ForeignFactory, ForeignRule, Hypers, Store, Update, _Bucket
from zps.memory.control import Control
from zps.memory.segment import private_bytes
from zps.optim.base import Rule
from zps.optim.registry import rule as named


class NodeStore(Store):
    """A store whose rule is the mean, and whose target is the slot of the next push upstream.

    The arena is written by what comes from upstream; optimizer state is nowhere here. Gradients
    are added and divided in float32, and rounded to the parameter's dtype for their journey.
    """

    def __init__(
        self,
        layout: Layout,
        rule: Rule | ForeignFactory,
        group_of: Sequence[int],
        hypers: Hypers,
        *,
        pool: native.Pool,
        control: Control,
    ):
        """rule: what the hub of all nodes does with the gradients; hyperparameters are checked by
        it here, so that a worker that sends bad ones hears of it."""
        self.slots = private_bytes(layout.arena_bytes, "the gradients of this node")
        none = Hypers(tuple({} for _ in hypers.groups), np.empty((len(hypers.groups), 0)), None)
        super().__init__(layout, named("mean"), group_of, none, pool=pool, control=control)
        self.rule = rule if isinstance(rule, Rule) else None
        self._takes_first = self.rule is not None and self.rule.name == "assign"

    def reduce(self, updates: Sequence[Update]) -> None:
        """Lay each update's weighted mean into `slots`; a parameter that is absent is zero there.

        Nothing is laid where nobody contributes.
        """
        jobs = []
        for update in updates:
            loaded = self._load(self._narrowed(update), 1.0)
            if loaded is None:
                continue
            job, (bucket, present) = loaded
            jobs.append(job)
            if present is not bucket.all_present:
                self._clear(update.bucket, np.flatnonzero(present == 0))
        if jobs:
            native.apply(self._pool, jobs)

    def adopt_published(self) -> None:
        """Nothing: there are no masters here."""

    def ensure_state(self, hypers: Hypers) -> None:
        """Nothing: the state is upstream."""

    # --- parts --------------------------------------------------------------------------------

    def _narrowed(self, update: Update) -> Update:
        """For `assign`, the lowest rank's gradient instead of the mean of all."""
        if not self._takes_first:
            return update
        counted = [c for c in update.contributions if c.samples > 0]
        return replace(update, contributions=tuple(counted[:1]))

    def _clear(self, bucket: int, pieces: Sequence[int] | np.ndarray[Any, Any]) -> None:
        spec = self.layout.buckets[bucket]
        itemsize = spec.nbytes // spec.count if spec.count else 0
        for index in pieces:
            piece = self.layout.pieces[spec.pieces[int(index)]]
            begin = spec.byte + itemsize * (piece.begin - spec.begin)
            self.slots[begin : begin + itemsize * piece.count] = 0

    def _prepare(self, index: int) -> _Bucket:
        """The job writes into the slot what an ordinary store's writes into the arena."""
        bucket = super()._prepare(index)
        spec = self.layout.buckets[index]
        slot = self.slots.ctypes.data + spec.byte
        half = spec.dtype != "float32"  # its float32 mean needs a place, which masters do not
        bucket.job = native.Job(
            rule=bucket.job.rule,
            segments=bucket.job.segments,
            grad_dtype=bucket.job.grad_dtype,
            weights_ptr=slot,
            master_ptr=self._master(index).ctypes.data if half else slot,
        )
        bucket.job.steps = bucket.next_steps
        bucket.average_job = bucket.job
        return bucket


def elsewhere(*_: object) -> ForeignRule:
    """Stands for a torch class, which runs in the hub of all nodes and never here."""
    raise AssertionError("a node hub was to run a torch class")


def resolve(name: str) -> Rule | ForeignFactory:
    """Our rules, to check hyperparameters by; whether a torch class may run is decided upstream."""
    return elsewhere if "." in name else named(name)
