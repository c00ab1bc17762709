"""The one door to the compiled core: checks dtypes, shapes and alignment, then passes pointers.

Memory is given as integer addresses, because it lies in shared segments, tensors and arrays alike;
the caller keeps it alive and large enough. Every call that touches bulk data or waits releases the
GIL. What is wrong in a call is a ValueError; a pool in a forked child is ForkedProcess.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zps import _core
from zps.errors import Closed, ForkedProcess

#: Elements of a tile. Sums of squares are added tile by tile.
TILE: int = _core.TILE

#: Dtypes of gradients and published weights; bfloat16 and float16 are 2 bytes wide.
DTYPE = {"float32": 0, "bfloat16": 1, "float16": 2}
_ITEMSIZE = (4, 2, 2)

#: A piece of a parameter inside a bucket; `begin` counts elements from the bucket's first.
SEGMENT = np.dtype([("begin", "<u8"), ("count", "<u8"), ("group", "<u4"), ("param", "<u4")])

#: The codecs' ids. `none` is the values as they are.
KIND = {
    name: i
    for i, name in enumerate(
        ("none", "fp16", "bf16", "fp8", "int8", "int4", "onebit", "ternary", "topk", "randk")
    )
}

#: Bits of a codec's flags: what is lost is fed back; rounding is stochastic; topk always finds all
#: of the k largest; topk's values are float16.
FEEDBACK, STOCHASTIC, EXACT, HALF_VALUES = 1, 2, 4, 8

#: A codec and its options. `kind` from KIND, `block` a power of two from 16 to 4096 where there are
#: scales, `ratio` in (0, 1] for topk and randk; what a codec does not use is not looked at.
CODEC = np.dtype(
    [
        ("kind", "<u4"),
        ("block", "<u4"),
        ("flags", "<u4"),
        ("reserved", "<u4"),
        ("ratio", "<f8"),
    ]
)

MAX_THREADS = 512

_FLOAT64, _INT64 = np.dtype(np.float64), np.dtype(np.int64)
_UINT32, _UINT64 = np.dtype(np.uint32), np.dtype(np.uint64)


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


class Waited(enum.IntEnum):
    """Why `wait` returned."""

    REACHED = 0
    MAIL = 1
    TIMEOUT = 2


_ISAS = _core.isas()


def isas() -> list[str]:
    """The instruction sets this CPU can run, best first; the last is "base"."""
    return list(_ISAS)


def isa() -> str:
    """The instruction set that runs when none is named."""
    return _ISAS[0]


def states_used(kernel: int, hypers: NDArray[np.float64]) -> tuple[str, ...]:
    """The states a rule touches under one row of packed hyperparameters."""
    facts = _facts(kernel)
    _check_array(hypers, _FLOAT64, (len(facts.hypers),), "hypers")
    used = _core.states_used(kernel, _address(hypers))
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
        self._facts = facts = _facts(self.rule)
        if self.grad_dtype not in DTYPE.values():
            raise ValueError(f"grad_dtype {self.grad_dtype} is none of {DTYPE}")
        self._itemsize = itemsize = _ITEMSIZE[self.grad_dtype]
        _check_array(self.segments, SEGMENT, (None,), "segments")
        self.segments = self.segments.copy()  # checked once; nobody changes it afterwards
        begin, count = self.segments["begin"], self.segments["count"]
        order = np.argsort(begin, kind="stable")
        ends = begin + count
        if (ends < begin).any() or (ends[order][:-1] > begin[order][1:]).any():
            raise ValueError("segments overlap")
        _check_pointer(self.weights_ptr, itemsize, "weights_ptr")
        _check_pointer(self.master_ptr, 4, "master_ptr")
        if self.grad_dtype == DTYPE["float32"] and self.master_ptr != self.weights_ptr:
            raise ValueError("float32 weights are their own master: master_ptr must be weights_ptr")
        if self.seq_ptr:
            _check_pointer(self.seq_ptr, 8, "seq_ptr")
        self._check_codecs(itemsize)
        self.elements = int(ends.max(initial=0))
        self._groups = 1 + int(self.segments["group"].max(initial=0))
        self._params = 1 + int(self.segments["param"].max(initial=0))
        self._native = _core.Job(
            self.rule,
            self.grad_dtype,
            len(facts.hypers),
            _address(self.segments),
            0 if self.codecs is None else _address(self.codecs),
            0 if self.encoded is None else _address(self.encoded),
            len(self.segments),
            self.weights_ptr,
            self.master_ptr,
            self.seq_ptr,
        )

    def _check_codecs(self, itemsize: int) -> None:
        if self.codecs is None and self.encoded is None:
            return
        shape = self.segments.shape
        _check_array(self.codecs, CODEC, shape, "codecs")
        _check_array(self.encoded, _UINT64, shape, "encoded")
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
            _check_pointer(slot, itemsize, "slot")
        if self.base_ptr:
            _check_pointer(self.base_ptr, itemsize, "base_ptr")
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
                _check_pointer(state, 4, "state")
        _check_array(self.steps, _INT64, (None,), "steps")
        assert self.steps is not None
        if len(self.steps) < self._params:
            raise ValueError(f"{len(self.steps)} steps; segments name param {self._params - 1}")
        if facts.hypers:
            _check_array(self.hypers, _FLOAT64, (None, len(facts.hypers)), "hypers")
            assert self.hypers is not None
            if len(self.hypers) < self._groups:
                raise ValueError(
                    f"{len(self.hypers)} rows of hypers; segments name group {self._groups - 1}"
                )
        has_hypers = facts.hypers and self.hypers is not None
        self._addresses = (_address(self.hypers) if has_hypers else 0, _address(self.steps))
        self._checked = (self.state_ptrs, self.hypers, self.steps)


def apply(pool: Pool, jobs: Sequence[Job], isa: str | None = None) -> None:
    """Average every job's contributions and apply its rule, tiles spread over the pool.

    The result is the same, bit for bit, for any number of threads and any instruction set.
    """
    _core.apply(pool._open(), _load_all(jobs), _place(isa))


def reduce(
    pool: Pool, jobs: Sequence[Job], out_ptrs: Sequence[int], isa: str | None = None
) -> None:
    """The averaged gradient of each job, as `apply` would use it, into float32 memory.

    Parameters at step 0, and padding between segments, are left as they are.
    """
    if len(out_ptrs) != len(jobs):
        raise ValueError(f"{len(out_ptrs)} outputs for {len(jobs)} jobs")
    for out in out_ptrs:
        _check_pointer(out, 4, "output")
    _core.reduce(pool._open(), _load_all(jobs), out_ptrs, _place(isa))


def norm_sq(pool: Pool, jobs: Sequence[Job], isa: str | None = None) -> float:
    """Sum of squares of the averaged gradients of all jobs; parameters at step 0 count nothing."""
    return _core.norm_sq(pool._open(), _load_all(jobs), _place(isa))


class Left(enum.IntEnum):
    """Why `Lane.run` returned."""

    ELSEWHERE = 0
    UNUSUAL = 1
    TIMEOUT = 2
    INTERRUPTED = 3


class Steps(NamedTuple):
    """Step counts of a job's params, (k,) int64 each: as they are, and as `Job.steps` has them."""

    now: NDArray[np.int64]
    next: NDArray[np.int64]


class Lane:
    """Rounds that need no decision, carried out without the interpreter: see csrc/core/lane.h.

    jobs        one a bucket, each with its lasting fields and a slot for every member
    steps       of each job
    members     (address of the bell, address of the first `done` word) of each, in rank order
    closed_ptr  a word a bucket: 1 + its last closed round
    signal_ptr  the futex that workers sleep on
    divides     the rule divides by the sum of the weights
    The caller keeps what lies at these addresses, for as long as it calls `run`.
    """

    def __init__(
        self,
        pool: Pool,
        jobs: Sequence[Job],
        steps: Sequence[Steps],
        members: Sequence[tuple[int, int]],
        closed_ptr: int,
        signal_ptr: int,
        *,
        divides: bool,
    ):
        if not members or any(len(job.slots) != len(members) for job in jobs):
            raise ValueError(f"{len(members)} members, and jobs for others")
        for job, (now, after) in zip(jobs, steps, strict=True):
            _check_array(now, _INT64, job.steps.shape if job.steps is not None else (0,), "now")
            if after is not job.steps:
                raise ValueError("the steps to come must be those of the job")
            if not job.seq_ptr:
                raise ValueError("a job of a lane has a seqlock")
        for pointer in (closed_ptr, *(address for member in members for address in member)):
            _check_pointer(pointer, 8, "a word")
        _check_pointer(signal_ptr, 4, "signal_ptr")
        self._pool = pool
        self._kept = (tuple(jobs), tuple(steps))
        self._lane = _core.Lane(
            pool._open(),
            0,
            _load_all(jobs),
            [(_address(now), _address(after), len(now)) for now, after in steps],
            members,
            closed_ptr,
            signal_ptr,
            divides,
        )

    def run(
        self,
        round_: int,
        heard: Sequence[int],
        doorway: int,
        elsewhere: Sequence[int],
        timeout_ns: int,
    ) -> Left:
        """Carry rounds out from `round_` on, until something else is to be done.

        heard      the last sequence number known of each member
        doorway    a pipe that is not blocking, whose words wake it
        elsewhere  descriptors; one that is readable ends it
        """
        if len(heard) != len(self._kept[0][0].slots):
            raise ValueError(f"{len(heard)} members, not {len(self._kept[0][0].slots)}")
        self._pool._open()
        return Left(self._lane.run(round_, heard, doorway, elsewhere, timeout_ns))

    @property
    def heard(self) -> list[int]:
        """The sequence number of each member's last push that was carried out, or was known."""
        return self._lane.heard

    @property
    def times(self) -> list[tuple[int, int, int]]:
        """Each round of the last run: begin, end of the kernels, end, in nanoseconds."""
        return self._lane.times


def encode(
    src_ptr: int, dst_ptr: int, n: int, dtype: int, isa: str | None = None
) -> tuple[float, bool]:
    """Copy n elements; in the same pass, their sum of squares and whether all are finite.

    The sum is a double, which holds the square of any float: it is finite exactly when all are.
    """
    _check_pointer(dst_ptr, _ITEMSIZE[dtype], "dst_ptr")
    _check_pointer(src_ptr, _ITEMSIZE[dtype], "src_ptr")
    sum_sq = _core.copy(src_ptr, dst_ptr, n, dtype, _place(isa))
    return sum_sq, math.isfinite(sum_sq)


def inspect(src_ptr: int, n: int, dtype: int, isa: str | None = None) -> tuple[float, bool]:
    """What `encode` returns, without the copy: for gradients written in place."""
    _check_pointer(src_ptr, _ITEMSIZE[dtype], "src_ptr")
    sum_sq = _core.copy(src_ptr, 0, n, dtype, _place(isa))
    return sum_sq, math.isfinite(sum_sq)


class Encoding:
    """How one piece is encoded, all of which follows from its codec and its length.

    codec    a record of CODEC
    n        elements; fewer than 2**32 for topk and randk
    dtype    of the piece's parameter, from DTYPE
    Holds `nbytes`, the bytes of the encoded piece, and `k`, the entries that topk and randk have
    room for. Raises ValueError for options out of their range.
    """

    __slots__ = ("_dtype", "_encoding", "_feedback", "_itemsize", "_kind", "k", "n", "nbytes")

    def __init__(self, codec: np.void, n: int, dtype: int):
        record = np.array(codec, CODEC)
        if not 0 <= n < 2**48:
            raise ValueError(f"a piece has 0 to 2**48 elements, not {n}")
        _check_dtype(dtype)
        self.n = n
        self._dtype = dtype
        self._itemsize = _ITEMSIZE[dtype]
        self._kind = int(record["kind"])
        self._feedback = bool(record["flags"] & FEEDBACK)
        self._encoding = _core.Encoding(_address(record), n, self._itemsize)
        self.nbytes = self._encoding.nbytes
        self.k = self._encoding.k

    def encode(
        self,
        grad_ptr: int,
        out_ptr: int,
        *,
        residual_in_ptr: int = 0,
        residual_out_ptr: int = 0,
        residual_factor: float = 1.0,
        seed: int = 0,
        isa: str | None = None,
    ) -> tuple[float, bool]:
        """Encode v = gradient + residual_factor * residual_in in one pass; keep what is lost.

        grad_ptr          n elements of the piece's dtype
        out_ptr           `nbytes` bytes, aligned to 8
        residual_in_ptr   n float32, unchanged; 0: nothing was lost before
        residual_out_ptr  n float32 that do not overlap residual_in: v - decoded; 0: not kept
        seed              of stochastic rounding and of randk's choice, below 2**64
        Returns what `inspect` returns for the gradient, bit for bit. With a gradient that is not
        finite, output and residual_out hold nothing of use, but are safe to decode.
        Residuals are refused for a codec without FEEDBACK. The result does not depend on the
        instruction set.
        """
        self._check_residuals(residual_in_ptr, residual_out_ptr)
        _check_pointer(grad_ptr, self._itemsize, "grad_ptr")
        if self._kind == KIND["none"]:
            return encode(grad_ptr, out_ptr, self.n, self._dtype, isa)
        return self._run(
            grad_ptr, 0, residual_in_ptr, residual_out_ptr, residual_factor, seed, out_ptr, isa
        )

    def encode_delta(
        self, now_ptr: int, sent_ptr: int, out_ptr: int, *, seed: int = 0, isa: str | None = None
    ) -> tuple[float, bool]:
        """Encode now - sent, and add what was encoded to sent: the other side's values.

        now_ptr, sent_ptr   n elements of the piece's dtype
        out_ptr             `nbytes` bytes, aligned to 8
        What is lost stays in the difference, so no residual is needed. Whoever adds the decoded
        piece to a copy of the old `sent` (`decode(..., add=True)`, same dtype) holds the new one,
        bit for bit. Returns the sum of squares of the difference, and whether it is finite.
        Not for `none`: send the values. randk wants FEEDBACK, or it oversteps.
        """
        if self._kind == KIND["none"]:
            raise ValueError("codec none has no delta; send the values themselves")
        _check_pointer(now_ptr, self._itemsize, "now_ptr")
        _check_pointer(sent_ptr, self._itemsize, "sent_ptr")
        return self._run(now_ptr, sent_ptr, 0, 0, 1.0, seed, out_ptr, isa)

    def decode(
        self,
        src_ptr: int,
        out_ptr: int,
        *,
        dtype: int | None = None,
        add: bool = False,
        isa: str | None = None,
    ) -> None:
        """Decode `nbytes` bytes into n elements of `dtype` (None: the piece's), or add to them.

        Any bytes are safe. src_ptr may have any alignment. The sum is rounded once, from float32.
        """
        dtype = self._dtype if dtype is None else dtype
        _check_dtype(dtype)
        if self._kind == KIND["none"] and dtype != self._dtype:
            raise ValueError("what is not coded is decoded in its own dtype only")
        _check_pointer(src_ptr, 1, "src_ptr")
        _check_pointer(out_ptr, _ITEMSIZE[dtype], "out_ptr")
        _core.decode(self._encoding, src_ptr, out_ptr, dtype, add, _place(isa))

    def check(self, src_ptr: int) -> str:
        """What is wrong with `nbytes` bytes that nobody writes to any more; empty: nothing.

        A piece without a fault names no element twice, and none outside of the piece.
        """
        _check_pointer(src_ptr, 1, "src_ptr")
        return _core.check(self._encoding, src_ptr) or ""

    def _check_residuals(self, residual_in_ptr: int, residual_out_ptr: int) -> None:
        if not residual_in_ptr and not residual_out_ptr:
            return
        if not self._feedback:
            raise ValueError("this codec was made without FEEDBACK, but a residual was given")
        _check_pointer(residual_out_ptr, 4, "residual_out_ptr")
        if residual_in_ptr:
            _check_pointer(residual_in_ptr, 4, "residual_in_ptr")
            if abs(residual_in_ptr - residual_out_ptr) < 4 * self.n:
                raise ValueError("residual_in and residual_out overlap")

    def _run(
        self,
        source_ptr: int,
        sent_ptr: int,
        residual_in_ptr: int,
        residual_out_ptr: int,
        residual_factor: float,
        seed: int,
        out_ptr: int,
        isa: str | None,
    ) -> tuple[float, bool]:
        _check_pointer(out_ptr, 8, "out_ptr")
        if not 0 <= seed < 2**64:
            raise ValueError(f"a seed is from 0 to 2**64 - 1, not {seed}")
        sum_sq = _core.encode(
            self._encoding,
            self._dtype,
            source_ptr,
            sent_ptr,
            residual_in_ptr,
            residual_out_ptr,
            residual_factor,
            seed,
            out_ptr,
            _place(isa),
        )
        return sum_sq, math.isfinite(sum_sq)


def stream(
    pool: Pool,
    read_ptrs: Sequence[int],
    write_ptrs: Sequence[int],
    n: int,
    block: int,
    isa: str | None = None,
) -> None:
    """The roofline of `apply`: add the sum of the read streams to each write stream.

    1, 2 or 4 float32 streams are read, 2 or 3 are read and written, `block` (16, 32, 64 or 128)
    elements at a time; n is a multiple of 128.
    """
    for pointer in (*read_ptrs, *write_ptrs):
        _check_pointer(pointer, 4, "stream")
    if n % 128:
        raise ValueError(f"n must be a multiple of 128, not {n}")
    _core.stream(pool._open(), read_ptrs, write_ptrs, n, block, _place(isa))


def move(
    pool: Pool,
    reads: Sequence[tuple[int, int]],
    writes: Sequence[tuple[int, int]],
    units: int,
    isa: str | None = None,
) -> None:
    """The roofline of codecs: read and write whole streams, each (address, bytes a unit).

    Bytes a unit are multiples of 64; at most 8 streams are read and 8 written. What is written is
    the exclusive or of the cache lines that were read.
    """
    for pointer, unit in (*reads, *writes):
        _check_pointer(pointer, 1, "stream")
        if unit < 0 or unit % 64:
            raise ValueError(f"bytes a unit are a multiple of 64, not {unit}")
    _core.move(pool._open(), reads, writes, units, _place(isa))


def wait(
    signal_ptr: int,
    words_ptr: int,
    index: NDArray[np.uint32],
    targets: NDArray[np.uint64],
    mail_ptr: int,
    mail_seen: int,
    spin_us: int,
    timeout_ns: int,
) -> Waited:
    """Wait until words[index[i]] >= targets[i] for every i, mail comes, or the time is over.

    Spins for spin_us, then sleeps on the signal, a futex in shared memory that may be mapped
    read-only. Mail has come when the word at mail_ptr (0: none) is not mail_seen; whoever writes it
    posts the signal too. Does not return early on Ctrl-C: pass short timeouts in turn.
    """
    _check_array(index, _UINT32, (None,), "index")
    _check_array(targets, _UINT64, index.shape, "targets")
    _check_pointer(signal_ptr, 4, "signal_ptr")
    if len(index):
        _check_pointer(words_ptr, 8, "words_ptr")
    if mail_ptr:
        _check_pointer(mail_ptr, 4, "mail_ptr")
    return Waited(
        _core.wait(
            signal_ptr,
            words_ptr,
            _address(index),
            _address(targets),
            len(index),
            mail_ptr,
            mail_seen,
            spin_us * 1000,
            timeout_ns,
        )
    )


def post(
    signal_ptr: int, words_ptr: int, index: NDArray[np.uint32], values: NDArray[np.uint64]
) -> None:
    """Store words[index[i]] = values[i], then wake every waiter on the signal."""
    _check_array(index, _UINT32, (None,), "index")
    _check_array(values, _UINT64, index.shape, "values")
    _check_pointer(signal_ptr, 4, "signal_ptr")
    if len(index):
        _check_pointer(words_ptr, 8, "words_ptr")
    _core.post(signal_ptr, words_ptr, _address(index), _address(values), len(index))


def post_signal(signal_ptr: int) -> None:
    """Wake every waiter on the signal, to look again: for mail."""
    _check_pointer(signal_ptr, 4, "signal_ptr")
    _core.post(signal_ptr, 0, 0, 0, 0)


def pull(seq_ptr: int, src_ptr: int, dst_ptr: int, nbytes: int, spins: int) -> int:
    """Copy bytes that a seqlock guards, whole, and return their version.

    Returns -1 if none of `spins` attempts found them at rest: the writer is slow, or dead.
    """
    _check_pointer(seq_ptr, 8, "seq_ptr")
    return _core.pull(seq_ptr, src_ptr, dst_ptr, nbytes, spins)


def load_u64(ptr: int) -> int:
    """Read a shared word (acquire)."""
    _check_pointer(ptr, 8, "ptr")
    return _core.load_u64(ptr)


def store_u64(ptr: int, value: int) -> None:
    """Write a shared word (release)."""
    _check_pointer(ptr, 8, "ptr")
    _core.store_u64(ptr, value)


def load_u32(ptr: int) -> int:
    """Read a shared word (acquire)."""
    _check_pointer(ptr, 4, "ptr")
    return _core.load_u32(ptr)


def store_u32(ptr: int, value: int) -> None:
    """Write a shared word (release)."""
    _check_pointer(ptr, 4, "ptr")
    _core.store_u32(ptr, value)


def add_u32(ptr: int, value: int) -> int:
    """Add to a shared word, wrapping, and return its new value."""
    _check_pointer(ptr, 4, "ptr")
    return _core.add_u32(ptr, value) & 0xFFFFFFFF


def _load_all(jobs: Sequence[Job]) -> list[_core.Job]:
    """Check every job's round and hand it to the core."""
    if len({id(job) for job in jobs}) != len(jobs):
        raise ValueError("a job was given twice in one call; it holds one round at a time")
    return [job._load() for job in jobs]


def _place(isa: str | None) -> int:
    """Where the core lists this instruction set; None is the best."""
    if isa is not None and isa not in _ISAS:
        raise ValueError(f"this CPU cannot run the instruction set {isa!r}, only {_ISAS}")
    return 0 if isa is None else _ISAS.index(isa)


def _facts(kernel: int) -> RuleFacts:
    if kernel not in _BY_KERNEL:
        raise ValueError(f"no rule has the kernel id {kernel}")
    return _BY_KERNEL[kernel]


_address = _core.address


def _check_dtype(dtype: int) -> None:
    if dtype not in DTYPE.values():
        raise ValueError(f"dtype {dtype} is none of {DTYPE}")


def _check_pointer(address: int, alignment: int, what: str) -> None:
    if address <= 0 or address % alignment:
        raise ValueError(f"{what} {address:#x} is null or not aligned to {alignment} bytes")


def _fits(want: int | None, have: int) -> bool:
    return want is None or want == have


def _check_array(
    array: object, dtype: np.dtype[Any], shape: tuple[int | None, ...], what: str
) -> None:
    """Raise ValueError unless this is a C-contiguous array of the dtype and shape (None: any)."""
    if isinstance(array, np.ndarray) and array.dtype == dtype and array.flags.c_contiguous:
        have = array.shape
        if have == shape or (len(have) == len(shape) and all(map(_fits, shape, have))):
            return
    given = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else repr(array)
    raise ValueError(f"{what} must be a C-contiguous array of {dtype} {shape}, not {given}")
