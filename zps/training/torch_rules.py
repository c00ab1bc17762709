"""Any torch optimizer as the hub's rule: the real class, on views of the shard.

Only a hub imports this, and only when a job asks for such a rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import msgpack
import numpy as np
import torch

from zps.errors import ConfigError, ProtocolError
from zps.hub.store import Floats, ForeignFactory

_STATE_DTYPES = {str(d): d for d in (torch.float32, torch.float64, torch.int64, torch.bool)}


class TorchRule:
    """See `zps.hub.store.ForeignRule`."""

    def __init__(
        self,
        cls: type[torch.optim.Optimizer],
        masters: list[Floats],
        gradients: list[Floats],
        group_of: list[int],
        groups: Sequence[Mapping[str, Any]],
    ):
        self._params = [torch.nn.Parameter(torch.from_numpy(master)) for master in masters]
        self._gradients = [torch.from_numpy(gradient) for gradient in gradients]
        self._told = [dict(group) for group in groups]
        members = [_as_given(group) | {"params": []} for group in groups]
        for param, group in zip(self._params, group_of, strict=True):
            members[group]["params"].append(param)
        # Some arguments have no default, although every group brings its own value.
        wanted = inspect.signature(cls.__init__).parameters
        defaults = {k: v for k, v in _as_given(groups[0]).items() if k in wanted}
        try:
            self._optimizer = cls(members, **defaults)
        except Exception as error:  # whatever a class of the user's raises, the hub goes on
            raise ConfigError(f"{cls.__name__} does not take these options: {error}") from error

    def step(self, present: Sequence[int], groups: Sequence[Mapping[str, Any]]) -> None:
        """Update the parameters in `present`; the gradients lie in the arrays of the start."""
        # Only what the workers changed: the class may keep something of its own in a group.
        for group, new, old in zip(self._optimizer.param_groups, groups, self._told, strict=True):
            group.update(_as_given({k: v for k, v in new.items() if k not in old or old[k] != v}))
        self._told = [dict(group) for group in groups]
        for index in present:
            self._params[index].grad = self._gradients[index]
        self._optimizer.step()
        for index in present:
            self._params[index].grad = None

    def export_state(self, param: int) -> bytes:
        """A parameter's state: name -> [dtype, shape, bytes] or a plain number."""
        state = self._optimizer.state.get(self._params[param], {})
        return encode_state(state)

    def import_state(self, param: int, data: bytes) -> None:
        state = decode_state(data)
        if state:
            self._optimizer.state[self._params[param]] = state
        else:
            self._optimizer.state.pop(self._params[param], None)


def factory(path: str) -> ForeignFactory:
    """The rule at an import path that the hub has allowed. Raises ConfigError if there is none."""
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except Exception as error:  # whatever a module of the user's raises, the hub goes on
        raise ConfigError(f"the hub cannot import the optimizer {path!r}: {error!r}") from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(f"{path!r} is not a torch.optim.Optimizer")
    if issubclass(cls, torch.optim.LBFGS | torch.optim.SparseAdam):
        raise ConfigError(f"a hub cannot run {path!r}: use it with apply='worker'")

    def make(
        masters: list[Floats],
        gradients: list[Floats],
        group_of: list[int],
        groups: Sequence[Mapping[str, Any]],
    ) -> TorchRule:
        return TorchRule(cls, masters, gradients, group_of, groups)

    return make


def encode_state(state: Mapping[str, Any]) -> bytes:
    """An optimizer's state of one parameter, as it travels."""
    fields: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            if str(value.dtype) not in _STATE_DTYPES:
                value = value.float()
            raw = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            fields[name] = [str(value.dtype), list(value.shape), raw]
        elif value is None or isinstance(value, bool | int | float | str):
            fields[name] = value
        else:
            raise ProtocolError(f"optimizer state {name!r} is a {type(value).__name__}")
    data: bytes = msgpack.packb(fields)
    return data


def decode_state(data: bytes) -> dict[str, Any]:
    """The reverse of `encode_state`. Raises ProtocolError for anything else."""
    try:
        fields = msgpack.unpackb(data, max_ext_len=0)
        return {
            name: _tensor(*value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ProtocolError(f"not an optimizer's state: {error}") from error


def _tensor(dtype: str, shape: list[int], raw: bytes) -> torch.Tensor:
    flat = torch.empty(0, dtype=_STATE_DTYPES[dtype])  # bytes of which there are none have no view
    if raw:
        flat = torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(flat.dtype)
    return flat.reshape(shape)


def _as_given(group: Mapping[str, Any]) -> dict[str, Any]:
    """MessagePack has no tuples; optimizers unpack either, but some compare or hash them."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in group.items()}
