"""How near are encoding and decoding to what this machine's memory can do?

    python -m bench.codecs [--elements 25M] [--repeats 15] [--threads N] [--quick] [--json FILE]

A parameter of so many float32 elements lies in pieces of 2**20, as buckets cut it. Every result is
first checked, and its bytes are compared with the formula. Then the kernel and a stream kernel that
reads and writes the same streams (csrc/stream.inc.h, `move`) take turns, A B B A. A ratio is the
stream's median time over the kernel's: 1 means nothing is left to gain.

encode   gradient and residual are read, codes and the new residual are written; one thread, as in a
         worker
reduce   the codes of all contributors are read, their average is written
apply    the same, into SGD with momentum: weights and momentum are read and written

topk is also compared with torch.topk(|gradient|, k), on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table

from zps import native
from zps.optim.registry import rule

from . import goals, harness, suites
from .kernels import Turns, anonymous, gbps, require_close, require_memory, take_turns
from .options import Options, read
from .out import Out, Record
from .peers.base import BenchError, cores
from .report import JsonFile, Quick, facts

Floats = NDArray[np.float32]
FLOAT32 = native.DTYPE["float32"]
PIECE = 1 << 20
UNIT = 512  # elements that the stream kernel takes together
GOAL = 0.8
TOPK_GOAL = 5.0
CONTRIBUTORS = (1, 2, 4)
_ELEMENTS, _QUICK_ELEMENTS = 25_000_000, PIECE
_CACHED_ELEMENTS = 4 * PIECE  # so many fit into cache: no goal is for them
_REPEATS, _QUICK_REPEATS = 15, 3
_LEAST_TURNS = 3  # of topk, which takes long: one has no interval
_STREAMS = 12  # five of the memory, four slots, topk's copies


@dataclass(frozen=True, slots=True)
class Subject:
    """A codec as it is measured; bytes of a piece of n elements, by the format's formula."""

    name: str
    kind: str
    block: int = 256
    flags: int = native.FEEDBACK
    ratio: float = 0.01

    @property
    def record(self) -> Any:
        fields = (native.KIND[self.kind], self.block, self.flags, 0, self.ratio)
        return np.array([fields], native.CODEC)[0]

    def nbytes(self, n: int) -> int:
        if self.kind in ("fp16", "bf16"):
            return 2 * n
        k = math.ceil(self.ratio * n)
        if self.kind == "topk":
            return 4 * (-(-n // 4096) + 1) + (2 * k + 3) // 4 * 4 + 4 * k
        if self.kind == "randk":
            return 8 + 4 * k
        bits = {"fp8": 8, "int8": 8, "int4": 4, "ternary": 2, "onebit": 1}[self.kind]
        return 4 * -(-n // self.block) + -(-n * bits // 8)


RANDOM = native.FEEDBACK | native.STOCHASTIC
SUBJECTS = (
    Subject("fp16", "fp16"),
    Subject("bf16", "bf16"),
    Subject("fp8", "fp8"),
    Subject("int8", "int8"),
    Subject("int4", "int4", 64),
    Subject("onebit", "onebit"),
    Subject("ternary", "ternary"),
    Subject("topk 1 %", "topk"),
    Subject("randk 1 %", "randk"),
)
STOCHASTIC = (
    Subject("fp8 stochastic", "fp8", flags=RANDOM),
    Subject("int8 stochastic", "int8", flags=RANDOM),
    Subject("int4 stochastic", "int4", 64, flags=RANDOM),
    Subject("ternary stochastic", "ternary", flags=RANDOM),
)


@dataclass(slots=True)
class Result:
    what: str
    subject: Subject
    contributors: int
    threads: int
    elements: int
    coded_bytes: int  # of one contributor
    moved_bytes: int
    turns: Turns  # of the kernel and the peer
    peer_name: str = "stream"
    goal: float = GOAL

    def record(self) -> Record:
        return {
            "bench": "codecs",
            "what": self.what,
            "codec": self.subject.name,
            "contributors": self.contributors,
            "threads": self.threads,
            "elements": self.elements,
            "bytes": self.moved_bytes,
            "coded_bytes_per_parameter": round(self.coded_bytes / self.elements, 4),
            "gbps": round(gbps(self.moved_bytes, self.turns.ours), 2),
            "peer": self.peer_name,
            **self.turns.record(self.goal),
        }


class Bucket:
    """A parameter in whole pieces, and one codec over it."""

    def __init__(self, subject: Subject, memory: Memory):
        self.subject, self.memory = subject, memory
        self.n = memory.n
        lengths = [min(PIECE, self.n - at) for at in range(0, self.n, PIECE)]
        self.encodings = [native.Encoding(subject.record, n, FLOAT32) for n in lengths]
        self.begins = [sum(lengths[:i]) for i in range(len(lengths))]
        self.encoded = []
        byte = 0
        for encoding, n in zip(self.encodings, lengths, strict=True):
            if encoding.nbytes != subject.nbytes(n):
                raise BenchError(f"{subject.name}: {encoding.nbytes} bytes for {n} elements")
            self.encoded.append(byte)
            byte += -(-encoding.nbytes // 64) * 64
        self.coded_bytes = sum(encoding.nbytes for encoding in self.encodings)
        # The stream's bytes a unit are whole cache lines.
        self.unit = max(64, self.coded_bytes * UNIT // self.n // 64 * 64)
        self.slots = [anonymous(-(-max(byte, self.unit * self.n // UNIT) // 4))]

    def encode(self) -> None:
        m, slot = self.memory, self.slots[0].ctypes.data
        for encoding, begin, byte in zip(self.encodings, self.begins, self.encoded, strict=True):
            encoding.encode(
                m.gradient.ctypes.data + 4 * begin,
                slot + byte,
                residual_in_ptr=m.before.ctypes.data + 4 * begin,
                residual_out_ptr=m.after.ctypes.data + 4 * begin,
            )

    def decoded(self) -> Floats:
        out = np.empty(self.n, np.float32)
        for encoding, begin, byte in zip(self.encodings, self.begins, self.encoded, strict=True):
            encoding.decode(self.slots[0].ctypes.data + byte, out.ctypes.data + 4 * begin)
        return out

    def run_encode(self, repeats: int) -> Result:
        m = self.memory
        self.encode()
        name = self.subject.name
        require_close(f"encode {name}", m.after, m.gradient + m.before - self.decoded())
        pool = native.Pool(1)
        scrap = anonymous(self.unit * self.n // UNIT // 4)
        reads, writes = m.wide(m.gradient, m.before), [*m.wide(m.after), self.narrow(scrap)]

        def stream() -> None:
            native.move(pool, reads, writes, self.n // UNIT)

        turns = take_turns(self.encode, stream, repeats)
        moved = 12 * self.n + self.coded_bytes
        return Result("encode", self.subject, 1, 1, self.n, self.coded_bytes, moved, turns)

    def narrow(self, slot: Floats) -> tuple[int, int]:
        return slot.ctypes.data, self.unit

    def job(self, name: str, contributors: int) -> native.Job:
        m, chosen = self.memory, rule(name)
        while len(self.slots) < contributors:
            self.slots.append(anonymous(len(self.slots[0])))
            self.slots[-1][:] = self.slots[0]
        group = {"lr": 1e-3, "momentum": 0.9} if name == "sgd" else {}
        return native.Job(
            rule=chosen.kernel,
            segments=np.array(
                [(b, e.n, 0, 0) for b, e in zip(self.begins, self.encodings, strict=True)],
                native.SEGMENT,
            ),
            grad_dtype=FLOAT32,
            weights_ptr=m.weights.ctypes.data,
            master_ptr=m.weights.ctypes.data,
            state_ptrs=[m.momentum.ctypes.data] if name == "sgd" else [],
            codecs=np.full(len(self.encodings), self.subject.record),
            encoded=np.array(self.encoded, np.uint64),
            slots=[slot.ctypes.data for slot in self.slots[:contributors]],
            divisor=float(contributors),
            hypers=chosen.pack([group]),
            steps=np.full(1, 2, np.int64),
        )

    def run_decode(self, what: str, contributors: int, repeats: int, threads: int) -> Result:
        m = self.memory
        self.encode()
        job = self.job("mean" if what == "reduce" else "sgd", contributors)
        pool = native.Pool(threads)
        reads = [self.narrow(slot) for slot in self.slots[:contributors]]
        native.reduce(pool, [job], [m.after.ctypes.data])
        require_close(f"reduce {self.subject.name}", m.after, self.decoded(), rtol=1e-6)
        if what == "reduce":
            writes = m.wide(m.after)
            call = partial(native.reduce, pool, [job], [m.after.ctypes.data])
        else:
            writes = m.wide(m.weights, m.momentum)
            reads = [*reads, *writes]
            call = partial(native.apply, pool, [job])
        turns = take_turns(call, lambda: native.move(pool, reads, writes, self.n // UNIT), repeats)
        coded = self.coded_bytes
        moved = contributors * coded + self.n * (4 if what == "reduce" else 16)
        return Result(what, self.subject, contributors, threads, self.n, coded, moved, turns)


class Memory:
    """float32 streams in huge pages, shared by all cases."""

    def __init__(self, n: int):
        self.n = n
        self.gradient, self.before, self.after = (anonymous(n) for _ in range(3))
        self.weights, self.momentum = anonymous(n), anonymous(n)
        rng = np.random.default_rng(0)
        for array in (self.gradient, self.before, self.weights):
            rng.standard_normal(out=array, dtype=np.float32)
        self.before *= 0.1

    @staticmethod
    def wide(*arrays: Floats) -> list[tuple[int, int]]:
        return [(array.ctypes.data, 4 * UNIT) for array in arrays]


def run_topk(memory: Memory, exact: bool, repeats: int) -> Result:
    """Against torch.topk of the magnitudes, in one piece, as a user would write it."""
    import torch

    flags = native.FEEDBACK | (native.EXACT if exact else 0)
    subject = Subject("topk 1 % exact" if exact else "topk 1 %", "topk", flags=flags)
    bucket = Bucket(subject, memory)
    gradient = torch.from_numpy(memory.gradient)
    k = math.ceil(subject.ratio * memory.n)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = take_turns(
            bucket.encode, lambda: torch.topk(gradient.abs(), k, sorted=False), repeats
        )
    finally:
        torch.set_num_threads(threads)
    moved = 12 * memory.n + bucket.coded_bytes
    coded = bucket.coded_bytes
    return Result(
        *("encode", subject, 1, 1, memory.n, coded, moved, turns),
        peer_name="torch.topk",
        goal=TOPK_GOAL,
    )


def results(
    n: int, repeats: int, threads: int, counts: tuple[int, ...] = CONTRIBUTORS
) -> Iterator[Result]:
    memory = Memory(n)
    for subject in (*SUBJECTS, *STOCHASTIC):
        yield Bucket(subject, memory).run_encode(repeats)
    for exact in (False, True):
        yield run_topk(memory, exact, max(_LEAST_TURNS, repeats // 5))
    for subject in SUBJECTS:
        bucket = Bucket(subject, memory)
        for what in ("reduce", "apply"):
            for contributors in counts:
                yield bucket.run_decode(what, contributors, repeats, threads)


def table(done: list[Result], other_cpu: float) -> Table:
    shown = Table(
        title=f"{done[0].elements / 1e6:g} M float32 parameters, {native.isa()}",
        caption=f"other processes used {other_cpu:.0%} of the cores",
    )
    for title in ("kernel", "codec"):
        shown.add_column(title)
    for title in ("contributors", "bytes/param", "ms", "GB/s", "against", "ratio"):
        shown.add_column(title, justify="right")
    for r in done:
        judged = r.elements > _CACHED_ELEMENTS or r.peer_name != "stream"
        record = r.record()
        colour = goals.COLOURS[record["verdict"]] if judged else "default"
        shown.add_row(
            r.what,
            r.subject.name,
            str(r.contributors),
            f"{r.coded_bytes / r.elements:.3f}",
            f"{r.turns.ms:.2f}",
            str(record["gbps"]),
            r.peer_name,
            f"[{colour}]{record['ratio']:.2f}[/{colour}]",
        )
    return shown


def prepare(options: Options, repeats: int | None = None, threads: int | None = None) -> suites.Job:
    """All codecs at each size; `reduce` and `apply` with each number of contributors."""
    sizes = options.sizes or (options.by_level(_QUICK_ELEMENTS, _ELEMENTS, _ELEMENTS),)
    counts = options.workers or CONTRIBUTORS
    turns = repeats or options.by_level(_QUICK_REPEATS, _REPEATS, _REPEATS)
    threads = threads or cores()
    for size in sizes:
        require_memory(size, _STREAMS + max(counts))

    def job(out: Out) -> None:
        origin = {"isa": native.isa(), **facts()}
        for size in sizes:
            n = max(1, size // 4096) * 4096
            done, others = [], harness.Others()
            steps = len(SUBJECTS) * (1 + 2 * len(counts)) + len(STOCHASTIC) + 2
            with out.progress(steps) as tick:
                for result in results(n, turns, threads, counts):
                    tick(f"{result.what} {result.subject.name}")
                    busy = {"other_cpu": round(others.share(), 3)}  # since the first case
                    out.record({**result.record(), **busy, **origin})
                    done.append(result)
            out.show(table(done, others.share()))

    return job


def main(
    elements: Annotated[str | None, typer.Option(help="as 25M or 300K; default: 25M")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="turns of A B B A")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="of reduce and apply; default: all cores")
    ] = None,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Compare every codec with a stream of the same memory."""
    with suites.alone("bench.codecs", json_file) as out:
        prepare(read(quick=quick, sizes=elements), repeats, threads)(out)


if __name__ == "__main__":
    typer.run(main)
