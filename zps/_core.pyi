"""The compiled core. Only zps.native imports it: addresses are taken on trust here."""

from collections.abc import Sequence

RULES: tuple[tuple[str, int, list[str], list[str]], ...]
TILE: int

class Pool:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def forked(self) -> bool: ...

class Job:
    def __init__(
        self,
        rule: int,
        dtype: int,
        hyper_count: int,
        segments: int,
        codecs: int,
        encoded: int,
        segment_count: int,
        weights: int,
        master: int,
        seq: int,
        /,
    ) -> None: ...
    def set_round(
        self,
        states: Sequence[int],
        slots: Sequence[int],
        scales: Sequence[float],
        divisor: float,
        hypers: int,
        steps: int,
        coef: float,
        lr_factor: float,
        dc_lambda: float,
        base: int,
        /,
    ) -> None: ...

class Lane:
    def __init__(
        self,
        pool: Pool,
        isa: int,
        jobs: Sequence[Job],
        steps: Sequence[tuple[int, int, int]],
        members: Sequence[tuple[int, int]],
        closed: int,
        signal: int,
        divides: bool,
        /,
    ) -> None: ...
    def run(
        self,
        round: int,
        heard: Sequence[int],
        doorway: int,
        elsewhere: Sequence[int],
        timeout_ns: int,
        /,
    ) -> None: ...
    @property
    def heard(self) -> list[int]: ...
    @property
    def times(self) -> list[tuple[int, int, int]]: ...

def apply(pool: Pool, jobs: Sequence[Job], isa: int, /) -> None: ...
def reduce(pool: Pool, jobs: Sequence[Job], outs: Sequence[int], isa: int, /) -> None: ...
def norm_sq(pool: Pool, jobs: Sequence[Job], isa: int, /) -> float: ...
def copy(source: int, out: int, n: int, dtype: int, isa: int, /) -> float: ...

class Encoding:
    def __init__(self, codec: int, n: int, itemsize: int, /) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def k(self) -> int: ...

def encode(
    encoding: Encoding,
    dtype: int,
    source: int,
    sent: int,
    residual_in: int,
    residual_out: int,
    residual_factor: float,
    seed: int,
    out: int,
    isa: int,
    /,
) -> float: ...
def decode(
    encoding: Encoding, source: int, out: int, dtype: int, add: bool, isa: int, /
) -> None: ...
def check(encoding: Encoding, source: int, /) -> str | None: ...
def stream(
    pool: Pool, reads: Sequence[int], writes: Sequence[int], n: int, block: int, isa: int, /
) -> None: ...
def move(
    pool: Pool,
    reads: Sequence[tuple[int, int]],
    writes: Sequence[tuple[int, int]],
    units: int,
    isa: int,
    /,
) -> None: ...
def address(array: object, /) -> int: ...
def wait(
    signal: int,
    words: int,
    index: int,
    targets: int,
    count: int,
    mail: int,
    mail_seen: int,
    spin_ns: int,
    timeout_ns: int,
    /,
) -> int: ...
def post(signal: int, words: int, index: int, values: int, count: int, /) -> None: ...
def pull(seq: int, source: int, out: int, nbytes: int, tries: int, /) -> int: ...
def load_u64(word: int, /) -> int: ...
def store_u64(word: int, value: int, /) -> None: ...
def load_u32(word: int, /) -> int: ...
def store_u32(word: int, value: int, /) -> None: ...
def add_u32(word: int, value: int, /) -> int: ...
def isas() -> list[str]: ...
def states_used(rule: int, hyper: int, /) -> int: ...
