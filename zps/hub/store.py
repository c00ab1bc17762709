"""What a hub owns of the model, weights and optimizer state, and the call that updates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from operator import add
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zps import native
from zps.codec.plan import Plan
from zps.codec.spec import Compression
from zps.core.layout import Layout
from zps.errors import OutOfMemory, ProtocolError
from zps.memory.cast import from_float32, to_float32
from zps.memory.control import Control
from zps.memory.segment import Segment, ensure_available, private_floats
from zps.optim.base import Rule

Floats = NDArray[np.float32]


class ForeignRule(Protocol):
    """An optimizer that is not ours, run on whole parameters: see zps.training.torch_rules."""

    def step(self, present: Sequence[int], groups: Sequence[Mapping[str, Any]]) -> None: ...
    def export_state(self, param: int) -> bytes: ...
    def import_state(self, param: int, data: bytes) -> None: ...


ForeignFactory = Callable[
    [list[Floats], list[Floats], list[int], Sequence[Mapping[str, Any]]], ForeignRule
]
"""(masters, gradients, group of each parameter, groups) -> rule; the arrays are shared with it."""


@dataclass(frozen=True, slots=True)
class Hypers:
    """The hyperparameters that one worker last sent."""

    groups: tuple[dict[str, Any], ...]
    packed: NDArray[np.float64]
    max_grad_norm: float | None


@dataclass(slots=True, eq=False)  # not frozen: that makes a new one three times as dear
class Pushed:
    """What one worker pushed at once: the gradients of some buckets, lying in its slots."""

    rank: int
    session: int
    round: int
    seq: int
    slots: NDArray[np.uint8] | None  # holding them outlives the worker; None: still to come
    slots_address: int
    base_address: int  # the weights it was computed on, as the arena lies; 0: they are not kept
    samples: float
    grad_scale: float
    finite: bool
    hold: bool
    absent: frozenset[int]
    hypers: Hypers
    remote: bool = False  # it came in messages, and is answered by one
    base: NDArray[np.uint8] | None = None  # keeps what base_address names, if that is not in slots


@dataclass(slots=True, eq=False)
class Update:
    """A bucket and the contributions to be applied to it, in rank order."""

    bucket: int
    round: int
    contributions: tuple[Pushed, ...]
    lr_factor: float = 1.0
    dc_lambda: float = 0.0
    reduced: bool = False  # the contributions have been averaged already: see Store.accumulate


@dataclass(slots=True)
class _Bucket:
    """What never changes between two applications of a bucket."""

    job: native.Job
    average_job: native.Job  # for a float32 average; of half precision it steps the masters alone
    offset: int  # bytes from the start of a worker's slots
    byte: int  # bytes from the start of the weights arena
    params: list[int]
    steps: NDArray[np.int64]  # a view into the control segment, one a piece
    next_steps: NDArray[np.int64]  # what the job is given
    all_present: NDArray[np.int64]  # ones
    state: dict[str, Floats] = field(default_factory=dict)


class Store:
    """The weights arena, fp32 masters, optimizer state and step counts of one shard."""

    def __init__(
        self,
        layout: Layout,
        rule: Rule | ForeignFactory,
        group_of: Sequence[int],
        hypers: Hypers,
        *,
        pool: native.Pool,
        control: Control,
        plan: Plan | None = None,
    ):
        """plan: how contributions are encoded; None: not at all"""
        self.layout = layout
        self.plan = Plan.build(layout, Compression()) if plan is None else plan
        self.control = control
        self._pool = pool
        self._group_of = list(group_of)
        self._groups = hypers.groups
        self.rule = rule if isinstance(rule, Rule) else None
        self.divides = self.rule is None or self.rule.name not in ("sum", "add")
        names = self._states_used(hypers)
        # Half-precision buckets have fp32 masters; a float32 bucket is its own.
        half = [bucket for bucket in layout.buckets if bucket.dtype != "float32"]
        self._masters_begin = half[0].begin if half else 0
        self._masters_end = half[-1].begin + half[-1].count if half else 0
        self._ensure_room(len(names) + (0 if self.rule else 1))
        self.weights = Segment.create("weights", layout.total_bytes)
        self._masters = self._make_masters()
        self._state: dict[str, Floats] = {}
        self._accumulator: Floats | None = None
        self._occupied: set[int] = set()  # buckets whose average lies in it
        self._buckets = [self._prepare(index) for index in range(len(layout.buckets))]
        self._foreign: ForeignRule | None = None
        if self.rule is not None:
            self.ensure_state(hypers)
        else:
            assert not isinstance(rule, Rule)
            self._gradients = private_floats(layout.flat_elements, "gradients of the shard")
            self._foreign = rule(
                [self._whole(i) for i in range(len(layout.params))],
                [self._of_param(self._gradients, i) for i in range(len(layout.params))],
                self._group_of,
                hypers.groups,
            )

    # --- updates ------------------------------------------------------------------------------

    def apply(self, updates: Sequence[Update], coef: float = 1.0) -> None:
        """Reduce and apply in one native call; versions rise as buckets finish."""
        jobs, counted = [], []
        for update in updates:
            prepared = self._load(update, coef)
            if prepared is None:
                self.touch(update.bucket)
            else:
                jobs.append(prepared[0])
                counted.append(prepared[1])
        if not jobs:
            return
        if self._foreign is not None:
            self._apply_foreign(updates, jobs, counted)
        else:
            self._apply_native(updates, jobs)
        for bucket, present in counted:
            bucket.steps += present

    def whole_round(
        self, contributions: Sequence[Pushed]
    ) -> tuple[list[native.Job], list[native.Steps]]:
        """The job of every bucket, loaded with these contributions, and the steps it counts."""
        jobs = []
        for index in range(len(self._buckets)):
            loaded = self._load(Update(index, 0, tuple(contributions)), 1.0)
            assert loaded is not None, "contributions that count"
            jobs.append(loaded[0])
        return jobs, [native.Steps(bucket.steps, bucket.next_steps) for bucket in self._buckets]

    def accumulate(self, update: Update) -> bool:
        """Average the contributions now, so that their memory can go before they are applied.

        There is one accumulator. False, and nothing is done, where another update of the bucket
        lies in it, nobody has a gradient, or there is no memory for it.
        """
        try:
            self.ensure_accumulator()
        except OutOfMemory:
            return False
        loaded = None if update.bucket in self._occupied else self._load(update, 1.0)
        if loaded is None:
            return False
        native.reduce(self._pool, [loaded[0]], [self._accumulated(update.bucket)])
        self._occupied.add(update.bucket)
        update.reduced = True
        return True

    def ensure_accumulator(self) -> None:
        """Allocate what `accumulate` needs, float32 for each element. Raises OutOfMemory."""
        if self._accumulator is None:
            self._accumulator = private_floats(self.layout.flat_elements, "the accumulator")

    def vacate(self, update: Update) -> None:
        """The update is done: the next one of its bucket may be averaged ahead."""
        if update.reduced:
            self._occupied.discard(update.bucket)

    @property
    def steps_whole_rounds(self) -> bool:
        """Whether `apply` is to be given all buckets of one round: a class may look at them all.

        Not when tensors are pushed one by one, as then no round is ever whole.
        """
        return self._foreign is not None and self.layout.fuse

    def touch(self, bucket: int) -> None:
        """Raise a bucket's version without a change: a round that was skipped, or held nothing."""
        self.control.seq[bucket] += 2

    def norm_sq(self, updates: Sequence[Update]) -> float:
        """The sum of squares of the averaged gradient of a whole round."""
        jobs = [p[0] for p in (self._load(update, 1.0) for update in updates) if p is not None]
        return native.norm_sq(self._pool, jobs)

    def _load(
        self, update: Update, coef: float
    ) -> tuple[native.Job, tuple[_Bucket, NDArray[np.int64]]] | None:
        """The bucket's job, filled in for this round; None when nobody contributed a gradient."""
        bucket = self._buckets[update.bucket]
        counted = [c for c in update.contributions if c.samples > 0]
        if not counted:
            return None
        present = bucket.all_present
        first = counted[0]
        if first.absent:
            absent = first.absent.intersection(*(c.absent for c in counted))
            present = np.array([param not in absent for param in bucket.params], np.int64)
        job = bucket.average_job if update.reduced else bucket.job
        job.slots = [c.slots_address + bucket.offset for c in counted]
        if update.reduced:
            job.slots, job.scales, job.divisor = [self._accumulated(update.bucket)], [], 1.0
        elif self.divides and all(c.samples == first.samples for c in counted):
            # An even mean needs no multiplication.
            job.scales = [1.0 / c.grad_scale for c in counted]
            job.divisor = float(len(counted))
        else:
            job.scales = [c.samples / c.grad_scale for c in counted]
            # Not `sum`, which from Python 3.12 on rounds better than the lane does.
            job.divisor = reduce(add, [c.samples for c in counted])
        job.hypers = first.hypers.packed
        np.add(bucket.steps, present, out=bucket.next_steps)
        if present is not bucket.all_present:
            bucket.next_steps *= present
        job.coef = coef
        job.lr_factor = update.lr_factor
        job.dc_lambda = update.dc_lambda
        job.base_ptr = first.base_address + bucket.byte if update.dc_lambda else 0
        return job, (bucket, present)

    def _apply_native(self, updates: Sequence[Update], jobs: list[native.Job]) -> None:
        halves = [u.bucket for u in updates if u.reduced and self._is_half(u.bucket)]
        if halves:
            self.control.seq[halves] += 1  # odd: readers retry
        native.apply(self._pool, jobs)
        if halves:
            for index in halves:
                self._publish_masters(index)
            self.control.seq[halves] += 1

    def _apply_foreign(
        self,
        updates: Sequence[Update],
        jobs: list[native.Job],
        counted: list[tuple[_Bucket, NDArray[np.int64]]],
    ) -> None:
        assert self._foreign is not None
        by_job = [u for u in updates if any(c.samples > 0 for c in u.contributions)]
        base = self._gradients.ctypes.data
        native.reduce(
            self._pool, jobs, [base + 4 * self.layout.buckets[u.bucket].begin for u in by_job]
        )
        parts = list(zip(by_job, counted, strict=True))
        for part in [parts] if self.steps_whole_rounds else [[one] for one in parts]:
            touched = [update.bucket for update, _ in part]
            self.control.seq[touched] += 1  # odd: readers retry
            self._foreign.step(
                [
                    param
                    for _, (bucket, present) in part
                    for param, there in zip(bucket.params, present, strict=True)
                    if there
                ],
                _foreign_groups(part[0][0], min(update.lr_factor for update, _ in part)),
            )
            for index in touched:
                self._publish_masters(index)
            self.control.seq[touched] += 1

    # --- weights and state as bytes -----------------------------------------------------------

    def adopt_published(self) -> None:
        """Take what lies in the weights arena as the truth: fp32 masters follow it."""
        for index, bucket in enumerate(self.layout.buckets):
            if bucket.dtype != "float32":
                to_float32(self.published(index), bucket.dtype, self._master(index))

    def read_state(self, name: str, bucket: int) -> bytes:
        """One bucket of an optimizer state, fp32."""
        return self._state_bucket(name, bucket).tobytes()

    def write_state(self, name: str, bucket: int, data: bytes) -> None:
        """Replace one bucket of an optimizer state. Raises ProtocolError on a wrong length."""
        target = self._state_bucket(name, bucket, create=True)
        if len(data) != target.nbytes:
            raise ProtocolError(f"state {name!r}: {len(data)} bytes came, {target.nbytes} expected")
        target[:] = np.frombuffer(data, np.float32)

    def read_master(self, bucket: int) -> bytes:
        """One bucket of the fp32 master weights."""
        self._check_bucket(bucket)
        return self._master(bucket).tobytes()

    def write_published(self, bucket: int, data: bytes) -> None:
        """Replace one bucket of the weights arena; `adopt_published` makes it the truth."""
        self._check_bucket(bucket)
        _replace(self.published(bucket), data, f"the weights of bucket {bucket}")

    def read_extra(self, index: int) -> bytes:
        """The bytes of one extra."""
        return self._extra(index).tobytes()

    def write_extra(self, index: int, data: bytes) -> None:
        _replace(self._extra(index), data, f"extra {index}")

    def read_foreign(self, param: int) -> bytes:
        """A foreign rule's state of one parameter, as the rule encodes it."""
        return self._foreign_rule(param).export_state(param)

    def write_foreign(self, param: int, data: bytes) -> None:
        self._foreign_rule(param).import_state(param, data)

    def set_steps(self, steps: NDArray[np.int64]) -> None:
        """Set every parameter's step count, as after loading a checkpoint."""
        if steps.shape != (len(self.layout.params),) or (steps < 0).any():
            raise ProtocolError(f"{len(self.layout.params)} step counts expected")
        for bucket in self._buckets:
            bucket.steps[:] = steps[bucket.params]

    def ensure_state(self, hypers: Hypers) -> None:
        """Allocate the states these hyperparameters use, at their initial values."""
        if self.rule is None:
            return
        for name in self._states_used(hypers):
            if name not in self._state:
                self._add_state(name)

    def close(self) -> None:
        self._buckets.clear()
        self.weights.close()

    # --- parts --------------------------------------------------------------------------------

    def _ensure_room(self, states: int) -> None:
        masters = self._masters_end - self._masters_begin
        floats = 4 * (self.layout.flat_elements * states + masters)
        ensure_available(floats + self.layout.total_bytes, "this shard (weights and state)")

    def _states_used(self, hypers: Hypers) -> list[str]:
        if self.rule is None:
            return []
        used = {name for group in hypers.groups for name in self.rule.state_used(group)}
        return [name for name in self.rule.states if name in used]

    def _make_masters(self) -> Floats | None:
        """fp32 masters, flat, from the first bucket that needs one to the last."""
        count = self._masters_end - self._masters_begin
        return private_floats(count, "fp32 master weights") if count else None

    def published(self, bucket: int) -> NDArray[np.uint8]:
        """One bucket of the weights arena."""
        spec = self.layout.buckets[bucket]
        return self.weights.bytes[spec.byte : spec.byte + spec.nbytes]

    def _master(self, bucket: int) -> Floats:
        spec = self.layout.buckets[bucket]
        if spec.dtype == "float32":
            return self.published(bucket).view(np.float32)
        assert self._masters is not None
        begin = spec.begin - self._masters_begin
        return self._masters[begin : begin + spec.count]

    def _whole(self, param: int) -> Floats:
        """The fp32 weights of one parameter: its pieces follow one another without a gap."""
        spec = self.layout.params[param]
        if spec.dtype == "float32":
            byte = self.layout.param_byte(param)
            return (
                self.weights.bytes[byte : byte + spec.nbytes].view(np.float32).reshape(spec.shape)
            )
        assert self._masters is not None
        return self._of_param(self._masters, param, self._masters_begin)

    def _of_param(self, flat: Floats, param: int, origin: int = 0) -> Floats:
        spec = self.layout.params[param]
        begin = self.layout.param_begin(param) - origin
        return flat[begin : begin + spec.numel].reshape(spec.shape)

    def _prepare(self, index: int) -> _Bucket:
        spec = self.layout.buckets[index]
        pieces = [self.layout.pieces[i] for i in spec.pieces]
        segments = np.zeros(len(pieces), native.SEGMENT)
        for i, piece in enumerate(pieces):
            segments[i] = (piece.begin - spec.begin, piece.count, self._group_of[piece.param], i)
        make_job = partial(
            native.Job,
            rule=self.rule.kernel if self.rule is not None else native.RULES["mean"].kernel,
            segments=segments,
            grad_dtype=native.DTYPE[spec.dtype],
            weights_ptr=self.published(index).ctypes.data,
            master_ptr=self._master(index).ctypes.data,
            seq_ptr=self.control.seq_address(index),
        )
        codecs, encoded = self._codecs(index)
        job = make_job() if codecs is None else make_job(codecs=codecs, encoded=encoded)
        average_job = job
        if self._is_half(index):
            masters_ptr = self._master(index).ctypes.data
            dtype = native.DTYPE["float32"]
            average_job = make_job(grad_dtype=dtype, weights_ptr=masters_ptr, seq_ptr=0)
        elif codecs is not None:
            average_job = make_job()
        job.steps = average_job.steps = np.zeros(len(pieces), np.int64)
        return _Bucket(
            job=job,
            average_job=average_job,
            offset=int(self.plan.bucket_offset[index]),
            byte=spec.byte,
            params=[piece.param for piece in pieces],
            steps=self.control.steps[spec.pieces.start : spec.pieces.stop],
            next_steps=job.steps,
            all_present=np.ones(len(pieces), np.int64),
        )

    def _codecs(
        self, index: int
    ) -> tuple[NDArray[np.void], NDArray[np.uint64]] | tuple[None, None]:
        """The codec and the offset of each piece in an encoded bucket; None: none is encoded."""
        pieces, plan = self.layout.buckets[index].pieces, self.plan
        codecs = plan.table[plan.codec_index[pieces.start : pieces.stop]]
        if not codecs["kind"].any():
            return None, None
        offsets = plan.piece_offset[pieces.start : pieces.stop].astype(np.uint64)
        return codecs.astype(native.CODEC), offsets

    def _add_state(self, name: str) -> None:
        assert self.rule is not None
        flat = private_floats(self.layout.flat_elements, f"optimizer state {name!r}")
        self._state[name] = flat
        for bucket, spec in zip(self._buckets, self.layout.buckets, strict=True):
            bucket.state[name] = flat[spec.begin : spec.begin + spec.count]
            bucket.job.state_ptrs = bucket.average_job.state_ptrs = [
                bucket.state[n].ctypes.data if n in bucket.state else 0 for n in self.rule.states
            ]
        for piece in self.layout.pieces:
            value = self.rule.initial(self._groups[self._group_of[piece.param]]).get(name, 0.0)
            if value:
                flat[piece.begin : piece.begin + piece.count] = value

    def _accumulated(self, bucket: int) -> int:
        assert self._accumulator is not None
        return int(self._accumulator.ctypes.data) + 4 * self.layout.buckets[bucket].begin

    def _publish_masters(self, bucket: int) -> None:
        if self._is_half(bucket):
            dtype = self.layout.buckets[bucket].dtype
            from_float32(self._master(bucket), dtype, self.published(bucket))

    def _is_half(self, bucket: int) -> bool:
        return self.layout.buckets[bucket].dtype != "float32"

    def _state_bucket(self, name: str, bucket: int, *, create: bool = False) -> Floats:
        self._check_bucket(bucket)
        if self.rule is None or name not in self.rule.states:
            known = self.rule.states if self.rule is not None else ()
            raise ProtocolError(f"no optimizer state {name!r}; this rule has {list(known)}")
        if name not in self._state:
            if not create:
                raise ProtocolError(f"the optimizer state {name!r} is not in use")
            self._add_state(name)
        return self._buckets[bucket].state[name]

    def _extra(self, index: int) -> NDArray[np.uint8]:
        if not 0 <= index < len(self.layout.extras):
            raise ProtocolError(f"no extra {index}; there are {len(self.layout.extras)}")
        byte = self.layout.extra_bytes[index]
        return self.weights.bytes[byte : byte + self.layout.extras[index].nbytes]

    def _check_bucket(self, bucket: int) -> None:
        if not 0 <= bucket < len(self.layout.buckets):
            raise ProtocolError(f"no bucket {bucket}; there are {len(self.layout.buckets)}")

    def _foreign_rule(self, param: int) -> ForeignRule:
        if self._foreign is None or not 0 <= param < len(self.layout.params):
            raise ProtocolError(f"no state of a foreign rule for parameter {param}")
        return self._foreign


def make_hypers(
    rule: Rule | None, groups: Sequence[dict[str, Any]], max_grad_norm: float | None
) -> Hypers:
    """Check and pack what a worker sent. Raises ConfigError naming group and field."""
    packed = rule.pack(groups) if rule is not None else np.empty((len(groups), 0))
    return Hypers(tuple(groups), packed, max_grad_norm)


def _replace(target: NDArray[np.uint8], data: bytes, what: str) -> None:
    if len(data) != target.nbytes:
        raise ProtocolError(f"{what}: {len(data)} bytes came, {target.nbytes} expected")
    target[:] = np.frombuffer(data, np.uint8)


def _foreign_groups(update: Update, lr_factor: float) -> list[dict[str, Any]]:
    """The hyperparameters of an update, with the learning rate that its staleness leaves."""
    groups = [dict(group) for group in update.contributions[0].hypers.groups]
    for group in groups:
        if lr_factor != 1.0 and "lr" in group:
            group["lr"] *= lr_factor
    return groups
