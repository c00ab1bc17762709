"""What is added to the next gradient, and what a push that never leaves does to it."""

from __future__ import annotations

import numpy as np
import pytest

from zps.codec.plan import Plan
from zps.codec.residual import Residual
from zps.codec.spec import Compression
from zps.core.layout import Layout, Param
from zps.errors import LayoutError

PARAMS = [
    Param("a", (40,), "float32"),
    Param("plain", (5,), "float32"),
    Param("b", (7,), "float32"),
]


def plan(bucket_bytes: int = 128) -> Plan:
    layout = Layout.build(PARAMS, bucket_bytes=bucket_bytes)
    return Plan.build(layout, Compression.parse("int8; plain=none"))


def lose(residual: Residual, piece: int, value: float) -> None:
    """What an encoder does: write what it lost into the second of the two."""
    views = residual.of(piece)
    assert views is not None
    views[1][:] = value


def held(residual: Residual, piece: int) -> set[float]:
    views = residual.of(piece)
    assert views is not None
    return set(views[0].tolist())


def test_residuals_are_zero_at_first_and_as_long_as_their_pieces() -> None:
    made = plan()
    residual = Residual(made)
    for index, piece in enumerate(made.layout.pieces):
        views = residual.of(index)
        if made.layout.params[piece.param].name == "plain":
            assert views is None
            continue
        assert views is not None
        for view in views:
            assert (view.dtype, view.shape) == (np.dtype(np.float32), (piece.count,))
            assert view.ctypes.data % 64 == 0
            assert not view.any()
    assert residual.nbytes == 2 * 4 * made.residual_elements


def test_what_was_lost_is_added_only_once_the_push_has_left() -> None:
    residual = Residual(plan())
    lose(residual, 0, 3.0)
    assert held(residual, 0) == {0.0}
    residual.commit([0])
    assert held(residual, 0) == {3.0}


def test_a_push_that_never_leaves_changes_nothing() -> None:
    residual = Residual(plan())
    lose(residual, 0, 3.0)
    residual.commit([0])
    for value in (5.0, float("nan")):
        lose(residual, 0, value)
        assert held(residual, 0) == {3.0}
    lose(residual, 0, 7.0)
    residual.commit([0])
    assert held(residual, 0) == {7.0}


def test_buckets_are_committed_one_by_one() -> None:
    made = plan()
    residual = Residual(made)
    first, second = made.layout.pieces_of(0)  # two buckets
    for piece in (first, second):
        lose(residual, piece, 1.0 + piece)
    residual.commit([made.layout.pieces[second].bucket])
    assert (held(residual, first), held(residual, second)) == ({0.0}, {2.0})


def test_an_absent_parameter_keeps_its_residual_and_its_scale() -> None:
    made = plan(bucket_bytes=1024)
    residual = Residual(made)
    a, b = 0, 2
    for piece in (a, b):
        lose(residual, piece, 1.0)
    residual.commit([0], scale=8.0)
    for piece in (a, b):
        lose(residual, piece, 2.0)
    residual.commit([0], scale=2.0, absent=[2])
    assert (held(residual, a), held(residual, b)) == ({2.0}, {1.0})
    assert (residual.factor(a, 2.0), residual.factor(b, 2.0)) == (1.0, 0.25)


def test_a_residual_follows_the_scale_of_the_loss() -> None:
    residual = Residual(plan())
    assert residual.factor(0) == 1.0
    lose(residual, 0, 1.0)
    residual.commit([0], scale=1024.0)
    assert residual.factor(0, 1024.0) == 1.0
    assert residual.factor(0, 512.0) == 0.5
    assert residual.factor(0, 2048.0) == 2.0
    assert residual.factor(0, 512.0) == 0.5, "asking changes nothing"
    residual.commit([0], scale=512.0)
    assert residual.factor(0, 512.0) == 1.0


def test_a_checkpoint_holds_what_would_be_added_whatever_the_buckets() -> None:
    one = Residual(plan(bucket_bytes=128))
    for piece in (0, 1, 3):
        lose(one, piece, float(1 + piece))
    one.commit(range(4), scale=4.0)
    lose(one, 0, 99.0)  # of a push that has not left
    state = one.state()
    assert state.dtype == np.float32
    expected = np.array([1.0] * 32 + [2.0] * 8 + [4.0] * 7) / 4
    np.testing.assert_array_equal(state, expected)

    other = Residual(plan(bucket_bytes=1024))
    other.commit([0], scale=3.0)
    other.load_state(state)
    np.testing.assert_array_equal(other.state(), expected)
    assert other.factor(0, 16.0) == 16.0
    state[:] = -1
    np.testing.assert_array_equal(other.state(), expected)


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    residual = Residual(plan())
    lose(residual, 0, 1.0)
    residual.commit([0])
    before = residual.state()
    for shape in ((46,), (48,), (47, 1), (0,)):
        with pytest.raises(LayoutError, match="47 elements"):
            residual.load_state(np.zeros(shape, np.float32))
    np.testing.assert_array_equal(residual.state(), before)


def test_without_error_feedback_there_is_nothing_to_keep() -> None:
    layout = Layout.build(PARAMS, bucket_bytes=128)
    residual = Residual(Plan.build(layout, Compression.parse("fp16")))
    assert residual.of(0) is None
    assert residual.nbytes == 0
    residual.commit([0, 1])
    assert residual.state().shape == (0,)
    residual.load_state(residual.state())
