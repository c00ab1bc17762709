from __future__ import annotations

import time
import tracemalloc

import msgpack
import numpy as np
import pytest

from zps.errors import ProtocolError
from zps.wire import packing


def test_a_payload_of_empty_containers_is_cut_off_early():
    """15 MB of them would take over a gigabyte and a quarter of a minute."""
    data = msgpack.packb([[{}] * 1_000_000] * 15)
    tracemalloc.start()
    try:
        started = time.process_time()
        with pytest.raises(ProtocolError, match="more than 1000 lists and maps"):
            packing.unpack(data, max_containers=1000)
        assert time.process_time() - started < 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20  # the outer lists are made before what they hold


def test_a_payload_is_plain_data():
    value = {"a": [1, 2.5, None, True, b"\x00\xff", "é"], "b": {"c": []}}
    assert packing.unpack(packing.pack(value)) == value
    with pytest.raises(TypeError):
        packing.pack({1, 2})


def test_an_array_lies_over_the_bytes_of_its_frame():
    frame = np.array([3, -1], np.int64).tobytes()
    found = packing.array(frame, np.int64)
    assert found.tolist() == [3, -1]
    assert not found.flags.owndata
    with pytest.raises(ProtocolError, match="15 bytes are no array of int64"):
        packing.array(frame[1:], np.int64)
