"""The roofline kernel does the work it is said to do."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.oracle import ISAS, Block
from zps import native

N = 30 * native.TILE + 128


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("writes", [2, 3])
@pytest.mark.parametrize("reads", [1, 2, 4])
def test_the_sum_of_the_reads_is_added_to_every_write(reads, writes, block, isa):
    rng = np.random.default_rng(0)
    sources = [Block(rng.standard_normal(N, np.float32)) for _ in range(reads)]
    targets = [Block(rng.standard_normal(N, np.float32)) for _ in range(writes)]
    total = sources[0].values.copy()
    for source in sources[1:]:
        total += source.values
    expected = [target.values + total for target in targets]
    read_ptrs, write_ptrs = ([b.address for b in blocks] for blocks in (sources, targets))
    native.stream(native.Pool(2), read_ptrs, write_ptrs, N, block, isa)
    for target, want in zip(targets, expected, strict=True):
        np.testing.assert_array_equal(target.values, want)
        target.check_guards()


@pytest.mark.parametrize(("reads", "block"), [(3, 16), (1, 8), (1, 4096)])
def test_a_mix_that_was_not_compiled_is_refused(reads, block):
    some = Block(np.zeros(128, np.float32))
    with pytest.raises(ValueError, match="stream kernel"):
        native.stream(native.Pool(1), [some.address] * reads, [some.address] * 2, 128, block)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_moved_is_the_exclusive_or_of_what_was_read(isa):
    units, rng = 100, np.random.default_rng(0)
    sources = [Block(rng.integers(0, 256, units * unit).astype(np.uint8)) for unit in (64, 192)]
    targets = [Block(np.zeros(units * unit, np.uint8)) for unit in (128, 64)]
    reads, writes = (
        [(block.address, len(block.values) // units) for block in blocks]
        for blocks in (sources, targets)
    )
    native.move(native.Pool(2), reads, writes, units, isa)
    register = {"avx512": 64, "avx2": 32}.get(isa, 16)
    read = np.concatenate([s.values.reshape(units, -1) for s in sources], axis=1)
    expected = np.bitwise_xor.reduce(read.reshape(units, -1, register), axis=1)
    for target in targets:
        got = target.values.reshape(units, -1, register)
        np.testing.assert_array_equal(got, np.broadcast_to(expected[:, None], got.shape))
        target.check_guards()


@pytest.mark.parametrize(
    ("streams", "text"),
    [([(0, 64)], "null"), ([(64, 65)], "multiple of 64"), ([(64, 64)] * 9, "too many")],
)
def test_streams_that_cannot_be_moved_are_refused(streams, text):
    with pytest.raises(ValueError, match=text):
        native.move(native.Pool(1), streams, [], 0)
