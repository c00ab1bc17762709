"""Where parameters lie, whatever their shapes, dtypes and bucket size."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zps.core.layout import DTYPES, ITEMSIZE, MAX_BUCKETS, Layout, Param
from zps.errors import DuplicateName, LayoutError, ProtocolError, TensorMismatch

F32, BF16, F16 = DTYPES


def floats(*sizes: int, dtype: str = F32) -> list[Param]:
    return [Param(f"p{i}", (n,), dtype) for i, n in enumerate(sizes)]


def sizes_of(layout: Layout) -> list[list[int]]:
    """Elements of each piece, bucket by bucket."""
    return [[layout.pieces[i].count for i in bucket.pieces] for bucket in layout.buckets]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shape = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    long = st.integers(0, 700).map(lambda n: (n,))
    params = draw(st.lists(st.tuples(shape | long, st.sampled_from(DTYPES)), max_size=12))
    extras = draw(st.lists(st.tuples(shape, st.sampled_from(sorted(ITEMSIZE))), max_size=4))
    return Layout.build(
        [Param(f"p{i}", *p) for i, p in enumerate(params)],
        [Param(f"x{i}", *x) for i, x in enumerate(extras)],
        bucket_bytes=64 * draw(st.integers(1, 20)),
        split=draw(st.booleans()),
        fuse=draw(st.booleans()),
    )


@given(layouts())
def test_pieces_cover_each_tensor_exactly_once(layout: Layout) -> None:
    for i, param in enumerate(layout.params):
        done, begin, byte = 0, layout.param_begin(i), layout.param_byte(i)
        for piece in (layout.pieces[j] for j in layout.pieces_of(i)):
            assert (piece.param, piece.param_begin) == (i, done)
            assert piece.begin == begin + done, "no gap in elements"
            assert piece.byte == byte + done * ITEMSIZE[param.dtype], "no gap in bytes"
            done += piece.count
        assert done == param.numel
    assert sum(len(layout.pieces_of(i)) for i in range(len(layout.params))) == len(layout.pieces)


@given(layouts())
def test_nothing_overlaps_and_nothing_leaves_its_region(layout: Layout) -> None:
    flat_end = byte_end = 0
    for piece in layout.pieces:
        assert piece.begin >= flat_end
        assert piece.byte >= byte_end
        flat_end = piece.begin + piece.count
        byte_end = piece.byte + piece.count * ITEMSIZE[layout.params[piece.param].dtype]
    assert flat_end <= layout.flat_elements
    assert byte_end <= layout.arena_bytes
    byte_end = layout.arena_bytes
    for extra, byte in zip(layout.extras, layout.extra_bytes, strict=True):
        assert byte >= byte_end
        byte_end = byte + extra.nbytes
    assert byte_end <= layout.total_bytes


@given(layouts())
def test_everything_is_aligned(layout: Layout) -> None:
    for i in range(len(layout.params)):
        assert layout.param_byte(i) % 64 == 0
        assert layout.param_begin(i) % 32 == 0
    assert all(bucket.byte % 64 == bucket.nbytes % 64 == 0 for bucket in layout.buckets)
    assert all(byte % 64 == 0 for byte in layout.extra_bytes)
    assert layout.flat_elements % 32 == layout.arena_bytes % 64 == layout.total_bytes % 64 == 0


@given(layouts())
def test_a_bucket_holds_one_dtype_and_all_of_its_pieces(layout: Layout) -> None:
    flat_end = byte_end = seen = 0
    for index, bucket in enumerate(layout.buckets):
        size = ITEMSIZE[bucket.dtype]
        assert (bucket.index, bucket.nbytes) == (index, bucket.count * size)
        assert bucket.count > 0
        assert bucket.begin >= flat_end
        assert bucket.byte >= byte_end
        assert bucket.pieces == range(seen, seen + len(bucket.pieces))
        assert len(bucket.pieces) > 0
        for piece in (layout.pieces[i] for i in bucket.pieces):
            assert piece.bucket == index
            assert layout.params[piece.param].dtype == bucket.dtype
            assert piece.byte - bucket.byte == size * (piece.begin - bucket.begin)
            assert bucket.begin <= piece.begin
            assert piece.begin + piece.count <= bucket.begin + bucket.count
        flat_end, byte_end = bucket.begin + bucket.count, bucket.byte + bucket.nbytes
        seen += len(bucket.pieces)
    assert seen == len(layout.pieces)


@given(layouts())
def test_only_an_uncut_tensor_makes_a_bucket_larger_than_asked(layout: Layout) -> None:
    for bucket in layout.buckets:
        if bucket.nbytes > layout.bucket_bytes:
            assert not layout.split
            large = [i for i in bucket.pieces if layout.pieces[i].count]
            assert len(large) == 1
    if not layout.split:
        assert len(layout.pieces) == len(layout.params)


@given(layouts())
def test_a_bucket_ends_only_where_it_must(layout: Layout) -> None:
    for left, right in zip(layout.buckets, layout.buckets[1:], strict=False):
        if left.dtype == right.dtype and layout.fuse:
            first = layout.pieces[right.pieces[0]]
            # Counted from the left bucket's begin, what begins the right one would not have fitted.
            size = ITEMSIZE[right.dtype]
            whole = layout.params[first.param].numel - first.param_begin
            assert (first.begin + whole - left.begin) * size > layout.bucket_bytes


@given(layouts())
def test_a_layout_survives_the_wire(layout: Layout) -> None:
    copy = Layout.from_wire(layout.to_wire())
    assert copy == layout
    assert copy.hash == layout.hash
    assert (copy.pieces, copy.buckets, copy.extra_bytes) == (
        layout.pieces,
        layout.buckets,
        layout.extra_bytes,
    )
    assert (copy.flat_elements, copy.total_bytes) == (layout.flat_elements, layout.total_bytes)


@given(layouts(), layouts())
def test_hashes_are_equal_exactly_when_layouts_are(a: Layout, b: Layout) -> None:
    assert (a.hash == b.hash) == (a == b) == (a.explain_mismatch(b, "rank 1", "rank 0") == "")


def test_small_tensors_share_a_bucket_until_it_is_full() -> None:
    layout = Layout.build(floats(32, 30, 40, 8), bucket_bytes=256)
    assert sizes_of(layout) == [[32, 30], [40], [8]]


def test_a_large_tensor_is_cut_into_whole_buckets_and_a_rest() -> None:
    layout = Layout.build(floats(8, 150, 10), bucket_bytes=256)
    assert sizes_of(layout) == [[8], [64], [64], [22, 10]]


def test_a_large_tensor_has_a_bucket_of_its_own_without_split() -> None:
    layout = Layout.build(floats(8, 150, 10), bucket_bytes=256, split=False)
    assert sizes_of(layout) == [[8], [150], [10]]


def test_a_cut_tensor_stays_in_one_run_when_buckets_end_between_alignments() -> None:
    layout = Layout.build(floats(40, 5), bucket_bytes=64)
    assert [piece.begin for piece in layout.pieces] == [0, 16, 32, 64]
    assert [piece.byte for piece in layout.pieces] == [0, 64, 128, 192]


def test_every_tensor_has_buckets_of_its_own_without_fuse() -> None:
    layout = Layout.build(floats(8, 0, 150, 0, 10), bucket_bytes=256, fuse=False)
    assert sizes_of(layout) == [[8], [0], [64], [64], [22], [0], [10]]


def test_an_exact_fit_is_not_cut() -> None:
    assert sizes_of(Layout.build(floats(64, 64), bucket_bytes=256)) == [[64], [64]]


def test_a_change_of_dtype_begins_a_bucket() -> None:
    params = [Param("a", (4,), BF16), Param("b", (4,), F32), Param("c", (4,), BF16)]
    layout = Layout.build(params, bucket_bytes=4096)
    assert [bucket.dtype for bucket in layout.buckets] == [BF16, F32, BF16]


def test_an_empty_tensor_lies_in_the_current_bucket() -> None:
    layout = Layout.build(floats(4, 0, 4), bucket_bytes=4096)
    assert sizes_of(layout) == [[4, 0, 4]]


def test_a_model_of_empty_tensors_has_a_bucket_with_room() -> None:
    layout = Layout.build(floats(0, 0), bucket_bytes=64)
    assert sizes_of(layout) == [[0, 0]]
    assert layout.buckets[0].nbytes == 64


def test_a_scalar_has_one_element() -> None:
    assert sizes_of(Layout.build([Param("s", (), F32)], bucket_bytes=64)) == [[1]]


def test_a_model_without_parameters_has_no_buckets() -> None:
    layout = Layout.build([], [Param("steps", (), "int64")], bucket_bytes=64)
    assert (layout.buckets, layout.arena_bytes, layout.total_bytes) == ((), 0, 64)


def test_names_are_found() -> None:
    layout = Layout.build(floats(1, 2), [Param("mean", (3,), F32)], bucket_bytes=64)
    assert layout.index == {"p0": 0, "p1": 1}
    assert layout.extra_index == {"mean": 0}


def test_a_name_declared_twice_is_refused() -> None:
    twice = [Param("w", (1,), F32)]
    with pytest.raises(DuplicateName, match="'w'"):
        Layout.build(twice * 2, bucket_bytes=64)
    with pytest.raises(DuplicateName, match="'w'"):
        Layout.build(twice, twice, bucket_bytes=64)


def test_a_dtype_that_cannot_be_trained_is_refused_with_a_way_out() -> None:
    with pytest.raises(TensorMismatch, match=r"'w' has dtype 'float64'.*cast to float32"):
        Layout.build([Param("w", (1,), "float64")], bucket_bytes=64)


@pytest.mark.parametrize("bucket_bytes", [0, -64, 100, 2**48])
def test_an_impossible_bucket_size_is_refused(bucket_bytes: int) -> None:
    with pytest.raises(LayoutError, match="bucket_bytes"):
        Layout.build(floats(1), bucket_bytes=bucket_bytes)


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        ([("fc.w", (10, 84), F32)], [("fc.w", (10, 64), F32)], "(10, 84) on rank 1 but (10, 64)"),
        ([("w", (1,), F32)], [("w", (1,), F16)], "float32 on rank 1 but float16 on rank 0"),
        ([("w", (1,), F32)], [], "'w' of rank 1 is missing on rank 0"),
        ([], [("w", (1,), F32)], "'w' of rank 0 is missing on rank 1"),
        (
            [("a", (1,), F32), ("b", (1,), F32)],
            [("b", (1,), F32), ("a", (1,), F32)],
            "number 0 is 'a' on rank 1 but 'b' on rank 0",
        ),
        (
            [("a", (1,), F32), ("b", (1,), F32)],
            [("a", (1,), F32), ("x", (1,), F32), ("b", (1,), F32)],
            "'x' of rank 0 is missing on rank 1",
        ),
    ],
)
def test_a_mismatch_names_the_first_difference(mine: Any, theirs: Any, said: str) -> None:
    a = Layout.build([Param(*p) for p in mine], bucket_bytes=64)
    b = Layout.build([Param(*p) for p in theirs], bucket_bytes=64)
    text = a.explain_mismatch(b, "rank 1", "rank 0")
    assert said in text
    assert "same model" in text


def test_a_mismatch_of_buffers_or_settings_is_named_too() -> None:
    plain = Layout.build(floats(1), bucket_bytes=64)
    buffered = Layout.build(floats(1), [Param("mean", (), F32)], bucket_bytes=64)
    assert "buffer 'mean' of rank 0 is missing" in plain.explain_mismatch(
        buffered, "rank 1", "rank 0"
    )
    larger = Layout.build(floats(1), bucket_bytes=128)
    assert "bucket_bytes is 64 on rank 1 but 128 on rank 0" in plain.explain_mismatch(
        larger, "rank 1", "rank 0"
    )


GOOD = [64, True, True, [["w", [2, 3], "float32"]], [["n", [], "int64"]]]
HOSTILE: dict[str, Any] = {
    "nothing": None,
    "a map": {},
    "text": "abcd",
    "too short": GOOD[:4],
    "too long": [*GOOD, []],
    "bool for bucket_bytes": [True, *GOOD[1:]],
    "float for bucket_bytes": [64.0, *GOOD[1:]],
    "odd bucket_bytes": [65, *GOOD[1:]],
    "zero bucket_bytes": [0, *GOOD[1:]],
    "endless bucket_bytes": [10**10_000, *GOOD[1:]],
    "int for split": [64, 1, *GOOD[2:]],
    "int for fuse": [64, True, 1, *GOOD[3:]],
    "a map of tensors": [64, True, True, {"w": 1}, []],
    "text for tensors": [64, True, True, "abc", []],
    "a tensor too short": [64, True, True, [["w", [2]]], []],
    "a tensor too long": [64, True, True, [["w", [2], "float32", 0]], []],
    "a tensor of text": [64, True, True, ["abc"], []],
    "bytes for a name": [64, True, True, [[b"w", [2], "float32"]], []],
    "an empty name": [64, True, True, [["", [2], "float32"]], []],
    "an endless name": [64, True, True, [["w" * 10**6, [2], "float32"]], []],
    "a broken name": [64, True, True, [["\ud800", [2], "float32"]], []],
    "int for a shape": [64, True, True, [["w", 2, "float32"]], []],
    "bool in a shape": [64, True, True, [["w", [True], "float32"]], []],
    "float in a shape": [64, True, True, [["w", [2.0], "float32"]], []],
    "negative in a shape": [64, True, True, [["w", [-1], "float32"]], []],
    "two negatives in a shape": [64, True, True, [["w", [-2, -2], "float32"]], []],
    "huge in a shape": [64, True, True, [["w", [2**60], "float32"]], []],
    "huge beside zero": [64, True, True, [["w", [2**60, 0], "float32"]], []],
    "huge product": [64, True, True, [["w", [2**40, 2**40], "float32"]], []],
    "huge power": [64, True, True, [["w", [2**47] * 64, "float32"]], []],
    "too many dimensions": [64, True, True, [["w", [1] * 65, "float32"]], []],
    "huge sum": [2**40, True, True, [[f"w{i}", [2**44], "float32"] for i in range(9)], []],
    "huge extras": [64, True, True, [], [["n", [2**46], "int64"]]],
    "too many buckets": [64, True, True, [["w", [16 * (MAX_BUCKETS + 1)], "float32"]], []],
    "int for a dtype": [64, True, True, [["w", [2], 1]], []],
    "unknown dtype": [64, True, True, [["w", [2], "float31"]], []],
    "untrainable dtype": [64, True, True, [["w", [2], "int64"]], []],
    "unknown dtype of an extra": [64, True, True, [], [["n", [2], "object"]]],
    "a name twice": [64, True, True, [["w", [2], "float32"]] * 2, []],
    "a name in both lists": [64, True, True, [["w", [2], "float32"]], [["w", [2], "float32"]]],
}


@pytest.mark.parametrize("wire", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_layout_is_refused_before_it_costs_memory(wire: Any) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError) as caught:
            Layout.from_wire(wire)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


def _paths(wire: Any) -> list[tuple[int, ...]]:
    if not isinstance(wire, list):
        return [()]
    return [(), *((i, *path) for i, part in enumerate(wire) for path in _paths(part))]


def _replaced(wire: Any, path: tuple[int, ...], value: Any) -> Any:
    if not path:
        return value
    first, *rest = path
    part = _replaced(wire[first], tuple(rest), value)
    return [*wire[:first], part, *wire[first + 1 :]]


@given(st.sampled_from(_paths(GOOD)), json_like)
def test_any_part_may_be_anything_and_only_protocol_errors_come(
    path: tuple[int, ...], value: Any
) -> None:
    try:
        layout = Layout.from_wire(_replaced(GOOD, path, value))
    except ProtocolError:
        return
    assert layout.to_wire() == _replaced(GOOD, path, value)


def test_the_largest_allowed_layout_is_accepted() -> None:
    layout = Layout.from_wire([64, True, True, [["w", [16 * MAX_BUCKETS], "float32"]], []])
    assert len(layout.buckets) == MAX_BUCKETS


@pytest.mark.parametrize("bucket_bytes", [4096, 4 << 20, 1 << 30])
def test_a_large_model_keeps_its_order(bucket_bytes: int) -> None:
    params = [Param(f"layers.{i}.weight", (64, 1 + i % 64), F32) for i in range(10_000)]
    layout = Layout.build(params, bucket_bytes=bucket_bytes)
    assert [layout.pieces[layout.pieces_of(i)[0]].param for i in range(10_000)] == [*range(10_000)]
