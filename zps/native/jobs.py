"""Averages of gradients, and the rules that apply them: one job a bucket, spread over a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zps import _core
from zps.errors import Closed, ForkedProcess
from zps.native.checks import (
    DTYPE,
    FLOAT64,
    INT64,
    ITEMSIZE,
    UINT64,
    address,
    check_array,
    check_pointer,
    place,
)
from zps.native.codecs import CODEC, KIND

#: Elements of a tile. Sums of squares are added tile by tile.
TILE: int = _core.TILE
#: A piece of a parameter inside a bucket; `begin` counts elements from the bucket's first.
SEGMENT = np.dtype([("begin", "<u8"), ("count", "<u8"), ("group", "<u4"), ("param", "<u4")])

MAX_THREADS = 512


class RuleFacts(NamedTuple):
    """A rule of the core: its id, its columns of packed hyperparameters, its states in order."""

    kernel: int
    hypers: tuple[str, ...]
    states: tuple[str, ...]


RULES = {
    name: RuleFacts(kernel, tuple(hypers), tuple(states))
    for name, kernel, hypers, states in _core.RULES
}
_BY_KERNEL = {facts.kernel: facts for facts in RULES.values()}


def states_used(kernel: int, hypers: NDArray[np.float64]) -> tuple[str, ...]:
    """The states a rule touches under one row of packed hyperparameters."""
    facts = facts_of(kernel)
    check_array(hypers, FLOAT64, (len(facts.hypers),), "hypers")
    used = _core.states_used(kernel, address(hypers))
    return tuple(name for i, name in enumerate(facts.states) if used >> i & 1)


class Pool:
    """A thread pool of `threads` threads, the caller being one of them.

    Costs no CPU while idle. It does not survive a fork: make it in the process that uses it.
    """

    def __init__(self, threads: int):
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"a pool has 1 to {MAX_THREADS} threads, not {threads}")
        self.threads = threads
        self._pool: _core.Pool | None = _core.Pool(threads)

    def close(self) -> None:
        """End the threads. Closing twice is allowed."""
        self._pool = None

    def _open(self) -> _core.Pool:
        if self._pool is None:
            raise Closed("the thread pool is closed; make another")
        if self._pool.forked:
            raise ForkedProcess(
                "this thread pool belongs to the parent process, and threads do not survive a "
                "fork; make a pool in the child, or start it with the 'spawn' method"
            )
        return self._pool


@dataclass(slots=True, eq=False)
class Job:
    """What one application to one bucket reads and writes.

    Make it once; set the fields of the second part for every round. What is checked once is not
    looked at again until another object takes its place: replace state_ptrs, hypers and steps, or
    change what steps and hypers hold, but not their shape. Pointers are for the bucket's first
    element, `elements` long.

    rule         kernel id, from RULES
    segments     (k,) SEGMENT, disjoint
    grad_dtype   of published weights, base, and slots where they are not coded, from DTYPE
    weights_ptr  published weights
    master_ptr   float32 weights; weights_ptr itself when grad_dtype is float32
    state_ptrs   float32 each, in the order of RULES[...].states; 0 for one the options switch off
    seq_ptr      uint64 seqlock word: odd while weights are written, version * 2 after; or 0
    codecs       (k,) CODEC, how every slot holds each segment; None: none of them is coded
    encoded      (k,) uint64, bytes from a slot's first to each segment; goes with codecs

    slots        addresses of the contributions, added in this order; coded ones may hold any bytes
    scales       weight of each; empty: all 1
    divisor      the sum is divided by it (by every rule but sum, assign and add)
    hypers       (groups, columns) float64
    steps        int64 per param: the number of this application, from 1; 0: leave the param alone
    coef         factor on the averaged gradient, as for clipping
    lr_factor    factor on the learning rate
    dc_lambda    delay compensation g += lambda * g * g * (weights now - base), when base_ptr is set
    base_ptr     the weights the gradient was computed on, or 0
    """

    rule: int
    segments: NDArray[np.void]
    grad_dtype: int
    weights_ptr: int
    master_ptr: int
    state_ptrs: Sequence[int] = ()
    seq_ptr: int = 0
    codecs: NDArray[np.void] | None = None
    encoded: NDArray[np.uint64] | None = None

    slots: Sequence[int] = ()
    scales: Sequence[float] = ()
    divisor: float = 1.0
    hypers: NDArray[np.float64] | None = None
    steps: NDArray[np.int64] | None = None
    coef: float = 1.0
    lr_factor: float = 1.0
    dc_lambda: float = 0.0
    base_ptr: int = 0

    elements: int = field(init=False)
    _facts: RuleFacts = field(init=False, repr=False)
    _itemsize: int = field(init=False, repr=False)
    _groups: int = field(init=False, repr=False)
    _params: int = field(init=False, repr=False)
    _native: _core.Job = field(init=False, repr=False)
    _checked: tuple[object, object, object] = field(init=False, repr=False, default=(None,) * 3)
    _addresses: tuple[int, int] = field(init=False, repr=False, default=(0, 0))

    def __post_init__(self) -> None:
        self._facts = facts = facts_of(self.rule)
        if self.grad_dtype not in DTYPE.values():
            raise ValueError(f"grad_dtype {self.grad_dtype} is none of {DTYPE}")
        self._itemsize = itemsize = ITEMSIZE[self.grad_dtype]
        check_array(self.segments, SEGMENT, (None,), "segments")
        self.segments = self.segments.copy()  # checked once; nobody changes it afterwards
        begin, count = self.segments["begin"], self.segments["count"]
        order = np.argsort(begin, kind="stable")
        ends = begin + count
        if (ends < begin).any() or (ends[order][:-1] > begin[order][1:]).any():
            raise ValueError("segments overlap")
        check_pointer(self.weights_ptr, itemsize, "weights_ptr")
        check_pointer(self.master_ptr, 4, "master_ptr")
        if self.grad_dtype == DTYPE["float32"] and self.master_ptr != self.weights_ptr:
            raise ValueError("float32 weights are their own master: master_ptr must be weights_ptr")
        if self.seq_ptr:
            check_pointer(self.seq_ptr, 8, "seq_ptr")
        self._check_codecs(itemsize)
        self.elements = int(ends.max(initial=0))
        self._groups = 1 + int(self.segments["group"].max(initial=0))
        self._params = 1 + int(self.segments["param"].max(initial=0))
        self._native = _core.Job(
            self.rule,
            self.grad_dtype,
            len(facts.hypers),
            address(self.segments),
            0 if self.codecs is None else address(self.codecs),
            0 if self.encoded is None else address(self.encoded),
            len(self.segments),
            self.weights_ptr,
            self.master_ptr,
            self.seq_ptr,
        )

    def _check_codecs(self, itemsize: int) -> None:
        if self.codecs is None and self.encoded is None:
            return
        shape = self.segments.shape
        check_array(self.codecs, CODEC, shape, "codecs")
        check_array(self.encoded, UINT64, shape, "encoded")
        assert self.codecs is not None
        assert self.encoded is not None
        if (self.encoded[self.codecs["kind"] == KIND["none"]] % itemsize).any():
            raise ValueError(f"a segment that is not coded lies at a multiple of {itemsize} bytes")

    def _load(self) -> _core.Job:
        """Check the round's fields and hand them to the core."""
        states, hypers, steps = self._checked
        if states is not self.state_ptrs or hypers is not self.hypers or steps is not self.steps:
            self._check_lasting()
        slots, itemsize = self.slots, self._itemsize
        if not slots:
            raise ValueError("a job needs at least one slot")
        if self.scales and len(self.scales) != len(slots):
            raise ValueError(f"{len(self.scales)} scales for {len(slots)} slots")
        for slot in slots:
            check_pointer(slot, itemsize, "slot")
        if self.base_ptr:
            check_pointer(self.base_ptr, itemsize, "base_ptr")
        if not self.divisor > 0:
            raise ValueError(f"the divisor must be positive, not {self.divisor}")
        self._native.set_round(
            self.state_ptrs,
            slots,
            self.scales,
            self.divisor,
            *self._addresses,
            self.coef,
            self.lr_factor,
            self.dc_lambda,
            self.base_ptr,
        )
        return self._native

    def _check_lasting(self) -> None:
        """What stays as it is over many rounds."""
        facts = self._facts
        if len(self.state_ptrs) > len(facts.states):
            raise ValueError(f"{len(self.state_ptrs)} states; the rule has {facts.states}")
        for state in self.state_ptrs:
            if state:
                check_pointer(state, 4, "state")
        check_array(self.steps, INT64, (None,), "steps")
        assert self.steps is not None
        if len(self.steps) < self._params:
            raise ValueError(f"{len(self.steps)} steps; segments name param {self._params - 1}")
        if facts.hypers:
            check_array(self.hypers, FLOAT64, (None, len(facts.hypers)), "hypers")
            assert self.hypers is not None
            if len(self.hypers) < self._groups:
                raise ValueError(
                    f"{len(self.hypers)} rows of hypers; segments name group {self._groups - 1}"
                )
        has_hypers = facts.hypers and self.hypers is not None
        self._addresses = (address(self.hypers) if has_hypers else 0, address(self.steps))
        self._checked = (self.state_ptrs, self.hypers, self.steps)


def apply(pool: Pool, jobs: Sequence[Job], isa: str | None = None) -> None:
    """Average every job's contributions and apply its rule, tiles spread over the pool.

    The result is the same, bit for bit, for any number of threads and any instruction set.
    """
    _core.apply(pool._open(), load_all(jobs), place(isa))


def reduce(
    pool: Pool, jobs: Sequence[Job], out_ptrs: Sequence[int], isa: str | None = None
) -> None:
    """The averaged gradient of each job, as `apply` would use it, into float32 memory.

    Parameters at step 0, and padding between segments, are left as they are.
    """
    if len(out_ptrs) != len(jobs):
        raise ValueError(f"{len(out_ptrs)} outputs for {len(jobs)} jobs")
    for out in out_ptrs:
        check_pointer(out, 4, "output")
    _core.reduce(pool._open(), load_all(jobs), out_ptrs, place(isa))


def norm_sq(pool: Pool, jobs: Sequence[Job], isa: str | None = None) -> float:
    """Sum of squares of the averaged gradients of all jobs; parameters at step 0 count nothing."""
    return _core.norm_sq(pool._open(), load_all(jobs), place(isa))


def load_all(jobs: Sequence[Job]) -> list[_core.Job]:
    """Check every job's round and hand it to the core."""
    if len({id(job) for job in jobs}) != len(jobs):
        raise ValueError("a job was given twice in one call; it holds one round at a time")
    return [job._load() for job in jobs]


def facts_of(kernel: int) -> RuleFacts:
    if kernel not in _BY_KERNEL:
        raise ValueError(f"no rule has the kernel id {kernel}")
    return _BY_KERNEL[kernel]
