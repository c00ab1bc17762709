"""A model spread over several hubs: which hub owns which part, and as what layout.

Every worker computes this by itself, from the layout that one hub would have, and all come to the
same. A hub is handed a layout of its own, an ordinary one, and does not know of the others.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zps.core.layout import ALIGN_BYTES, ITEMSIZE, Layout, Param, Piece
from zps.errors import LayoutError

__all__ = ["Part", "Shard", "cut", "whole_of"]

_PART = re.compile(r"\[\d+:\d+/(\d+)\]$")


@dataclass(frozen=True, slots=True)
class Part:
    """What a parameter of a shard is in the whole model: `count` elements from `begin` on."""

    param: int
    """Index into the whole layout's parameters."""
    begin: int
    count: int


@dataclass(frozen=True, slots=True)
class Shard:
    """What one hub owns of a model with `total` parameters.

    parts  for each parameter of `layout`, what it is in the whole
    """

    layout: Layout
    parts: tuple[Part, ...]
    total: int


def cut(layout: Layout, hubs: int) -> tuple[Shard, ...]:
    """Spread a layout over `hubs` hubs, so that no two differ by more than one bucket in bytes.

    The units are the layout's pieces: whole parameters, and pieces of `bucket_bytes` of larger
    ones. The longest goes first, each to the hub that has the least so far, the lowest of equals.
    In its hub's layout a parameter that lies there in full keeps its name and shape; a part of
    one is a parameter `name[begin:end/elements]` with one dimension. Each hub has the parameters
    in the order of the whole layout; the first has the extras.

    With one hub, its layout is `layout` itself.
    Raises LayoutError if there are more hubs than pieces: a hub without any would have no rounds.
    Source: Graham, Bounds on Multiprocessing Timing Anomalies, section 3 (longest first).
    """
    total = len(layout.params)
    if hubs == 1:
        whole = (Part(i, 0, param.numel) for i, param in enumerate(layout.params))
        return (Shard(layout, tuple(whole), total),)
    if len(layout.pieces) < hubs:
        smaller = ", or cut it into smaller ones with ZPS_BUCKET_BYTES" if layout.split else ""
        raise LayoutError(
            f"{hubs} hubs for a model that can be cut into {len(layout.pieces)} parts: name fewer "
            f"hubs{smaller}"
        )
    owners = _assign([_nbytes(layout, piece) for piece in layout.pieces], hubs)
    owned: list[list[Part]] = [[] for _ in range(hubs)]
    for piece, owner in zip(layout.pieces, owners, strict=True):
        _append(owned[owner], Part(piece.param, piece.param_begin, piece.count))
    return tuple(
        Shard(_layout_of(layout, parts, first=hub == 0), tuple(parts), total)
        for hub, parts in enumerate(owned)
    )


def _assign(sizes: Sequence[int], hubs: int) -> list[int]:
    """The hub of each piece."""
    owners = [0] * len(sizes)
    loads = [(0, hub) for hub in range(hubs)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, hub = heapq.heappop(loads)
        owners[index] = hub
        heapq.heappush(loads, (load + sizes[index], hub))
    return owners


def _nbytes(layout: Layout, piece: Piece) -> int:
    """What a piece takes in an arena; one without elements takes something too."""
    size = ITEMSIZE[layout.params[piece.param].dtype] * piece.count
    return max(ALIGN_BYTES, -(-size // ALIGN_BYTES) * ALIGN_BYTES)


def _append(parts: list[Part], part: Part) -> None:
    """Add a part behind the others; one that follows the last without a gap makes that longer."""
    last = parts[-1] if parts else None
    if last is not None and (last.param, last.begin + last.count) == (part.param, part.begin):
        parts[-1] = Part(last.param, last.begin, last.count + part.count)
    else:
        parts.append(part)


def _layout_of(whole: Layout, parts: Sequence[Part], *, first: bool) -> Layout:
    return Layout.build(
        list(_params(whole, parts)),
        whole.extras if first else (),
        bucket_bytes=whole.bucket_bytes,
        split=whole.split,
        fuse=whole.fuse,
    )


def _params(whole: Layout, parts: Sequence[Part]) -> Iterator[Param]:
    for part in parts:
        param = whole.params[part.param]
        if part.count == param.numel:
            yield param
        else:
            place = f"{part.begin}:{part.begin + part.count}/{param.numel}"  # see whole_of
            yield Param(f"{param.name}[{place}]", (part.count,), param.dtype)


def whole_of(param: Param) -> tuple[str, int]:
    """Name and bytes of the parameter that a shard's parameter is, or is a part of."""
    part = _PART.search(param.name)
    if part is None:
        return param.name, param.nbytes
    return param.name[: part.start()], ITEMSIZE[param.dtype] * int(part[1])
