"""Offsets of encoded pieces, for any layout and any compression."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.codec.test_codecs import any_codec
from tests.core.test_layout import layouts
from zps.codec.none import Plain
from zps.codec.plan import CODEC, Plan
from zps.codec.spec import Compression
from zps.core.layout import DTYPES, ITEMSIZE, Layout, Param

F32, BF16, F16 = DTYPES


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    layout = draw(layouts())
    patterns = st.sampled_from(["*", "p[0-4]", "p1*", "p?", *(p.name for p in layout.params)])
    rules = draw(st.lists(st.tuples(patterns, any_codec()), max_size=4))
    compression = Compression(draw(any_codec()), tuple(rules))
    return Plan.build(layout, compression, draw(st.integers(0, 200)))


@given(plans())
def test_pieces_are_aligned_and_do_not_overlap(plan: Plan) -> None:
    for bucket in plan.layout.buckets:
        end = 0
        for piece in bucket.pieces:
            assert plan.piece_offset[piece] % 64 == 0
            assert plan.piece_offset[piece] >= end
            end = plan.piece_offset[piece] + plan.piece_nbytes[piece]
        assert end <= plan.bucket_nbytes[bucket.index]


@given(plans())
def test_buckets_follow_one_another_without_a_gap(plan: Plan) -> None:
    end = 0
    for offset, nbytes in zip(plan.bucket_offset, plan.bucket_nbytes, strict=True):
        assert offset == end
        assert nbytes > 0
        assert nbytes % 64 == 0
        end += nbytes
    assert plan.total_bytes == end
    assert plan.saved_bytes == plan.layout.arena_bytes - end


@given(plans())
def test_a_piece_has_the_codec_and_the_size_of_its_parameter(plan: Plan) -> None:
    sizes = [0] * len(plan.layout.params)
    for index, piece in enumerate(plan.layout.pieces):
        codec = plan.codecs[plan.codec_index[index]]
        itemsize = ITEMSIZE[plan.layout.params[piece.param].dtype]
        assert codec == plan.codec_of_param(piece.param)
        assert plan.piece_nbytes[index] == codec.nbytes(piece.count, itemsize)
        sizes[piece.param] += int(plan.piece_nbytes[index])
    assert [plan.param_nbytes(i) for i in range(len(sizes))] == sizes


@given(plans())
def test_the_table_for_kernels_says_the_same(plan: Plan) -> None:
    assert len(set(plan.codecs)) == len(plan.codecs)
    assert [tuple(row) for row in plan.table.tolist()] == [c.facts() for c in plan.codecs]
    assert set(plan.codec_index.tolist()) == set(range(len(plan.codecs)))


@given(plans())
def test_a_bucket_of_plain_pieces_is_the_layouts_own(plan: Plan) -> None:
    for bucket in plan.layout.buckets:
        if any(plan.codecs[plan.codec_index[piece]] != Plain() for piece in bucket.pieces):
            continue
        assert plan.bucket_nbytes[bucket.index] == bucket.nbytes
        for piece in bucket.pieces:
            assert plan.piece_offset[piece] == plan.layout.pieces[piece].byte - bucket.byte


@given(layouts())
def test_without_compression_every_offset_is_the_layouts(layout: Layout) -> None:
    plan = Plan.build(layout, Compression())
    assert plan.identity
    assert plan.total_bytes == layout.arena_bytes
    assert plan.saved_bytes == plan.residual_elements == 0
    assert plan.bucket_offset.tolist() == [bucket.byte for bucket in layout.buckets]
    assert plan.bucket_nbytes.tolist() == [bucket.nbytes for bucket in layout.buckets]


@given(plans())
def test_residuals_lie_flat_aligned_and_apart(plan: Plan) -> None:
    end = 0
    for index, piece in enumerate(plan.layout.pieces):
        where = plan.residual_range(index)
        assert (where is None) == (not plan.codecs[plan.codec_index[index]].feedback)
        if where is not None:
            assert where.start >= end
            assert where.start % 16 == 0
            assert where.stop - where.start == piece.count
            end = where.stop
    assert end <= plan.residual_elements <= end + 15


def test_parameters_of_few_bytes_travel_as_they_are() -> None:
    params = [Param("small", (511,), F32), Param("large", (512,), F32), Param("half", (1000,), F16)]
    layout = Layout.build(params, bucket_bytes=1 << 20)
    plan = Plan.build(layout, Compression.parse("int8"), min_bytes=2048)
    assert [plan.codec_of_param(i).name for i in range(3)] == ["none", "int8", "none"]
    assert not plan.identity
    assert Plan.build(layout, Compression.parse("int8"), min_bytes=2049).identity


def test_the_whole_parameter_counts_not_its_pieces() -> None:
    layout = Layout.build([Param("w", (100,), F32)], bucket_bytes=64)
    assert len(layout.pieces) == 7
    plan = Plan.build(layout, Compression.parse("int8:block=16"), min_bytes=400)
    assert set(plan.codec_index.tolist()) == {0}
    assert plan.piece_nbytes.tolist() == [20] * 6 + [8]
    assert plan.bucket_nbytes.tolist() == [64] * 7


def test_a_mixed_bucket_is_packed_by_hand() -> None:
    params = [Param("a", (100,), F32), Param("b", (10,), F32), Param("c", (33,), F32)]
    layout = Layout.build(params, bucket_bytes=1 << 20)
    plan = Plan.build(layout, Compression.parse("int4; b=none; c=bf16"))
    assert plan.piece_nbytes.tolist() == [58, 40, 66]  # 2 scales and 50 bytes; 10 x 4; 33 x 2
    assert plan.piece_offset.tolist() == [0, 64, 128]
    assert plan.bucket_nbytes.tolist() == [256]
    assert plan.residual_begin.tolist() == [0, -1, -1]
    assert plan.residual_elements == 112
    assert plan.saved_bytes == layout.arena_bytes - 256


def test_arrays_cannot_be_written() -> None:
    plan = Plan.build(Layout.build([Param("w", (9,), F32)], bucket_bytes=64), Compression())
    assert plan.table.dtype == CODEC
    for array in (plan.table, plan.codec_index, plan.piece_offset, plan.bucket_offset):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_a_model_without_parameters_has_a_plan() -> None:
    plan = Plan.build(Layout.build([], bucket_bytes=64), Compression.parse("int8"))
    assert (plan.total_bytes, plan.codecs, plan.identity) == (0, (), True)
