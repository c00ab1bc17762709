"""Optimizer state between the hub and torch's own `state_dict` format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from zps.errors import TensorMismatch
from zps.training.rules import RuleSpec
from zps.training.torch_rules import decode_state, encode_state
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
    if not spec.native:
        return [decode_state(worker.read("foreign", i)) for i in range(len(shapes))]
    layout = worker.layout
    steps = [worker.times_updated(param.name) for param in layout.params]
    states: list[State] = [{} for _ in shapes]
    for index, state in enumerate(states):
        if steps[index] or spec.name in _ALWAYS:
            if spec.name not in _STEPLESS:
                state["step"] = torch.tensor(float(steps[index]))
            for name in used[index]:
                state[name] = torch.empty(shapes[index])
    for name in sorted(set().union(*used)) if used else ():
        for bucket in layout.buckets:
            data = np.frombuffer(worker.read("state", bucket.index, name), np.float32)
            for piece in (layout.pieces[i] for i in bucket.pieces):
                if name in states[piece.param]:
                    at = piece.begin - bucket.begin
                    target = states[piece.param][name].view(-1)[piece.param_begin :][: piece.count]
                    target.copy_(torch.from_numpy(data[at : at + piece.count].copy()))
    return states


def store(worker: Worker, spec: RuleSpec, states: list[State], used: list[set[str]]) -> None:
    """Replace the hub's state by `states`, one a parameter; an empty one is as before any step.

    One worker does this while the others wait, with states that `check` has found good.
    """
    if not spec.native:
        for index, state in enumerate(states):
            worker.write("foreign", index, encode_state(state))
        return
    layout = worker.layout
    for name in sorted(set().union(*used)) if used else ():
        for bucket in layout.buckets:
            data = np.zeros(bucket.count, np.float32)
            for piece in (layout.pieces[i] for i in bucket.pieces):
                value = states[piece.param].get(name)
                if isinstance(value, torch.Tensor) and piece.count:
                    flat = value.detach().to("cpu", torch.float32).reshape(-1)
                    at = piece.begin - bucket.begin
                    part = flat[piece.param_begin :][: piece.count]
                    data[at : at + piece.count] = part.numpy()
            worker.write("state", bucket.index, data.tobytes(), name)
    worker.set_steps(np.array([_steps(state) for state in states], np.int64))


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
