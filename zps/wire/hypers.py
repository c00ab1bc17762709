"""Hyperparameters as they travel: parameter groups, and a limit for the gradient's norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zps.errors import ConfigError, ProtocolError
from zps.wire.packing import pack, unpack

_MAX_CONTAINERS = 1 << 16


def pack_hypers(groups: Sequence[Mapping[str, Any]], max_grad_norm: float | None) -> bytes:
    """Raises ConfigError for a value that MessagePack does not know."""
    try:
        return pack({"groups": [dict(g) for g in groups], "max_grad_norm": max_grad_norm})
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"a hyperparameter cannot be sent to the hub: {error}") from None


def unpack_hypers(data: bytes) -> tuple[list[dict[str, Any]], float | None]:
    """(groups, max_grad_norm); what is in a group is for its rule to check.

    Raises ProtocolError for another shape, ConfigError for a limit that is none.
    """
    fields = unpack(data, max_containers=_MAX_CONTAINERS)
    if not isinstance(fields, dict) or set(fields) != {"groups", "max_grad_norm"}:
        raise ProtocolError("hyperparameters are a map of groups and max_grad_norm")
    groups, norm = fields["groups"], fields["max_grad_norm"]
    if not isinstance(groups, list) or not groups or not all(isinstance(g, dict) for g in groups):
        raise ProtocolError("parameter groups are a list of maps")
    if norm is not None and not (type(norm) in (int, float) and norm > 0):
        raise ConfigError(f"max_grad_norm must be a positive number or None, not {norm!r}")
    return groups, None if norm is None else float(norm)


def take_members(groups: Sequence[dict[str, Any]], params: int) -> tuple[int, ...]:
    """Take the lists "params" out of the groups; returns the group of each of `params` parameters.

    Raises ProtocolError unless every parameter is in exactly one group.
    """
    group_of = [-1] * params
    for index, group in enumerate(groups):
        members = group.pop("params", [])
        if not isinstance(members, list):
            raise ProtocolError(f"the parameters of group {index} are not a list")
        for param in members:
            if type(param) is not int or not 0 <= param < params or group_of[param] >= 0:
                raise ProtocolError(f"group {index} lists parameter {param!r} wrongly")
            group_of[param] = index
    if -1 in group_of:
        raise ProtocolError(f"parameter {group_of.index(-1)} is in no group")
    return tuple(group_of)
