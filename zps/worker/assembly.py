"""What a worker has declared, put together from its hubs.

A parameter that one hub has in full is that hub's memory. One that is spread over several has a
slot and weights of its own here, and is copied to and from its parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from zps.core.layout import Layout
from zps.core.shards import Part
from zps.worker.channel import Channel

Selection = tuple[NDArray[np.uint32], ...]
"""Buckets of each hub, ascending, one array a hub."""


class _Copy(NamedTuple):
    """A part of a spread parameter: this worker's memory, and the hub's."""

    own: torch.Tensor
    theirs: torch.Tensor


class Assembly:
    """The parameters of all hubs, by their index in the whole layout.

    slots    where each gradient is laid
    weights  each parameter as it was last seen
    """

    def __init__(self, layout: Layout, channels: Sequence[Channel]):
        self.layout = layout
        self.channels = tuple(channels)
        self._places: list[list[tuple[Channel, int, Part]]] = [[] for _ in layout.params]
        for channel in channels:
            for index, part in enumerate(channel.parts):
                self._places[part.param].append((channel, index, part))
        self.slots: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        self._outgoing: dict[Channel, dict[int, list[_Copy]]] = {c: {} for c in channels}
        self._incoming: dict[int, list[_Copy]] = {}
        for index, places in enumerate(self._places):
            if len(places) == 1:
                channel, local, _ = places[0]
                self.slots.append(channel.slots[local])
                self.weights.append(channel.weights[local])
            else:
                self._spread(index)

    # --- what lies where ----------------------------------------------------------------------

    @property
    def every(self) -> Selection:
        """All buckets."""
        return tuple(np.arange(len(c.layout.buckets), dtype=np.uint32) for c in self.channels)

    def buckets_of(self, params: Iterable[int]) -> Selection:
        """The buckets in which these parameters lie."""
        chosen: dict[Channel, list[int]] = {channel: [] for channel in self.channels}
        for index in params:
            for channel, local, _ in self._places[index]:
                chosen[channel].append(local)
        return tuple(channel.buckets_of(indices) for channel, indices in chosen.items())

    def times_updated(self, index: int) -> int:
        """How often the hubs have updated a parameter; may change at any time."""
        channel, local, _ = self._places[index][0]
        return channel.times_updated(local)

    # --- copies -------------------------------------------------------------------------------

    def hand_over(self, selection: Selection) -> None:
        """Bring what lies in the slots of spread parameters to the slots of these buckets."""
        for channel, buckets in zip(self.channels, selection, strict=True):
            outgoing = self._outgoing[channel]
            if outgoing:
                for bucket in outgoing.keys() & set(buckets.tolist()):
                    for own, theirs in outgoing[bucket]:
                        theirs.copy_(own)

    def gather(self, params: Iterable[int] | None = None) -> None:
        """Put the weights of spread parameters together from their parts; None: of all."""
        if not self._incoming:
            return
        for index in self._incoming if params is None else params:
            for own, theirs in self._incoming.get(index, ()):
                own.copy_(theirs)

    def write(self, index: int, value: torch.Tensor, channels: Sequence[Channel]) -> None:
        """Write a parameter's values where the hubs publish them, at those of `channels`."""
        for channel, local, part in self._places[index]:
            if channel not in channels:
                continue
            arena = channel.published(local)
            whole = part.count == value.numel()
            source = value.detach() if whole else _flat(value.detach(), part)
            if arena.data_ptr() != source.data_ptr():
                arena.copy_(source)

    def close(self) -> None:
        """Let go of the hubs' memory."""
        self.slots, self.weights = [], []
        self._outgoing.clear()
        self._incoming.clear()
        for channel in self.channels:
            channel.close()

    # --- parts --------------------------------------------------------------------------------

    def _spread(self, index: int) -> None:
        param = self.layout.params[index]
        dtype: torch.dtype = getattr(torch, param.dtype)
        slot, weights = torch.zeros(param.shape, dtype=dtype), torch.zeros(param.shape, dtype=dtype)
        self.slots.append(slot)
        self.weights.append(weights)
        self._incoming[index] = []
        for channel, local, part in self._places[index]:
            copy = _Copy(_flat(weights, part), channel.weights[local])
            self._incoming[index].append(copy)
            for bucket, begin, count in _in_buckets(channel.layout, local):
                piece = Part(index, part.begin + begin, count)
                out = _Copy(_flat(slot, piece), channel.slots[local][begin : begin + count])
                self._outgoing[channel].setdefault(bucket, []).append(out)


def _in_buckets(layout: Layout, param: int) -> Iterator[tuple[int, int, int]]:
    """(bucket, first element, count) of each piece of a parameter."""
    for piece in (layout.pieces[i] for i in layout.pieces_of(param)):
        yield piece.bucket, piece.param_begin, piece.count


def _flat(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """The elements of a part, in the order that they have in memory."""
    return tensor.reshape(-1)[part.begin : part.begin + part.count]
