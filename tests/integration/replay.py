"""What workers with codecs are compared with: pieces encoded here, with what they lost before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from zps import native
from zps.codec.plan import CODEC
from zps.codec.spec import Compression
from zps.core.layout import Layout

Tensors = Mapping[str, torch.Tensor]


class Replay:
    """One rank's gradients, as its hub decodes them.

    min_bytes  smaller parameters are sent as they are
    Codecs whose choices are random are not for it: their seeds are the worker's own.
    """

    def __init__(self, layout: Layout, compression: str, min_bytes: int = 0):
        self._layout = layout
        self._encodings: dict[int, native.Encoding] = {}
        self._lost: dict[int, np.ndarray] = {}  # piece -> float32, of `_scale`'s unit
        self._scale: dict[int, float] = {}
        codecs = Compression.parse(compression)
        for number, piece in enumerate(layout.pieces):
            param = layout.params[piece.param]
            codec = codecs.codec_of(param.name)
            if param.nbytes < min_bytes or not piece.count or codec.name == "none":
                continue
            facts = np.array([codec.facts()], CODEC)[0]
            dtype = native.DTYPE[param.dtype]
            self._encodings[number] = native.Encoding(facts, piece.count, dtype)
            if codec.feedback:
                self._lost[number] = np.zeros(piece.count, np.float32)

    def send(
        self, grads: Tensors, *, scale: float = 1.0, keep: bool = True
    ) -> dict[str, torch.Tensor]:
        """The gradients as they are decoded, in float32; absent ones are absent there too.

        scale  what the loss was multiplied by
        keep   False: they came to nothing, and what was lost before stays
        """
        found = {}
        for index, param in enumerate(self._layout.params):
            if param.name not in grads:
                continue
            flat = grads[param.name].reshape(-1).contiguous()
            parts = [torch.zeros(0)]
            for number in self._layout.pieces_of(index):
                piece = self._layout.pieces[number]
                part = flat[piece.param_begin : piece.param_begin + piece.count]
                parts.append(self._piece(number, part, scale, keep))
            found[param.name] = torch.cat(parts).reshape(param.shape)
        return found

    def _piece(self, number: int, part: torch.Tensor, scale: float, keep: bool) -> torch.Tensor:
        encoding = self._encodings.get(number)
        if encoding is None:
            return part.float()
        coded = np.zeros(encoding.nbytes // 8 + 1, np.uint64)
        lost, rest = self._lost.get(number), np.zeros(part.numel(), np.float32)
        encoding.encode(
            part.data_ptr(),
            coded.ctypes.data,
            residual_in_ptr=0 if lost is None else lost.ctypes.data,
            residual_out_ptr=0 if lost is None else rest.ctypes.data,
            residual_factor=scale / self._scale.get(number, scale),
        )
        if keep and lost is not None:
            self._lost[number], self._scale[number] = rest, scale
        decoded = torch.zeros(part.numel())
        encoding.decode(coded.ctypes.data, decoded.data_ptr(), dtype=native.DTYPE["float32"])
        return decoded


def total(decoded: Sequence[Tensors]) -> dict[str, torch.Tensor]:
    """The sum of every rank's gradients, added in rank order."""
    names = dict.fromkeys(name for grads in decoded for name in grads)
    sums = {}
    for name in names:
        there = [grads[name] for grads in decoded if name in grads]
        sums[name] = sum(there[1:], there[0])
    return sums
