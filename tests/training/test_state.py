"""Optimizer state moves between zps and plain torch, both ways, and training goes on alike."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import zps
from tests.training.reference import (
    SHAPES,
    assert_close,
    assert_same_bits,
    new_params,
    steps_alone,
    steps_in_hub,
    values,
)
from tests.workers import Context
from zps.errors import TensorMismatch
from zps.training.lion import Lion

#: Options under which every state of a rule exists; two groups, of which the second differs.
RULES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, {"momentum": 0.0}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}, {"amsgrad": False}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}, {"weight_decay": 0.2}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}, {"lr": 0.01}),
    "RMSprop": (
        torch.optim.RMSprop,
        {"lr": 0.01, "momentum": 0.9, "centered": True},
        {"momentum": 0.0},
    ),
    "Lion": (Lion, {"lr": 0.01}, {"weight_decay": 0.1}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}, {"weight_decay": 0.1}),  # runs as torch's own class
}
BEFORE, AFTER = range(5), range(5, 10)


def new_optimizer(name: str) -> torch.optim.Optimizer:
    kind, options, second = RULES[name]
    params = new_params()
    return kind([{"params": params[:3]}, {"params": params[3:], **second}], **options)


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)  # weights_only: a state_dict holds nothing but tensors and numbers


def train_and_save(ctx: Context, name: str) -> Any:
    opt = zps.Optimizer(new_optimizer(name), worker=ctx.worker())
    fresh = opt.state_dict()
    weights = steps_in_hub(opt, BEFORE, rank=ctx.rank)
    ctx.meet()  # the state is read between steps
    saved = through_a_file({"optimizer": opt.state_dict(), "weights": weights})
    ctx.meet()
    return fresh, saved, steps_in_hub(opt, AFTER, rank=ctx.rank)


@pytest.mark.parametrize("name", RULES)
def test_a_saved_run_resumes_in_plain_torch(run, name):
    reference = new_optimizer(name)
    fresh_state = copy.deepcopy(reference.state_dict())
    steps_alone(reference, BEFORE, world=2)
    for fresh, saved, expected in run(train_and_save, name):
        assert_same_format(fresh, fresh_state)
        assert_same_format(saved["optimizer"], reference.state_dict())
        resumed = new_optimizer(name)
        for p, value in zip(params_of(resumed), saved["weights"], strict=True):
            p.data.copy_(value)
        resumed.load_state_dict(saved["optimizer"])
        assert_close(steps_alone(resumed, AFTER, world=2), expected)


def assert_same_format(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same groups, and for every parameter the same states with nearly the same values."""
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        found = mine["state"][number]
        names = {name for name, value in state.items() if value is not None}
        assert found.keys() == names, number
        for name in names:
            assert found[name].dtype == state[name].dtype, (number, name)
            assert_close([found[name]], [state[name]], (number, name), floor=1.0)


def load_and_train(ctx: Context, name: str, saved: Any) -> Any:
    opt = zps.Optimizer(new_optimizer(name), worker=ctx.worker())
    steps_in_hub(opt, range(2), rank=ctx.rank)  # what was there before must leave no trace
    if ctx.rank == 0:
        with torch.no_grad():
            for p, value in zip(params_of(opt), saved["weights"], strict=True):
                p.copy_(value)
    opt.load_state_dict(saved["optimizer"])
    opt.publish()
    again = opt.state_dict()
    ctx.meet()
    return again, steps_in_hub(opt, AFTER, rank=ctx.rank)


@pytest.mark.parametrize("name", RULES)
def test_a_plain_run_resumes_in_the_hub(run, name):
    plain = new_optimizer(name)
    plain.param_groups[1]["lr"] = 0.03  # hyperparameters come with the state
    steps_alone(plain, BEFORE, world=2)
    saved = through_a_file({"optimizer": plain.state_dict(), "weights": values(params_of(plain))})
    expected = steps_alone(plain, AFTER, world=2)
    for again, result in run(load_and_train, name, saved):
        assert_same_format(again, saved["optimizer"])
        assert_close(result, expected)


def load_a_fresh_state(ctx: Context, name: str) -> Any:
    opt = zps.Optimizer(new_optimizer(name), worker=ctx.worker())
    steps_in_hub(opt, BEFORE, rank=ctx.rank)
    opt.load_state_dict(new_optimizer(name).state_dict())
    with torch.no_grad():
        if ctx.rank == 0:
            for p, value in zip(params_of(opt), new_params(), strict=True):
                p.copy_(value)
    opt.publish()
    return steps_in_hub(opt, BEFORE, rank=ctx.rank)


@pytest.mark.parametrize("name", RULES)
def test_a_fresh_state_begins_anew(run, name):
    expected = steps_alone(new_optimizer(name), BEFORE, world=2)
    for result in run(load_a_fresh_state, name):
        assert_close(result, expected)


# --- the wrapped optimizer's own state ---------------------------------------------------------


def wrap_a_loaded_optimizer(ctx: Context, name: str, saved: Any) -> Any:
    """The order most scripts have it in: build, load, wrap. Only rank 0 has read the file."""
    base = new_optimizer(name)
    if ctx.rank == 0:
        base.load_state_dict(saved["optimizer"])
        for p, value in zip(params_of(base), saved["weights"], strict=True):
            p.data.copy_(value)
    opt = zps.Optimizer(base, worker=ctx.worker())
    return steps_in_hub(opt, AFTER, rank=ctx.rank)


@pytest.mark.parametrize("name", RULES)
def test_wrapping_takes_over_the_state_the_optimizer_has(run, name):
    plain = new_optimizer(name)
    steps_alone(plain, BEFORE, world=2)
    saved = through_a_file({"optimizer": plain.state_dict(), "weights": values(params_of(plain))})
    expected = steps_alone(plain, AFTER, world=2)
    for result in run(wrap_a_loaded_optimizer, name, saved):
        assert_close(result, expected)


# --- narrow parameters, and mistakes -----------------------------------------------------------


def save_narrow(ctx: Context) -> Any:
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in new_params()]
    opt = zps.Optimizer(torch.optim.AdamW(params, lr=0.01), worker=ctx.worker())
    steps_in_hub(opt, BEFORE, rank=ctx.rank)
    ctx.meet()
    return opt.state_dict()["state"], values(params)


def test_states_of_narrow_parameters_are_fp32(run):
    for state, weights in run(save_narrow):
        assert {w.dtype for w in weights} == {torch.bfloat16}
        for entry in state.values():
            assert {value.dtype for value in entry.values()} == {torch.float32}
        narrow = [entry["exp_avg"].bfloat16().float() for entry in state.values()]
        exact = [
            torch.equal(entry["exp_avg"], n)
            for entry, n in zip(state.values(), narrow, strict=True)
        ]
        assert exact == [False] * 5 + [True]  # the last has no elements


def load_another_shape(ctx: Context) -> Any:
    opt = zps.Optimizer(new_optimizer("Adam"), worker=ctx.worker())
    result = steps_in_hub(opt, range(1), rank=ctx.rank)
    other = new_optimizer("Adam")
    steps_alone(other, range(1), world=1)
    wrong = other.state_dict()
    wrong["state"][3]["exp_avg"] = torch.zeros(37, 41)
    with pytest.raises(TensorMismatch, match=r"'exp_avg' of 'group1.0' is \(37, 41\).*\(41, 37\)"):
        opt.load_state_dict(wrong)
    ctx.meet()
    state = opt.state_dict()["state"]
    ctx.meet()
    return result, state, steps_in_hub(opt, range(1, 3), rank=ctx.rank)


def test_a_state_of_another_shape_is_refused_on_every_rank(run):
    assert SHAPES[3] == (41, 37)
    reference = new_optimizer("Adam")
    expected = steps_alone(reference, range(3), world=2)
    for _, state, after in run(load_another_shape):
        assert len(state) == len(SHAPES)
        assert_close(after, expected)


def switch_momentum_on(ctx: Context) -> Any:
    """The state is asked for before a step has told the hub, and after."""
    opt = zps.Optimizer(torch.optim.SGD(new_params(), lr=0.1), worker=ctx.worker())
    steps_in_hub(opt, range(2), rank=ctx.rank)
    opt.param_groups[0]["momentum"] = 0.9
    before = opt.state_dict()
    ctx.meet()
    steps_in_hub(opt, range(2, 4), rank=ctx.rank)
    ctx.meet()
    return before, opt.state_dict()


def test_a_state_comes_into_being_with_the_option_that_needs_it(run):
    reference = torch.optim.SGD(new_params(), lr=0.1)
    steps_alone(reference, range(2), world=2)
    reference.param_groups[0]["momentum"] = 0.9
    steps_alone(reference, range(2, 4), world=2)
    for before, after in run(switch_momentum_on):
        assert before["param_groups"][0]["momentum"] == 0.9
        assert not before["state"]
        assert_same_format(after, reference.state_dict())


def remember_parameters(ctx: Context) -> Any:
    opt = zps.Optimizer(torch.optim.Adam(new_params(), lr=0.1), worker=ctx.worker())
    steps_in_hub(opt, BEFORE, rank=ctx.rank)
    opt.state_dict()
    kept = len(opt.state)
    before = values(params_of(opt))
    opt.load_state_dict(opt.state_dict())
    assert_same_bits(values(params_of(opt)), before)
    return kept, len(opt.state)


def test_the_worker_keeps_no_copy_of_the_state(run):
    assert run(remember_parameters) == [(0, 0), (0, 0)]
