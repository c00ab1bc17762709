"""Optimizer state between the hub and torch's own `state_dict` format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from zps.core.layout import Bucket
from zps.errors import TensorMismatch
from zps.training.rules import RuleSpec
from zps.training.torch_rules import decode_state, encode_state
from zps.worker.channel import Channel
from zps.worker.worker import Worker

#: torch keeps no step count for these: whether a state exists says whether there was one.
_STEPLESS = frozenset({"sgd", "lion"})
_ALWAYS = frozenset({"adagrad"})  # torch makes its state before the first step

State = dict[str, Any]


def fetch(
    worker: Worker, spec: RuleSpec, shapes: list[torch.Size], used: list[set[str]]
) -> list[State]:
    """Each parameter's state as torch would hold it, fp32.

    used  the states that exist under the options of each parameter's group
    """
    states: list[State] = [{} for _ in shapes]
    if not spec.native:
        for channel in worker.channels:
            for index, part in enumerate(channel.parts):
                states[part.param] = decode_state(channel.read("foreign", index))
        return states
    for param, state in zip(worker.layout.params, states, strict=True):
        index, steps = worker.layout.index[param.name], worker.times_updated(param.name)
        if steps or spec.name in _ALWAYS:
            if spec.name not in _STEPLESS:
                state["step"] = torch.tensor(float(steps))
            for name in used[index]:
                state[name] = torch.empty(shapes[index])
    for name, channel, bucket in _buckets(worker, used):
        data = np.frombuffer(channel.read("state", bucket.index, name), np.float32)
        for param_index, begin, at, count in _pieces(channel, bucket):
            if name in states[param_index]:
                target = states[param_index][name].view(-1)[begin:][:count]
                target.copy_(torch.from_numpy(data[at : at + count].copy()))
    return states


def store(worker: Worker, spec: RuleSpec, states: list[State], used: list[set[str]]) -> None:
    """Replace the hubs' state by `states`, one a parameter; an empty one is as before any step.

    One worker does this while the others wait, with states that `check` has found good.
    """
    if not spec.native:
        for channel in worker.channels:
            for index, part in enumerate(channel.parts):
                channel.write("foreign", index, encode_state(states[part.param]))
        return
    for name, channel, bucket in _buckets(worker, used):
        data = np.zeros(bucket.count, np.float32)
        for param_index, begin, at, count in _pieces(channel, bucket):
            value = states[param_index].get(name)
            if isinstance(value, torch.Tensor) and count:
                flat = value.detach().to("cpu", torch.float32).reshape(-1)
                data[at : at + count] = flat[begin:][:count].numpy()
        channel.write("state", bucket.index, data.tobytes(), name)
    steps = np.array([_steps(state) for state in states], np.int64)
    for channel in worker.channels:
        channel.set_steps(steps)


def _buckets(worker: Worker, used: list[set[str]]) -> Iterator[tuple[str, Channel, Bucket]]:
    """Every bucket of every hub, once for each state that any parameter has."""
    for name in sorted(set().union(*used)) if used else ():
        for channel in worker.channels:
            for bucket in channel.layout.buckets:
                yield name, channel, bucket


def _pieces(channel: Channel, bucket: Bucket) -> Iterator[tuple[int, int, int, int]]:
    """(parameter of the model, its first element, that element's place in the bucket, count)."""
    for piece in (channel.layout.pieces[i] for i in bucket.pieces):
        part = channel.parts[piece.param]
        begin = part.begin + piece.param_begin
        yield part.param, begin, piece.begin - bucket.begin, piece.count


def _steps(state: Mapping[str, Any]) -> int:
    if "step" in state:
        return int(state["step"])
    return int(any(isinstance(value, torch.Tensor) for value in state.values()))


def has_stepped(states: list[State]) -> bool:
    """Whether there is anything in `states` but what an optimizer starts with."""
    return any(_steps(state) for state in states)


def check(worker: Worker, spec: RuleSpec, states: list[State]) -> None:
    """Raise TensorMismatch for a state that is not shaped like its parameter."""
    names = set(spec.states())  # a foreign class knows itself what shapes it wants
    for state, param in zip(states, worker.layout.params, strict=True):
        for name in names & state.keys():
            value = state[name]
            if isinstance(value, torch.Tensor) and value.shape != param.shape:
                raise TensorMismatch(
                    f"the state {name!r} of {param.name!r} is {tuple(value.shape)}, "
                    f"but the parameter is {param.shape}"
                )
