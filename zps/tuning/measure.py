"""What a compression costs and loses, on the gradients of a few rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from zps.codec.base import Codec
from zps.codec.plan import Plan, aligned_zeros
from zps.codec.residual import Residual
from zps.codec.spec import Compression
from zps.core.layout import Layout, Param
from zps.errors import LayoutError
from zps.tuning.runner import Bytes, CodecRunner, Float32

__all__ = ["CANDIDATES", "Gradients", "Measurement", "measure"]

#: What is tried when nothing else is asked for, from the most bytes to the fewest.
CANDIDATES = (
    *("none", "fp16", "bf16", "fp8", "int8", "int4", "ternary", "onebit"),
    *("topk:ratio=0.1", "topk:ratio=0.01", "randk:ratio=0.1,ef=true"),
)

#: Rounds at least: the first is slow, and feedback needs some to show what it does.
MIN_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of consecutive steps of one worker.

    params  the parameters as declared
    steps   for each step, one contiguous float32 array of `numel` elements a parameter; zeros
            where there was no gradient

    Raises LayoutError for arrays that do not fit, or no step.
    """

    params: tuple[Param, ...]
    steps: Sequence[Sequence[Float32]]

    def __post_init__(self) -> None:
        if not self.steps:
            raise LayoutError("there are no gradients: run backward first")
        for step in self.steps:
            sizes = [array.shape for array in step]
            if sizes != [(param.numel,) for param in self.params]:
                raise LayoutError("the gradients do not have the shapes of the parameters")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One compression on one model.

    `error` and `cosine` compare decoded gradients with true ones: of one round without error
    feedback, and of the sum over all `rounds` with what the codec feeds back, which is what
    reaches the weights.
    """

    compression: str
    nbytes: int
    """Of a worker's push in a round."""
    elements: int
    """Of the model: the parameters."""
    encode_s: float
    """Of one round, on one thread: the median."""
    decode_s: float
    """Likewise, of one worker's push in the hub."""
    rounds: int
    error: float
    """‖decoded - true‖ / ‖true‖, of one round."""
    cosine: float
    total_error: float
    """The same, of the sum over the rounds."""
    total_cosine: float

    @property
    def bytes_per_parameter(self) -> float:
        return self.nbytes / self.elements if self.elements else 0.0


def measure(
    gradients: Gradients,
    compression: Compression,
    runner: CodecRunner,
    *,
    bucket_bytes: int,
    min_bytes: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """Send the gradients through the codecs, twice: as they come, and with error feedback.

    Gradients of half-precision parameters are encoded from float32; bytes are counted in the
    parameters' own dtypes.
    """
    rounds = max(len(gradients.steps), MIN_ROUNDS)
    bench = _Bench(gradients, compression, runner, bucket_bytes, min_bytes, clock)
    alone = _Likeness()
    for step in range(len(gradients.steps)):
        bench.round(step, None)
        alone.add_all(gradients.steps[step], bench.decoded)
    residual = Residual(bench.plan)
    true = [np.zeros(param.numel, np.float32) for param in gradients.params]
    sent = [np.zeros(param.numel, np.float32) for param in gradients.params]
    times = []
    for number in range(rounds):
        step = number % len(gradients.steps)
        times.append(bench.round(step, residual, seed=number))
        for sums, parts in ((true, gradients.steps[step]), (sent, bench.decoded)):
            for total, part in zip(sums, parts, strict=True):
                total += part
    together = _Likeness()
    together.add_all(true, sent)
    layout = Layout.build(
        sorted(gradients.params, key=lambda p: p.dtype), bucket_bytes=bucket_bytes
    )
    return Measurement(
        compression=str(compression),
        nbytes=Plan.build(layout, compression, min_bytes).total_bytes,
        elements=sum(param.numel for param in gradients.params),
        encode_s=median(encode_s for encode_s, _ in times),
        decode_s=median(decode_s for _, decode_s in times),
        rounds=rounds,
        error=alone.error,
        cosine=alone.cosine,
        total_error=together.error,
        total_cosine=together.cosine,
    )


class _Bench:
    """The memory of one worker and its hub, and a clock."""

    def __init__(
        self,
        gradients: Gradients,
        compression: Compression,
        runner: CodecRunner,
        bucket_bytes: int,
        min_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        params = [Param(p.name, p.shape, "float32") for p in gradients.params]
        layout = Layout.build(params, bucket_bytes=bucket_bytes)
        self.plan = Plan.build(layout, compression, min_bytes)
        self.decoded = [np.zeros(param.numel, np.float32) for param in params]
        self._steps = gradients.steps
        self._runner = runner
        self._clock = clock
        self._slot = aligned_zeros(self.plan.total_bytes)

    def round(self, step: int, residual: Residual | None, seed: int = 0) -> tuple[float, float]:
        """Encode one step's gradients and decode them; the seconds that each has taken."""
        pieces = range(len(self.plan.layout.pieces))
        begin = self._clock()
        for piece in pieces:
            codec, values, encoded = self._of(piece, self._steps[step])
            views = None if residual is None else residual.of(piece)
            self._runner.encode(codec, values, encoded, views, seed * len(pieces) + piece)
        middle = self._clock()
        for piece in pieces:
            codec, values, encoded = self._of(piece, self.decoded)
            self._runner.decode(codec, encoded, values)
        end = self._clock()
        if residual is not None:
            residual.commit(range(len(self.plan.layout.buckets)))
        return middle - begin, end - middle

    def _of(self, index: int, arrays: Sequence[Float32]) -> tuple[Codec, Float32, Bytes]:
        """A piece's codec, its part of `arrays`, and its place in the slot."""
        plan, piece = self.plan, self.plan.layout.pieces[index]
        begin = int(plan.bucket_offset[piece.bucket] + plan.piece_offset[index])
        return (
            plan.codecs[int(plan.codec_index[index])],
            arrays[piece.param][piece.param_begin : piece.param_begin + piece.count],
            self._slot[begin : begin + int(plan.piece_nbytes[index])],
        )


@dataclass(slots=True)
class _Likeness:
    """Sums over many arrays, from which error and cosine follow."""

    true_sq: float = 0.0
    lost_sq: float = 0.0
    sent_sq: float = 0.0
    product: float = 0.0

    def add_all(self, true: Sequence[Float32], sent: Sequence[Float32]) -> None:
        for a, b in zip(true, sent, strict=True):
            self.true_sq += _dot(a, a)
            self.sent_sq += _dot(b, b)
            self.product += _dot(a, b)
            lost = a - b
            self.lost_sq += _dot(lost, lost)

    @property
    def error(self) -> float:
        return math.sqrt(self.lost_sq / self.true_sq) if self.true_sq else 0.0

    @property
    def cosine(self) -> float:
        norms = math.sqrt(self.true_sq) * math.sqrt(self.sent_sq)
        return self.product / norms if norms else 1.0


def _dot(a: Float32, b: Float32) -> float:
    """In float64: a float32 sum of a million squares is good to three digits."""
    return float(np.einsum("i,i->", a, b, dtype=np.float64))
