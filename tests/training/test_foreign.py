"""Optimizers without a kernel run as the very class inside the hub, if the hub allows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import zps
from tests.training.custom import Counting, Failing, MySgd, Signed
from tests.training.reference import (
    SHAPES,
    assert_close,
    assert_same_bits,
    average,
    gradients,
    new_params,
    set_gradients,
    steps_alone,
    steps_in_hub,
    train,
    values,
)
from tests.workers import Context
from zps.errors import ConfigError, HubLost, UnsupportedError
from zps.training.rules import rule_of

ROUNDS = 20
#: Muon takes matrices alone, and Adafactor divides by the number of elements.
SHAPES_OF = {"Muon": [(41, 37), (6, 4), (12, 3)], "Adafactor": SHAPES[:-1]}

CLASSES: dict[str, dict[str, Any]] = {
    "NAdam": {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "RAdam": {"lr": 0.01, "betas": (0.5, 0.9)},
    "Adamax": {"lr": 0.01, "maximize": True},
    "Rprop": {"lr": 0.01, "etas": (0.4, 1.3)},
    "Adadelta": {"rho": 0.8, "weight_decay": 0.1},
    "ASGD": {"lr": 0.1, "t0": 5.0, "lambd": 0.01},
    "Adafactor": {"lr": 0.01, "eps": (None, 1e-3)},
    "Muon": {"lr": 0.01},
}
HERE = [name for name in CLASSES if hasattr(torch.optim, name)]


def new_optimizer(name: str) -> torch.optim.Optimizer:
    """Two groups, of which the second has another learning rate."""
    params = new_params(SHAPES_OF.get(name, SHAPES))
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.003}]
    return getattr(torch.optim, name)(groups, **CLASSES[name])


def train_foreign(ctx: Context, name: str) -> list[torch.Tensor]:
    opt = zps.Optimizer(new_optimizer(name), worker=ctx.worker())
    schedule = lr_scheduler.ExponentialLR(opt, 0.9)
    return steps_in_hub(opt, range(ROUNDS), rank=ctx.rank, scheduler=schedule)


@pytest.mark.parametrize("name", HERE)
def test_any_class_of_torch_equals_itself(run, name):
    base = new_optimizer(name)
    schedule = lr_scheduler.ExponentialLR(base, 0.9)
    expected = steps_alone(base, range(ROUNDS), world=2, scheduler=schedule)
    for result in run(train_foreign, name):
        assert_close(result, expected)


@pytest.mark.parametrize("name", [name for name in HERE if name != "Muon"])
def test_one_worker_alone_gives_the_very_bits(run, name):
    expected = steps_alone(new_optimizer(name), range(3), world=1)
    (result,) = run(train_a_little, name, world=1)
    assert_same_bits(result, expected)


def train_a_little(ctx: Context, name: str) -> list[torch.Tensor]:
    opt = zps.Optimizer(new_optimizer(name), worker=ctx.worker())
    return steps_in_hub(opt, range(3), rank=0)


def leave_some_out(ctx: Context) -> list[torch.Tensor]:
    params = new_params()
    opt = zps.Optimizer(
        torch.optim.NAdam(params, lr=0.01, weight_decay=0.1), max_grad_norm=2.0, worker=ctx.worker()
    )
    for round_ in range(4):
        set_gradients(params, gradients(params, ctx.rank, round_))
        params[round_].grad = None
        if ctx.rank == 0:
            params[4].grad = None  # present on rank 1: counts as zero here
        opt.step()
    return values(params)


def test_absent_gradients_and_clipping_work_for_them_too(run):
    params = new_params()
    optimizer = torch.optim.NAdam(params, lr=0.01, weight_decay=0.1)
    for round_ in range(4):
        by_rank = [gradients(params, rank, round_) for rank in range(2)]
        by_rank[0][4].zero_()
        set_gradients(params, average(by_rank))
        params[round_].grad = None
        torch.nn.utils.clip_grad_norm_(params, 2.0)
        optimizer.step()
    for result in run(leave_some_out):
        assert_close(result, params)


def train_narrow(ctx: Context) -> list[torch.Tensor]:
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in new_params()]
    opt = zps.Optimizer(torch.optim.Adamax(params, lr=0.01), worker=ctx.worker())
    for round_ in range(4):
        set_gradients(params, [grad.bfloat16() for grad in gradients(params, ctx.rank, round_)])
        opt.step()
    return values(params)


def test_narrow_parameters_have_fp32_masters(run):
    masters = [torch.nn.Parameter(p.detach().bfloat16().float()) for p in new_params()]
    optimizer = torch.optim.Adamax(masters, lr=0.01)
    for round_ in range(4):
        by_rank = [[g.bfloat16().float() for g in gradients(masters, r, round_)] for r in range(2)]
        set_gradients(masters, average(by_rank))
        optimizer.step()
    for result in run(train_narrow):
        for mine, master in zip(result, masters, strict=True):
            assert torch.equal(mine, master.detach().bfloat16())


# --- a user's own class -----------------------------------------------------------------------


def allowed(*names: str) -> dict[str, str]:
    """The settings of a hub that may import these; one hub serves all tests that use the same."""
    return {"optimizers": ",".join(names)}


OURS = allowed(*(f"tests.training.custom.{name}" for name in ("Signed", "MySgd", "Counting")))


def signed(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    groups = [{"params": params[:2]}, {"params": params[2:], "size": 0.5, "decay": (0.1, 2.0)}]
    return Signed(groups, 0.01)


def my_sgd(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return MySgd(params, lr=0.1)


@pytest.mark.parametrize("make", [signed, my_sgd])
def test_a_class_of_the_users_own_runs_when_the_hub_allows_it(run, make):
    expected = steps_alone(make(new_params()), range(4), world=2)
    for result in run(train, make, 4, hub=OURS):
        assert_close(result, expected)


def be_refused(ctx: Context) -> str:
    with pytest.raises(ConfigError) as caught:
        zps.Optimizer(Signed(new_params(), 0.01), worker=ctx.worker())
    return str(caught.value)


def test_a_class_that_is_not_allowed_is_refused_with_the_way_to_allow_it(run):
    for text in run(be_refused, world=1):
        assert "may not run 'tests.training.custom.Signed'" in text
        assert "ZPS_OPTIMIZERS=tests.training.custom.Signed" in text


def be_refused_on_every_rank(ctx: Context) -> str:
    return be_refused(ctx)


def test_every_rank_is_refused_not_only_the_first(run):
    assert len(set(run(be_refused_on_every_rank, world=3))) == 1


LEADS_NOWHERE = {
    "tests.training.custom.Missing": "cannot import .*has no attribute 'Missing'",
    "tests.nowhere.Signed": "cannot import .*No module named 'tests.nowhere'",
    "tests.training.custom.not_an_optimizer": "is not a torch.optim.Optimizer",
}


@pytest.mark.parametrize("path", LEADS_NOWHERE)
def test_a_name_that_leads_nowhere_is_a_clear_error(run, path):
    (message,) = run(declare_rule, path, world=1, hub=allowed(*LEADS_NOWHERE))
    assert re.search(LEADS_NOWHERE[path], message)


def declare_rule(ctx: Context, path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        ctx.worker().declare({"w": torch.zeros(3)}, path)
    return str(caught.value)


def test_a_class_inside_a_function_cannot_be_imported_by_a_hub(crew):
    class Local(torch.optim.SGD):
        pass

    with pytest.raises(
        UnsupportedError, match=r"Local.*move the class to a module.*ZPS_OPTIMIZERS"
    ):
        rule_of(Local(new_params(), lr=0.1))


@pytest.mark.parametrize("apply", ["hub", "worker"])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (torch.optim.LBFGS, "evaluates the loss several times a step"),
        (torch.optim.SparseAdam, "needs sparse gradients"),
    ],
)
def test_optimizers_that_no_exchange_serves_are_refused(kind, why, apply):
    with pytest.raises(UnsupportedError, match=f"{kind.__name__} {why}"):
        zps.Optimizer(kind(new_params()), apply=apply)


def test_a_hub_of_native_rules_never_loads_torch(crew, run):
    own = {"hub_threads": 1}  # a hub that has served nothing else
    run(train, sgd, 2, hub=own)
    assert "libtorch" not in Path(f"/proc/{crew.hub(**own).pid}/maps").read_text()


def sgd(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def counting(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return Counting([{"params": params[:3]}, {"params": params[3:], "lr": 0.3}])


@pytest.mark.parametrize("hub", [{}, {"mode": "async"}], ids=["bsp", "async"])
def test_a_class_steps_once_a_round_over_all_parameters(run, hub):
    """A count in the group, not in a parameter's state, tells how often it stepped."""
    expected = steps_alone(counting(new_params()), range(4), world=1)
    (result,) = run(train, counting, 4, world=1, hub={**OURS, **hub})
    assert_close(result, expected)


def outlive_the_hub(ctx: Context) -> str:
    opt = zps.Optimizer(Failing(new_params(), lr=0.1), worker=ctx.worker())
    steps_in_hub(opt, range(1), rank=ctx.rank)
    with pytest.raises(HubLost) as caught:
        steps_in_hub(opt, range(1, 2), rank=ctx.rank)
    return str(caught.value)


def test_an_error_of_the_class_reaches_every_worker(run):
    for text in run(outlive_the_hub, hub=allowed("tests.training.custom.Failing")):
        assert "RuntimeError: no more steps" in text
