"""Payload frames that are structured: MessagePack with bounds, and arrays over raw bytes."""

from __future__ import annotations

from typing import Any, TypeVar

import msgpack
import numpy as np
from numpy.typing import NDArray

from zps.errors import ProtocolError

N = TypeVar("N", bound=np.integer[Any])


def pack(value: Any) -> bytes:
    """MessagePack for payloads that are structured: layouts, hyperparameters, statistics."""
    data: bytes = msgpack.packb(value)
    return data


def unpack(
    data: bytes | memoryview, *, max_items: int = 1 << 20, max_containers: int = 1 << 20
) -> Any:
    """The value in `data`; no extension types, no repeated keys.

    No container holds more than `max_items`, and all together are `max_containers` at most: an
    empty one takes a byte in `data` and a hundred in memory. Raises ProtocolError.
    """
    containers = 0

    def count(items: list[Any]) -> list[Any]:
        nonlocal containers
        containers += 1
        if containers > max_containers:
            raise ProtocolError(f"more than {max_containers} lists and maps")
        return items

    def without_repeats(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        fields = dict(count(pairs))
        if len(fields) != len(pairs):
            raise ProtocolError("a map repeats a key")
        return fields

    try:
        return msgpack.unpackb(
            data,
            strict_map_key=True,
            max_map_len=max_items,
            max_array_len=max_items,
            max_ext_len=0,
            list_hook=count,
            object_pairs_hook=without_repeats,
        )
    except ProtocolError:
        raise
    except Exception as error:  # msgpack raises a dozen kinds for hostile bytes
        raise ProtocolError(f"not MessagePack as zps writes it: {error}") from None


def array(data: bytes | memoryview, dtype: type[N]) -> NDArray[N]:
    """The bytes of a payload frame as an array over them. Raises ProtocolError."""
    if len(data) % np.dtype(dtype).itemsize:
        raise ProtocolError(f"{len(data)} bytes are no array of {np.dtype(dtype).name}")
    return np.frombuffer(data, dtype)
