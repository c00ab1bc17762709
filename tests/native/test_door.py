"""zps.native refuses what would make the core read or write the wrong memory."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.oracle import Bucket
from zps import native
from zps.optim.registry import rule

ZEROS = np.zeros(64, np.float32)


def job(**changes):
    fields = {
        "rule": native.RULES["sgd"].kernel,
        "segments": np.array([(0, 64, 0, 0)], native.SEGMENT),
        "grad_dtype": native.DTYPE["float32"],
        "weights_ptr": ZEROS.ctypes.data,
        "master_ptr": ZEROS.ctypes.data,
    }
    return native.Job(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rule": 99}, "kernel id 99"),
        ({"grad_dtype": 3}, "grad_dtype"),
        ({"segments": np.zeros(1, np.int64)}, "segments"),
        ({"segments": np.array([(0, 9, 0, 0), (8, 9, 0, 0)], native.SEGMENT)}, "overlap"),
        ({"segments": np.array([(9, 2**64 - 5, 0, 0)], native.SEGMENT)}, "overlap"),
        ({"weights_ptr": 0}, "weights_ptr"),
        ({"weights_ptr": 2, "master_ptr": 2}, "weights_ptr"),
        ({"master_ptr": ZEROS.ctypes.data + 4}, "master_ptr"),
        ({"seq_ptr": 4}, "seq_ptr"),
    ],
)
def test_a_job_that_cannot_be_right_is_not_made(changes, text):
    with pytest.raises(ValueError, match=text):
        job(**changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"slots": []}, "at least one slot"),
        ({"slots": [0]}, "slot"),
        ({"slots": [ZEROS.ctypes.data + 1]}, "slot"),
        ({"scales": [1.0, 2.0]}, "2 scales for 1 slots"),
        ({"divisor": 0.0}, "divisor"),
        ({"divisor": float("nan")}, "divisor"),
        ({"steps": None}, "steps"),
        ({"steps": np.ones(1, np.int32)}, "steps"),
        ({"steps": np.ones(0, np.int64)}, "0 steps"),
        ({"hypers": None}, "hypers"),
        ({"hypers": np.zeros((1, 5))}, "hypers"),
        ({"hypers": np.zeros((0, 6))}, "0 rows of hypers"),
        ({"hypers": np.zeros((6, 1)).T[:, :6]}, None),
        ({"hypers": np.zeros((6, 2)).T}, "hypers"),
        ({"hypers": rule("sgd").pack([{"momentum": 0.9}])}, "no memory"),
        ({"state_ptrs": [2]}, "state"),
        ({"state_ptrs": [0, 0]}, "2 states"),
        ({"base_ptr": 1}, "base_ptr"),
    ],
)
def test_a_round_that_cannot_be_right_is_not_applied(changes, text):
    bucket = Bucket("sgd", ZEROS, [ZEROS], states=[None])
    bucket.job.hypers = rule("sgd").pack([{}])
    for name, value in changes.items():
        setattr(bucket.job, name, value)
    pool = native.Pool(1)
    if text is None:
        native.apply(pool, [bucket.job])
        return
    for call in (native.apply, native.norm_sq):
        with pytest.raises(ValueError, match=text):
            call(pool, [bucket.job])


def test_a_job_is_given_once():
    bucket = Bucket("mean", ZEROS, [ZEROS])
    with pytest.raises(ValueError, match="twice"):
        native.apply(native.Pool(1), [bucket.job, bucket.job])


def test_reduce_needs_an_output_for_each_job():
    bucket = Bucket("mean", ZEROS, [ZEROS])
    with pytest.raises(ValueError, match="0 outputs for 1 jobs"):
        native.reduce(native.Pool(1), [bucket.job], [])
    with pytest.raises(ValueError, match="output"):
        native.reduce(native.Pool(1), [bucket.job], [0])


def test_an_instruction_set_this_cpu_lacks_is_named():
    bucket = Bucket("mean", ZEROS, [ZEROS])
    with pytest.raises(ValueError, match="'avx9'"):
        native.apply(native.Pool(1), [bucket.job], "avx9")


def test_the_best_instruction_set_is_first_and_base_is_last():
    assert native.isa() == native.isas()[0]
    assert native.isas()[-1] == "base"
