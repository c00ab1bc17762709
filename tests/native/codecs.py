"""What every codec should write and read, in a few lines of NumPy each.

The oracles do the same float32 operations in the same order, so results are compared bit for bit;
only stochastic rounding is compared by what it is on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tests.native.oracle import loaded, stored
from zps import native

f32 = np.float32
INDEX_TILE = 4096
TINY = f32(2.0**-100)


def codec(kind, *, block=256, ratio=0.01, flags=native.FEEDBACK):
    """A record of native.CODEC."""
    return np.array([(native.KIND[kind], block, flags, 0, ratio)], native.CODEC)[0]


@dataclass(frozen=True)
class Case:
    kind: str
    block: int = 256
    ratio: float = 0.01
    flags: int = native.FEEDBACK

    @property
    def record(self):
        return codec(self.kind, block=self.block, ratio=self.ratio, flags=self.flags)

    def __str__(self):
        return f"{self.kind}-{self.block}-{self.ratio:g}-{self.flags}"


EF, STOCHASTIC, EXACT, HALF = (
    native.FEEDBACK,
    native.STOCHASTIC,
    native.EXACT,
    native.HALF_VALUES,
)
NEAREST = [
    Case("fp16"),
    Case("bf16"),
    *(Case(kind, block) for kind in ("fp8", "int8") for block in (16, 256, 4096)),
    *(Case("int4", block) for block in (16, 32, 64, 4096)),
    *(Case(kind, block) for kind in ("onebit", "ternary") for block in (16, 64, 256, 4096)),
]
RANDOM = [
    Case(kind, block, flags=EF | STOCHASTIC)
    for kind in ("fp8", "int8", "int4", "ternary")
    for block in (16, 256)
]
SPARSE = [
    *(Case("topk", ratio=ratio, flags=EF | EXACT) for ratio in (0.001, 0.01, 0.3, 1.0)),
    Case("topk", flags=EF),
    Case("topk", ratio=0.05, flags=EF | EXACT | HALF),
    *(Case("randk", ratio=ratio) for ratio in (0.001, 0.01, 0.7, 1.0)),
    Case("randk", ratio=0.1, flags=0),
]
EVERY = [*NEAREST, *RANDOM, *SPARSE]

BITS = {"fp8": 8, "int8": 8, "int4": 4, "ternary": 2, "onebit": 1}


def entries(case, n):
    return min(n, max(1, math.ceil(case.ratio * n)))


def nbytes(case, n, itemsize=4):
    """The table of sizes."""
    if case.kind == "none":
        return n * itemsize
    if case.kind in ("fp16", "bf16"):
        return 2 * n
    k = entries(case, n)
    if case.kind == "topk":
        tiles = -(-n // INDEX_TILE)
        values = k * (2 if case.flags & HALF else 4)
        return 4 * (tiles + 1) + (2 * k + 3) // 4 * 4 + values
    if case.kind == "randk":
        return 8 + 4 * k
    return 4 * -(-n // case.block) + -(-n * BITS[case.kind] // 8)


def blocks(values, block):
    return [values[i : i + block] for i in range(0, len(values), block)]


def lane_sum(values):
    """Added in 16 lanes, then pairwise: as the kernels do."""
    lanes = np.zeros(16, f32)
    for row in range(0, len(values), 16):
        part = values[row : row + 16]
        lanes[: len(part)] += part
    for width in (8, 4, 2, 1):
        lanes[:width] += lanes[width : 2 * width]
    return float(lanes[0])


def mean(values):
    return f32(lane_sum(values) / len(values)) if len(values) else f32(0)


def pack(codes, bits):
    """uint8 codes, the first lowest."""
    per_byte = 8 // bits
    padded = np.zeros(-(-len(codes) // per_byte) * per_byte, np.uint8)
    padded[: len(codes)] = codes
    shifted = padded.reshape(-1, per_byte) << (bits * np.arange(per_byte)).astype(np.uint8)
    return np.bitwise_or.reduce(shifted, axis=1).astype(np.uint8)


def unpack(raw, bits, n):
    per_byte = 8 // bits
    shifts = (bits * np.arange(per_byte)).astype(np.uint8)
    return (raw[:, None] >> shifts & ((1 << bits) - 1)).reshape(-1)[:n]


E4M3 = np.array(
    [
        (-1.0) ** (code >> 7)
        * (
            (code & 7) * 2.0**-9
            if code >> 3 & 15 == 0
            else math.nan
            if code & 127 == 127
            else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3 & 15) - 7)
        )
        for code in range(256)
    ],
    f32,
)


def nearest_e4m3(values):
    """Codes of the nearest value, ties to the even code."""
    positive = E4M3[:127].astype(np.float64)
    size = np.abs(values).astype(np.float64)
    above = np.clip(np.searchsorted(positive, size), 1, 126)
    low, high = size - positive[above - 1], positive[above] - size
    even = np.where(above % 2 == 0, above, above - 1)
    code = np.where(low < high, above - 1, np.where(high < low, above, even))
    code = np.where(size == 0, 0, code).astype(np.uint8)
    return code | np.where(np.signbit(values), 128, 0).astype(np.uint8)


def quantise(case, v):
    """(scale, codes) of one block; rounding to nearest."""
    absmax = np.abs(v).max()
    most = {"fp8": 448, "int8": 127, "int4": 7}.get(case.kind)
    if most is not None:
        tiny = absmax < TINY
        scale, inverse = (f32(0), f32(0)) if tiny else (absmax / f32(most), f32(most) / absmax)
        if case.kind == "fp8":
            return scale, nearest_e4m3(v * inverse)
        levels = np.rint(v * inverse).astype(np.int8)
        return scale, levels.view(np.uint8) if case.kind == "int8" else (levels + 8).view(np.uint8)
    if case.kind == "onebit":
        return mean(np.abs(v)), (v < 0).astype(np.uint8)
    threshold = f32(0.7) * mean(np.abs(v))
    sent = np.abs(v) > threshold
    total = lane_sum(np.where(sent, np.abs(v), f32(0)))
    scale = f32(total / sent.sum()) if sent.any() else f32(0)
    return scale, np.where(sent, np.where(v < 0, 2, 1), 0).astype(np.uint8)


def levels(case, codes):
    if case.kind == "fp8":
        return E4M3[codes]
    if case.kind == "int8":
        return codes.view(np.int8).astype(f32)
    if case.kind == "int4":
        return codes.astype(f32) - f32(8)
    if case.kind == "onebit":
        return f32(1) - f32(2) * codes.astype(f32)
    return np.array([0, 1, -1, 0], f32)[codes]


def largest(v, k):
    """Indices of the k largest magnitudes above 0, ties to the lower index, in index order."""
    order = np.lexsort((np.arange(len(v)), -np.abs(v)))[:k]
    return np.sort(order[np.abs(v[order]) > 0])


def encode_topk(case, v):
    k, n = entries(case, len(v)), len(v)
    chosen = largest(v, k)
    tiles = -(-n // INDEX_TILE)
    offsets = np.searchsorted(chosen, np.arange(tiles + 1) * INDEX_TILE).astype(np.uint32)
    indices = np.zeros((k + 1) // 2 * 2, np.uint16)
    indices[: len(chosen)] = chosen % INDEX_TILE
    values = np.zeros(k, f32)
    values[: len(chosen)] = v[chosen]
    if case.flags & HALF:
        values = stored(np.clip(values, -65504, 65504), "float16")
    return offsets.tobytes() + indices.tobytes() + values.tobytes()


def encode(case, v):
    """The bytes of a piece; for codecs that draw nothing."""
    if case.kind in ("fp16", "bf16"):
        dtype, most = (
            ("float16", 65504) if case.kind == "fp16" else ("bfloat16", loaded_max_bfloat16())
        )
        return stored(np.clip(v, -most, most), dtype).tobytes()
    if case.kind == "topk":
        return encode_topk(case, v)
    parts = [quantise(case, part) for part in blocks(v, case.block)]
    scales = np.array([scale for scale, _ in parts], f32)
    codes = np.concatenate([codes for _, codes in parts]) if parts else np.empty(0, np.uint8)
    bits = BITS[case.kind]
    return scales.tobytes() + (codes if bits == 8 else pack(codes, bits)).tobytes()


def loaded_max_bfloat16():
    return loaded(np.array([0x7F7F], np.uint16), "bfloat16")[0]


def decode(case, raw, n):
    """n float32 of the bytes of a piece; not for randk."""
    raw = np.frombuffer(raw, np.uint8)
    if case.kind in ("fp16", "bf16"):
        return loaded(raw.view(np.uint16), "float16" if case.kind == "fp16" else "bfloat16")
    if case.kind == "topk":
        return decode_topk(case, raw, n)
    count = -(-n // case.block)
    scales = np.frombuffer(raw[: 4 * count].tobytes(), f32)
    bits = BITS[case.kind]
    codes = raw[4 * count :] if bits == 8 else unpack(raw[4 * count :], bits, n)
    return levels(case, codes) * np.repeat(scales, case.block)[:n]


def decode_topk(case, raw, n):
    k, tiles = entries(case, n), -(-n // INDEX_TILE)
    at = 4 * (tiles + 1)
    values_at = at + (2 * k + 3) // 4 * 4
    offsets = np.frombuffer(raw[:at].tobytes(), np.uint32)
    indices = np.frombuffer(raw[at : at + 2 * k].tobytes(), np.uint16).astype(np.int64)
    values = np.frombuffer(raw[values_at:].tobytes(), np.uint16 if case.flags & HALF else f32)
    if case.flags & HALF:
        values = loaded(values.copy(), "float16")
    out = np.zeros(n, f32)
    for tile in range(tiles):
        here = slice(offsets[tile], offsets[tile + 1])
        out[tile * INDEX_TILE + indices[here]] = values[here]
    return out
