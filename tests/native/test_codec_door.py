"""What an Encoding refuses, and a job with codecs."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.codecs import codec
from zps import native

FLOAT32 = native.DTYPE["float32"]
MEMORY = np.zeros(4096, np.float64)
AT = MEMORY.ctypes.data


@pytest.mark.parametrize(
    ("record", "n", "dtype", "text"),
    [
        (codec("int8", block=8), 10, 0, "power of two"),
        (codec("int8", block=100), 10, 0, "power of two"),
        (codec("int8", block=8192), 10, 0, "power of two"),
        (codec("int8", block=0), 10, 0, "power of two"),
        (codec("topk", ratio=0.0), 10, 0, "ratio"),
        (codec("topk", ratio=1.5), 10, 0, "ratio"),
        (codec("randk", ratio=float("nan")), 10, 0, "ratio"),
        (codec("topk"), 2**32, 0, "2\\*\\*32"),
        (np.array([(10, 256, 0, 0, 0.1)], native.CODEC)[0], 10, 0, "no codec"),
        (codec("int8"), -1, 0, "elements"),
        (codec("int8"), 2**60, 0, "elements"),
        (codec("int8"), 10, 3, "dtype 3"),
    ],
)
def test_a_codec_that_cannot_be_is_not_made(record, n, dtype, text):
    with pytest.raises(ValueError, match=text):
        native.Encoding(record, n, dtype)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"grad_ptr": 0}, "grad_ptr"),
        ({"grad_ptr": AT + 2}, "grad_ptr"),
        ({"out_ptr": AT + 4}, "out_ptr"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"residual_in_ptr": AT}, "residual_out_ptr"),
        ({"residual_out_ptr": AT + 1}, "residual_out_ptr"),
        ({"residual_in_ptr": AT, "residual_out_ptr": AT}, "overlap"),
        ({"residual_in_ptr": AT, "residual_out_ptr": AT + 396}, "overlap"),
        ({"isa": "avx9"}, "avx9"),
    ],
)
def test_an_encoding_that_would_touch_the_wrong_memory_is_refused(changes, text):
    encoding = native.Encoding(codec("int8"), 100, FLOAT32)
    with pytest.raises(ValueError, match=text):
        encoding.encode(**{"grad_ptr": AT, "out_ptr": AT + 8192, **changes})


def test_residuals_belong_to_codecs_with_feedback():
    encoding = native.Encoding(codec("int8", flags=0), 100, FLOAT32)
    with pytest.raises(ValueError, match="FEEDBACK"):
        encoding.encode(AT, AT + 8192, residual_out_ptr=AT + 16384)


def test_a_delta_of_what_is_not_coded_is_refused():
    encoding = native.Encoding(codec("none"), 100, FLOAT32)
    with pytest.raises(ValueError, match="no delta"):
        encoding.encode_delta(AT, AT, AT)
    with pytest.raises(ValueError, match="own dtype"):
        encoding.decode(AT, AT, dtype=native.DTYPE["float16"])


@pytest.mark.parametrize(
    ("codecs", "encoded", "text"),
    [
        (np.array([codec("int8")]), None, "encoded"),
        (None, np.zeros(1, np.uint64), "codecs"),
        (np.array([codec("int8")] * 2), np.zeros(1, np.uint64), "codecs"),
        (np.array([codec("int8")]), np.zeros(1, np.int64), "encoded"),
        (np.array([codec("none")]), np.array([2], np.uint64), "multiple of 4"),
        (np.array([codec("int8", block=3)]), np.zeros(1, np.uint64), "power of two"),
    ],
)
def test_a_job_with_codecs_that_cannot_be_right_is_not_made(codecs, encoded, text):
    with pytest.raises(ValueError, match=text):
        native.Job(
            rule=native.RULES["mean"].kernel,
            segments=np.array([(0, 64, 0, 0)], native.SEGMENT),
            grad_dtype=FLOAT32,
            weights_ptr=AT,
            master_ptr=AT,
            codecs=codecs,
            encoded=encoded,
        )
