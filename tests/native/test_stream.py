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
