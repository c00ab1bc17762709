"""How near is the fused apply to what this machine's memory can do?

    python -m bench.kernels [--elements 25M] [--repeats 15] [--threads N] [--quick] [--json FILE]

Each case is first checked against NumPy. Then the kernel and a stream kernel (the same streams of
the same memory, read, added and written back: see csrc/stream.inc.h) take turns, A B B A. A ratio
is the stream's median time over the kernel's: 1 means nothing is left to gain. Every shape of the
stream is tried, and the fastest counts. `cpu` is the same ratio of processor time, which other
processes on the machine disturb less.

Memory: "engine" is what a hub has: weights and slots in shared memory of 4 KiB pages, optimizer
state in anonymous huge pages. "huge" is anonymous huge pages throughout.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table

from zps import native
from zps.optim.registry import rule

from . import goals, harness, suites
from .options import Options, read
from .out import Out, Record
from .peers.base import BenchError, cores
from .report import JsonFile, Quick, facts
from .stats import Ratio, ratio_of_medians

Floats = NDArray[np.float32]
RULES = {"sgd": {"lr": 1e-3, "momentum": 0.9}, "adam": {"lr": 1e-3}}
BLOCKS = (16, 32, 64, 128)
GOAL = 0.85
CONTRIBUTORS = (1, 2, 4)
_ELEMENTS, _QUICK_ELEMENTS = 25_000_000, 4_000_000
_REPEATS, _QUICK_REPEATS = 15, 3
_STREAMS = 4  # beside the slots: weights, two states, what encoding reads


def anonymous(n: int) -> Floats:
    """Zeros in anonymous huge pages."""
    memory = mmap.mmap(-1, 4 * n + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.float32)
    skip = -array.ctypes.data % (2 << 20) // 4  # huge pages begin at multiples of their size
    array = array[skip : skip + n]
    array[:] = 0
    return array


def shared(n: int) -> Floats:
    """Zeros in a memfd, every page present."""
    fd = os.memfd_create("bench")
    os.posix_fallocate(fd, 0, 4 * n)
    array = np.frombuffer(mmap.mmap(fd, 4 * n), np.float32)
    os.close(fd)
    array[:] = 0
    return array


@dataclass(frozen=True, slots=True)
class Timing:
    wall_s: float
    cpu_s: float


def timed(call: Callable[[], object]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


@dataclass(frozen=True, slots=True)
class Turns:
    """What took turns, A B B A."""

    ours: list[Timing]
    theirs: list[Timing]

    @property
    def ratio(self) -> Ratio:
        """Their median time over ours."""
        theirs, ours = (
            list(np.array([t.wall_s for t in times]).reshape(-1, 2))
            for times in (self.theirs, self.ours)
        )
        return ratio_of_medians(theirs, ours)

    @property
    def cpu_ratio(self) -> float:
        """The same of processor time."""
        return median(t.cpu_s for t in self.theirs) / median(t.cpu_s for t in self.ours)

    @property
    def ms(self) -> float:
        """Our median time."""
        return median(t.wall_s for t in self.ours) * 1e3

    def record(self, goal: float) -> Record:
        """Times, processor time, the ratio, and what it means for the goal."""
        walls, ratio = [t.wall_s * 1e6 for t in self.ours], self.ratio
        return {
            "p50_us": round(float(np.percentile(walls, 50)), 1),
            "p99_us": round(float(np.percentile(walls, 99)), 1),
            "cpu_us": {"total": round(median(t.cpu_s for t in self.ours) * 1e6, 1)},
            **ratio.record(),
            "cpu_ratio": round(self.cpu_ratio, 3),
            "goal": goal,
            "verdict": goals.verdict(ratio.value, (ratio.low, ratio.high), goal),
        }


def take_turns(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> Turns:
    """A B B A, so that a slow drift of the machine meets both alike."""
    a, b = [], []
    for _ in range(repeats):
        a.append(timed(ours))
        b.append(timed(theirs))
        b.append(timed(theirs))
        a.append(timed(ours))
    return Turns(a, b)


def gbps(nbytes: int, times: list[Timing]) -> float:
    """How fast so many bytes were moved, at the median."""
    return nbytes / median(t.wall_s for t in times) / 1e9


def require_close(
    what: str, found: NDArray[Any], expected: NDArray[Any], rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Raises BenchError unless every element is what it has to be."""
    wrong = ~(np.abs(found - expected) <= atol + rtol * np.abs(expected))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise BenchError(
            f"{what} is wrong: {int(wrong.sum())} of {wrong.size} elements differ; at {at} it has "
            f"{found[at]!r}, the reference {expected[at]!r}"
        )


@dataclass(slots=True)
class Result:
    case: str
    memory: str
    contributors: int
    elements: int
    moved_bytes: int
    shape: str  # of the fastest stream
    turns: Turns  # of the kernel and the stream

    def record(self) -> Record:
        return {
            "bench": "kernels",
            "what": self.case,
            "memory": self.memory,
            "contributors": self.contributors,
            "elements": self.elements,
            "bytes": self.moved_bytes,
            "gbps": round(gbps(self.moved_bytes, self.turns.ours), 2),
            "stream_gbps": round(gbps(self.moved_bytes, self.turns.theirs), 2),
            "stream_shape": self.shape,
            **self.turns.record(GOAL),
        }


class ApplyCase:
    """One rule over one bucket, and the stream kernel over the same memory."""

    def __init__(self, name: str, contributors: int, memory: str, n: int, pool: native.Pool):
        self.name, self.memory, self.n, self.pool = name, memory, n, pool
        outside = shared if memory == "engine" else anonymous
        chosen = rule(name)
        used = chosen.state_used(RULES[name])
        self.weights = outside(n)
        self.slots = [outside(n) for _ in range(contributors)]
        self.states = {state: anonymous(n) for state in used}
        rng = np.random.default_rng(0)
        for array in (self.weights, *self.slots):
            rng.standard_normal(out=array, dtype=np.float32)
        self.job = native.Job(
            rule=chosen.kernel,
            segments=np.array([(0, n, 0, 0)], native.SEGMENT),
            grad_dtype=native.DTYPE["float32"],
            weights_ptr=self.weights.ctypes.data,
            master_ptr=self.weights.ctypes.data,
            state_ptrs=[
                self.states[state].ctypes.data if state in used else 0 for state in chosen.states
            ],
            slots=[slot.ctypes.data for slot in self.slots],
            divisor=float(contributors),
            hypers=chosen.pack([RULES[name]]),
            steps=np.ones(1, np.int64),
        )

    def check(self) -> None:
        """The first step against NumPy, wherever the element lies.

        Raises BenchError when it is wrong.
        """
        sample = np.linspace(0, self.n - 1, 100_000).astype(np.int64)
        before = self.weights[sample]
        grad = np.mean([slot[sample] for slot in self.slots], axis=0, dtype=np.float64)
        self.apply()
        if self.name == "sgd":
            expected = before - 1e-3 * grad
        else:
            expected = before - 1e-3 * grad / (np.abs(grad) + 1e-8)
        require_close(self.name, self.weights[sample], expected, rtol=1e-5, atol=1e-6)
        self.job.steps[0] = 2

    def apply(self) -> None:
        native.apply(self.pool, [self.job])

    def stream(self, block: int) -> None:
        native.stream(
            self.pool,
            self.job.slots,
            [array.ctypes.data for array in (self.weights, *self.states.values())],
            self.n,
            block,
        )

    def run(self, repeats: int) -> Result:
        self.check()
        tries = max(3, repeats // 2)
        pace = {
            b: median(timed(lambda b=b: self.stream(b)).cpu_s for _ in range(tries)) for b in BLOCKS
        }
        block = min(pace, key=pace.__getitem__)
        return Result(
            case=self.name,
            memory=self.memory,
            contributors=len(self.slots),
            elements=self.n,
            moved_bytes=4 * self.n * (len(self.slots) + 2 + 2 * len(self.states)),
            shape=f"block {block}",
            turns=take_turns(self.apply, lambda: self.stream(block), repeats),
        )


def run_encode(memory: str, n: int, repeats: int) -> Result:
    """A gradient from a worker's own memory into its slot, against memcpy."""
    source, slot = anonymous(n), (shared if memory == "engine" else anonymous)(n)
    np.random.default_rng(0).standard_normal(out=source, dtype=np.float32)

    def encode() -> tuple[float, bool]:
        return native.encode(source.ctypes.data, slot.ctypes.data, n, native.DTYPE["float32"])

    def copy() -> None:
        ctypes.memmove(slot.ctypes.data, source.ctypes.data, 4 * n)

    sum_sq, finite = encode()
    require_close("encode", slot, source)
    expected = np.square(source, dtype=np.float64).sum()
    require_close("encode's norm", np.array([sum_sq]), np.array([expected]), rtol=1e-9)
    if not finite:
        raise BenchError("encode is wrong: it takes finite values for others")
    return Result("encode", memory, 1, n, 8 * n, "memcpy", take_turns(encode, copy, repeats))


def results(
    n: int, repeats: int, threads: int, counts: tuple[int, ...] = CONTRIBUTORS
) -> Iterator[Result]:
    pool = native.Pool(threads)
    for memory in ("engine", "huge"):
        for name in RULES:
            for contributors in counts:
                yield ApplyCase(name, contributors, memory, n, pool).run(repeats)
        yield run_encode(memory, n, repeats)


def table(done: list[Result], other_cpu: float) -> Table:
    shown = Table(
        title=f"{done[0].elements / 1e6:g} M float32 parameters, {native.isa()}",
        caption=f"other processes used {other_cpu:.0%} of the cores",
    )
    for title in ("kernel", "memory"):
        shown.add_column(title)
    for title in ("contributors", "ms", "GB/s", "stream GB/s", "shape", "ratio", "cpu"):
        shown.add_column(title, justify="right")
    for r in done:
        record = r.record()
        judged = r.elements > _QUICK_ELEMENTS  # not what fits into cache
        colour = goals.COLOURS[record["verdict"]] if judged else "default"
        shown.add_row(
            r.case,
            r.memory,
            str(r.contributors),
            f"{r.turns.ms:.2f}",
            f"{record['gbps']:.1f}",
            f"{record['stream_gbps']:.1f}",
            r.shape,
            f"[{colour}]{record['ratio']:.2f}[/{colour}]",
            f"{record['cpu_ratio']:.2f}",
        )
    return shown


def prepare(options: Options, repeats: int | None = None, threads: int | None = None) -> suites.Job:
    """All kernels at each size; as many contributors as `options.workers` says."""
    sizes = options.sizes or (options.by_level(_QUICK_ELEMENTS, _ELEMENTS, _ELEMENTS),)
    counts = options.workers or options.by_level((1, 2), CONTRIBUTORS, (1, 2, 4, 8, 16))
    turns = repeats or options.by_level(_QUICK_REPEATS, _REPEATS, 2 * _REPEATS)
    threads = threads or cores()
    for size in sizes:
        require_memory(size, max(counts) + _STREAMS)

    def job(out: Out) -> None:
        origin = {"isa": native.isa(), "threads": threads, **facts()}
        for size in sizes:
            n = max(1, size // 128) * 128
            done, others = [], harness.Others()
            with out.progress(2 * (len(RULES) * len(counts) + 1)) as tick:
                for result in results(n, turns, threads, counts):
                    tick(result.case)
                    # Since the first case: one alone may be shorter than the kernel's clock ticks.
                    busy = {"other_cpu": round(others.share(), 3)}
                    out.record({**result.record(), **busy, **origin})
                    done.append(result)
            out.show(table(done, others.share()))

    return job


def require_memory(elements: int, streams: int) -> None:
    """Raises BenchError when so many float32 streams of this length do not fit into memory."""
    need, have = 4 * elements * streams, harness.available_bytes()
    if need > have:
        raise BenchError(
            f"size {harness.human(elements)} needs about {need / 2**30:.1f} GiB, "
            f"{have / 2**30:.1f} GiB are free: choose a smaller size"
        )


def main(
    elements: Annotated[str | None, typer.Option(help="as 25M or 300K; default: 25M")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="turns of A B B A")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="default: all cores")] = None,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Compare the fused kernels with a stream of the same memory."""
    with suites.alone("bench.kernels", json_file) as out:
        prepare(read(quick=quick, sizes=elements), repeats, threads)(out)


if __name__ == "__main__":
    typer.run(main)
