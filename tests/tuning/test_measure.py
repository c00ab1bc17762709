"""What is measured, with codecs in NumPy and a clock that is no clock."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from tests.tuning.numpy_runner import Float32, NumpyRunner
from zps.codec.spec import Compression
from zps.core.layout import Param
from zps.errors import LayoutError
from zps.tuning.measure import MIN_ROUNDS, Gradients, Measurement, measure

PARAMS = (Param("w", (40, 50), "float32"), Param("b", (7,), "float32"), Param("e", (0,), "float32"))


def gradients(steps: int = 8, seed: int = 0) -> Gradients:
    """Noise around a mean, as those of consecutive steps."""
    random = np.random.default_rng(seed)
    means = [random.normal(size=param.numel) for param in PARAMS]

    def step() -> list[Float32]:
        return [(m + random.normal(size=m.size)).astype(np.float32) for m in means]

    return Gradients(PARAMS, [step() for _ in range(steps)])


def measured(text: str, given: Gradients | None = None, **options: int) -> Measurement:
    ticks = count()
    return measure(
        given or gradients(),
        Compression.parse(text),
        NumpyRunner(),
        **{"bucket_bytes": 4096, "min_bytes": 0, **options},
        clock=lambda: float(next(ticks)),
    )


def test_nothing_is_lost_without_a_codec() -> None:
    one = measured("none")
    assert (one.error, one.total_error) == (0.0, 0.0)
    assert (one.cosine, one.total_cosine) == (pytest.approx(1), pytest.approx(1))
    assert one.elements == 2007
    assert one.nbytes == 8192
    assert one.bytes_per_parameter == one.nbytes / 2007


def test_errors_are_those_of_the_codec() -> None:
    given = gradients()
    one = measured("int8:block=4096,ef=false", given)
    lost = true = sent = product = 0.0
    for step in given.steps:
        for array in step[:2]:
            # pieces of a bucket: 1024 elements of w each
            for begin in range(0, array.size, 1024):
                part = array[begin : begin + 1024].astype(np.float64)
                scale = np.abs(part).max() / 127
                decoded = np.rint(part / scale) * scale
                lost += ((part - decoded) ** 2).sum()
                true += (part**2).sum()
                sent += (decoded**2).sum()
                product += (part * decoded).sum()
    assert one.error == pytest.approx((lost / true) ** 0.5, rel=1e-3)
    assert one.cosine == pytest.approx(product / (true * sent) ** 0.5, rel=1e-6)


def test_feedback_makes_the_sum_right_and_a_single_round_no_better() -> None:
    with_ef, without = measured("onebit"), measured("onebit:ef=false")
    assert with_ef.error == without.error > 0.5
    assert with_ef.total_error < 0.7 * without.total_error


def test_the_sum_runs_over_the_steps_again_until_there_are_enough() -> None:
    one = gradients(steps=1)
    short = measured("onebit", one)
    assert short.rounds == MIN_ROUNDS
    repeated = measured("onebit", Gradients(PARAMS, list(one.steps) * MIN_ROUNDS))
    assert short.total_error == repeated.total_error
    assert measured("onebit", gradients(steps=9)).rounds == 9


def test_times_are_those_of_encoding_and_of_decoding() -> None:
    times = iter([0.0, 0, 0] + [v for r in range(8) for v in (10 * r, 10 * r + 1 + r, 10 * r + 9)])
    one = measure(
        Gradients(PARAMS, gradients().steps[:1]),
        Compression.parse("none"),
        NumpyRunner(),
        bucket_bytes=4096,
        min_bytes=0,
        clock=lambda: next(times),
    )
    assert one.encode_s == 3.5, "the median of 1, 2, 3, 4, 5, 6"
    assert one.decode_s == 5.5


def test_small_parameters_travel_as_they_are() -> None:
    assert measured("int8", min_bytes=100).nbytes == measured("int8; b=none").nbytes
    assert measured("int8", min_bytes=10_000).error == 0.0


def test_bytes_are_those_of_the_parameters_own_dtype() -> None:
    halves = tuple(Param(p.name, p.shape, "bfloat16") for p in PARAMS)
    half = measured("none", Gradients(halves, gradients().steps))
    assert half.nbytes == 4096
    assert half.error == 0.0


def test_every_piece_of_every_round_has_a_seed_of_its_own() -> None:
    runner = NumpyRunner()
    measure(gradients(), Compression(), runner, bucket_bytes=4096, min_bytes=0)
    fed = runner.seeds[len(runner.seeds) // 2 :]
    assert len(set(fed)) == len(fed)


def test_gradients_that_are_zero_have_no_error() -> None:
    zeros = [np.zeros(param.numel, np.float32) for param in PARAMS]
    one = measured("int8", Gradients(PARAMS, [zeros]))
    assert (one.error, one.cosine, one.total_error, one.total_cosine) == (0.0, 1.0, 0.0, 1.0)


def test_gradients_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LayoutError, match="run backward first"):
        Gradients(PARAMS, [])
    with pytest.raises(LayoutError, match="shapes of the parameters"):
        Gradients(PARAMS, [[np.zeros(2000, np.float32)]])
