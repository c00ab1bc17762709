"""What a worker has declared, put together from its hubs.

A parameter that one hub has in full is that hub's memory. One that is spread over several has
weights of its own here, put together from its parts. A gradient goes from wherever it is into the
slots of its hubs; only one that a loop writes in place, and that is spread or encoded, is kept here
before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from zps.core.layout import Layout, Param
from zps.core.shards import Part
from zps.worker.channel import Channel
from zps.worker.gradients import copy, inspect

Selection = tuple[NDArray[np.uint32], ...]
"""Buckets of each hub, ascending, one array a hub."""


class _Copy(NamedTuple):
    """A part of a spread parameter: this worker's memory, and the hub's."""

    own: torch.Tensor
    theirs: torch.Tensor


class Assembly:
    """The parameters of all hubs, by their index in the whole layout.

    weights  each parameter as it was last seen
    """

    def __init__(self, layout: Layout, channels: Sequence[Channel]):
        self.layout = layout
        self.channels = tuple(channels)
        self._places: list[list[tuple[Channel, int, Part]]] = [[] for _ in layout.params]
        for channel in channels:
            for index, part in enumerate(channel.parts):
                self._places[part.param].append((channel, index, part))
        self.weights: list[torch.Tensor] = []
        self._slots: list[torch.Tensor | None] = []
        self._staged: dict[int, torch.Tensor] = {}
        self._incoming: dict[int, list[_Copy]] = {}
        for index, places in enumerate(self._places):
            if len(places) == 1:
                channel, local, _ = places[0]
                self._slots.append(channel.slot(local))
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

    def slot(self, index: int) -> torch.Tensor:
        """A tensor to write a parameter's gradient to: its hub's slot, or one that is kept here."""
        slot = self._slots[index]
        if slot is None:
            slot = self._staged.get(index)
        if slot is None:
            param = self.layout.params[index]
            slot = self._staged[index] = torch.zeros(param.shape, dtype=_dtype(param))
        return slot

    def load(self, index: int, gradient: torch.Tensor, scale: float = 1.0) -> bool:
        """Bring a gradient into the slots of its hubs; whether it is finite.

        gradient  of the parameter's shape and dtype, anywhere
        scale     what the loss was multiplied by; only what is encoded needs it
        """
        source = gradient.detach().cpu().contiguous()
        slot = self._slots[index]
        if slot is not None:
            return copy(source, slot)
        staged = self._staged.get(index)
        if staged is not None and staged is not gradient:
            staged.copy_(source)  # a slot holds what was pushed last, however it came there
        parts = [
            self._load_part(channel, local, _flat(source, part), scale)
            for channel, local, part in self._places[index]
        ]
        return all(parts)

    def load_in_place(self, index: int, *, look: bool) -> bool:
        """The same for what was written to `slot`. Without `look` some may be taken for finite."""
        slot = self._slots[index]
        if slot is None:
            return self.load(index, self.slot(index))
        return not look or inspect(slot)

    def clear(self, index: int) -> None:
        """Lay a gradient of zeros."""
        for channel, local, _ in self._places[index]:
            channel.encoder.clear(local)

    def is_coded(self, index: int) -> bool:
        """Whether a parameter's gradient is encoded."""
        return any(channel.encoder.is_coded(local) for channel, local, _ in self._places[index])

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
        self.weights = []
        self._slots.clear()
        self._incoming.clear()
        for channel in self.channels:
            channel.close()

    # --- parts --------------------------------------------------------------------------------

    def _spread(self, index: int) -> None:
        param = self.layout.params[index]
        weights = torch.zeros(param.shape, dtype=_dtype(param))
        self._slots.append(None)
        self.weights.append(weights)
        self._incoming[index] = [
            _Copy(_flat(weights, part), channel.weights[local])
            for channel, local, part in self._places[index]
        ]

    def _load_part(self, channel: Channel, local: int, source: torch.Tensor, scale: float) -> bool:
        slot = channel.slot(local)
        if slot is not None:
            return copy(source, slot)
        return channel.encoder.encode(local, source, scale)


def _dtype(param: Param) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, param.dtype)
    return dtype


def _flat(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """The elements of a part, in the order that they have in memory."""
    return tensor.reshape(-1)[part.begin : part.begin + part.count]
