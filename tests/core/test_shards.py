"""How a model is spread over hubs: all of it, evenly, and the same on every worker."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.core.test_layout import floats, layouts
from zps.core.layout import Layout, Param
from zps.core.shards import Part, cut
from zps.errors import LayoutError

F32, BF16 = "float32", "bfloat16"


def build(*params: Param, **options: bool) -> Layout:
    return Layout.build(params, [Param("mean", (3,), F32)], bucket_bytes=4096, **options)


def names(layout: Layout) -> list[str]:
    return [param.name for param in layout.params]


def test_with_one_hub_its_layout_is_the_models() -> None:
    layout = build(*floats(5, 3000))
    (shard,) = cut(layout, 1)
    assert shard.layout is layout
    assert shard.parts == (Part(0, 0, 5), Part(1, 0, 3000))


@given(layouts(), st.integers(2, 5))
def test_every_element_belongs_to_one_hub(layout: Layout, hubs: int) -> None:
    assume(len(layout.pieces) >= hubs)
    shards = cut(layout, hubs)
    for index, param in enumerate(layout.params):
        parts = sorted(
            (part for shard in shards for part in shard.parts if part.param == index),
            key=lambda part: part.begin,
        )
        done = 0
        for part in parts:
            assert part.begin == done
            done += part.count
        assert done == param.numel
        assert parts


@given(layouts(), st.integers(2, 5))
def test_a_hubs_layout_is_what_its_parts_say(layout: Layout, hubs: int) -> None:
    assume(len(layout.pieces) >= hubs)
    for shard in cut(layout, hubs):
        assert len(shard.layout.params) == len(shard.parts) >= 1
        assert list(shard.parts) == sorted(shard.parts, key=lambda p: (p.param, p.begin))
        for param, part in zip(shard.layout.params, shard.parts, strict=True):
            whole = layout.params[part.param]
            assert (param.numel, param.dtype) == (part.count, whole.dtype)
            if part.count == whole.numel:
                assert param == whole
        assert shard.layout.bucket_bytes == layout.bucket_bytes
        assert (shard.layout.split, shard.layout.fuse) == (layout.split, layout.fuse)
    assert [len(shard.layout.extras) for shard in cut(layout, hubs)][1:] == [0] * (hubs - 1)


@given(layouts(), st.integers(2, 5))
def test_hubs_differ_by_one_piece_at_most(layout: Layout, hubs: int) -> None:
    assume(len(layout.pieces) >= hubs)

    def padded(count: int, dtype: str) -> int:
        size = 4 if dtype == F32 else 2
        return max(64, -(-count * size // 64) * 64)

    sizes = [padded(p.count, layout.params[p.param].dtype) for p in layout.pieces]
    loads = [
        sum(padded(p.count, s.layout.params[p.param].dtype) for p in s.layout.pieces)
        for s in cut(layout, hubs)
    ]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes)
    if layout.split:
        assert max(loads) - min(loads) <= layout.bucket_bytes


@given(layouts(), st.integers(2, 5))
def test_every_worker_comes_to_the_same(layout: Layout, hubs: int) -> None:
    assume(len(layout.pieces) >= hubs)
    again = Layout.from_wire(layout.to_wire())
    assert [s.layout.hash for s in cut(layout, hubs)] == [s.layout.hash for s in cut(again, hubs)]


def test_a_large_tensor_is_cut_where_one_hub_would_cut_it() -> None:
    first, second = cut(build(Param("fc", (3, 1000), F32)), 2)
    assert names(first.layout) == ["fc[0:1024/3000]", "fc[2048:3000/3000]"]
    assert names(second.layout) == ["fc[1024:2048/3000]"]
    assert [param.shape for param in first.layout.params] == [(1024,), (952,)]
    assert first.parts == (Part(0, 0, 1024), Part(0, 2048, 952))
    assert [name.name for name in first.layout.extras] == ["mean"]


def test_pieces_of_one_tensor_that_follow_one_another_are_one_part() -> None:
    first, second = cut(build(*floats(1024, 1124, 900)), 2)
    assert (names(first.layout), names(second.layout)) == (["p0", "p2"], ["p1"])
    assert len(second.layout.pieces) == 2


def test_a_rule_that_sees_whole_tensors_is_given_whole_tensors() -> None:
    shards = cut(build(*floats(9000, 10, 5000, 10), split=False), 2)
    assert [names(shard.layout) for shard in shards] == [["p0"], ["p1", "p2", "p3"]]
    assert [param.numel for shard in shards for param in shard.layout.params] == [
        9000, 10, 5000, 10,
    ]  # fmt: skip


def test_more_hubs_than_parts_are_refused() -> None:
    with pytest.raises(LayoutError, match="3 hubs for a model that can be cut into 2 parts"):
        cut(build(*floats(5, 5)), 3)
    with pytest.raises(LayoutError, match="name fewer hubs$"):  # smaller buckets would not help
        cut(build(*floats(5000), split=False), 2)
