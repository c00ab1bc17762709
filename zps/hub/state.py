"""Weights and optimizer state as bytes: what READ and WRITE messages ask of a store."""

from __future__ import annotations

from zps.hub.store import Store
from zps.wire import messages as m


def read(store: Store, asked: m.Read) -> bytes:
    """What the message asks for. Raises ProtocolError for what there is not."""
    if asked.what == "state":
        return store.read_state(asked.field, asked.index)
    if asked.what == "weights":
        return store.read_master(asked.index)
    if asked.what == "extra":
        return store.read_extra(asked.index)
    if asked.what == "steps":
        return store.control.steps.tobytes()
    return store.read_foreign(asked.index)


def write(store: Store, told: m.Write, data: bytes) -> None:
    """Replace it by `data`. Raises ProtocolError for what there is not, or a wrong length."""
    if told.what == "state":
        store.write_state(told.field, told.index, data)
    elif told.what == "published":
        store.write_published(told.index, data)
    elif told.what == "extra":
        store.write_extra(told.index, data)
    else:
        store.write_foreign(told.index, data)
