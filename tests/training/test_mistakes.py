"""What a training loop may do wrong: an error that names it, and training that can go on."""

from __future__ import annotations

import contextlib
import os
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import zps
from tests.training.reference import (
    assert_close,
    assert_same_bits,
    average,
    gradients,
    new_params,
    set_gradients,
    steps_in_hub,
    values,
)
from tests.workers import Context
from zps.errors import (
    ConfigError,
    ForkedProcess,
    GradientModified,
    LayoutError,
    LayoutMismatch,
    NonFiniteGradient,
    TensorMismatch,
    UnsupportedError,
    WaitTimeout,
    WeightsModified,
)

OVERLAP = pytest.mark.parametrize("overlap", [True, False])


def backward(params: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
    """A backward pass that gives `params` these gradients, from the last to the first."""
    sum((p * grad).sum() for p, grad in zip(params, grads, strict=True)).backward()


def train_once(opt: zps.Optimizer, params: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
    opt.zero_grad()
    backward(params, grads)
    opt.step()


def reference(rounds: list[list[list[torch.Tensor]]]) -> list[torch.Tensor]:
    """Steps of SGD on the mean over ranks of each round's gradients."""
    params = new_params()
    optimizer = torch.optim.SGD(params, lr=0.1)
    for by_rank in rounds:
        set_gradients(params, average(by_rank))
        optimizer.step()
    return values(params)


def of_round(round_: int, world: int = 2) -> list[list[torch.Tensor]]:
    return [gradients(new_params(), rank, round_) for rank in range(world)]


# --- gradients --------------------------------------------------------------------------------


def send_nan(ctx: Context, at: int, *, overlap: bool) -> list[torch.Tensor]:
    """Rank 1's batch goes wrong in one round; it takes another one instead."""
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), overlap=overlap, worker=ctx.worker())
    for round_ in range(3):
        grads = gradients(params, ctx.rank, round_)
        if round_ == at and ctx.rank == 1:
            bad = [grad.clone() for grad in grads]
            bad[0][0, 0] = torch.inf  # the first parameter: the last one to be ready
            with pytest.raises(NonFiniteGradient, match=r"'group0\.0' on rank 1 .*ZPS_NONFINITE"):
                train_once(opt, params, bad)
        train_once(opt, params, grads)
    return values(params)


@OVERLAP
@pytest.mark.parametrize("at", [0, 1])
def test_a_nonfinite_gradient_is_refused_before_it_leaves(run, at, overlap):
    """Nothing had left, so the round is taken anew and the result is as if nothing had been."""
    expected = reference([of_round(round_) for round_ in range(3)])
    for result in run(send_nan, at, overlap=overlap):
        assert_close(result, expected)


def send_nan_with_absences(ctx: Context) -> list[torch.Tensor]:
    """After the error, a parameter that had a gradient has none: that is no change of it."""
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), worker=ctx.worker())
    for early in (False, True):
        with pytest.raises(NonFiniteGradient):
            train_once(opt, params[1:2], [torch.full((3,), torch.nan)])
        train_once(opt, params[:1], gradients(params, 0, int(early))[:1])
    return values(params)


def test_a_round_begins_anew_after_an_error(run):
    (result,) = run(send_nan_with_absences, world=1)
    grads = [of_round(round_, 1)[0][0] for round_ in range(2)]
    assert_close(result[:1], [new_params()[0] - 0.1 * (grads[0] + grads[1])])
    assert_same_bits(result[1:], values(new_params())[1:])


def in_place(params: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(params, 0.1)


def by_another_tensor(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = p.grad.clamp(-0.1, 0.1)


def by_none(params: list[nn.Parameter]) -> None:
    params[3].grad = None


def clip_between(ctx: Context, clip: Any) -> list[torch.Tensor]:
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), worker=ctx.worker())
    for round_ in range(2):
        opt.zero_grad()
        backward(params, gradients(params, ctx.rank, round_))
        clip(params)
        with pytest.raises(GradientModified, match=r"'group0\.\d' on rank \d .*") as caught:
            opt.step()
        assert "max_grad_norm=" in str(caught.value)
        assert "overlap=False" in str(caught.value)
        ctx.meet()
        train_once(opt, params, gradients(params, ctx.rank, round_))  # nothing has left
    train_once(opt, params, gradients(params, ctx.rank, 2))
    return values(params)


@pytest.mark.parametrize("clip", [in_place, by_another_tensor, by_none])
def test_a_gradient_changed_after_it_left_is_noticed(run, clip):
    expected = reference([of_round(round_) for round_ in range(3)])
    for result in run(clip_between, clip):
        assert_close(result, expected)


def clip_without_overlap(ctx: Context) -> list[torch.Tensor]:
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), overlap=False, worker=ctx.worker())
    for round_ in range(2):
        opt.zero_grad()
        backward(params, gradients(params, ctx.rank, round_))
        for p in params:
            p.grad.mul_(0.5)
        opt.step()
    return values(params)


def test_without_overlap_gradients_may_be_changed_until_the_step(run):
    halves = [[[grad / 2 for grad in grads] for grads in of_round(k)] for k in range(2)]
    for result in run(clip_without_overlap):
        assert_close(result, reference(halves))


def run_backward_twice(ctx: Context, *, overlap: bool) -> list[torch.Tensor]:
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), overlap=overlap, worker=ctx.worker())
    for round_ in range(2):
        opt.zero_grad()
        backward(params, gradients(params, ctx.rank, round_))
        with opt.no_sync() if round_ else contextlib.nullcontext():  # meant for all but the last
            backward(params, gradients(params, ctx.rank, round_))
        opt.step()
    return values(params)


@OVERLAP
def test_backward_passes_of_one_step_add_up(run, overlap):
    twice = [[[2 * grad for grad in grads] for grads in of_round(k)] for k in range(2)]
    for result in run(run_backward_twice, overlap=overlap):
        assert_close(result, reference(twice))


def throw_gradients_away(ctx: Context, *, overlap: bool) -> list[torch.Tensor]:
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), overlap=overlap, worker=ctx.worker())
    steps_in_hub(opt, range(1), rank=ctx.rank)
    opt.zero_grad()
    with opt.no_sync():
        backward(params, gradients(params, ctx.rank, 7))
    opt.zero_grad()
    backward(params, gradients(params, ctx.rank, 8))
    opt.zero_grad()
    backward(params, gradients(params, ctx.rank, 9))
    opt.step()
    return values(params)


@OVERLAP
def test_gradients_can_be_thrown_away_before_the_step(run, overlap):
    for result in run(throw_gradients_away, overlap=overlap):
        assert_close(result, reference([of_round(0), of_round(9)]))


def use_a_scaler_late(ctx: Context) -> list[torch.Tensor]:
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), worker=ctx.worker())
    steps_in_hub(opt, range(1), rank=ctx.rank)
    scaler = torch.amp.GradScaler("cpu")
    opt.zero_grad()
    grads = gradients(params, ctx.rank, 1)
    loss = sum((p * grad).sum() for p, grad in zip(params, grads, strict=True))
    scaler.scale(loss).backward()
    scaler.step(opt)
    return values(params)


def test_a_scaler_may_come_late(run):
    for result in run(use_a_scaler_late):
        assert_close(result, reference([of_round(0), of_round(1)]))


def send_sparse(ctx: Context) -> str:
    model = nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Linear(3, 1))
    opt = zps.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, worker=ctx.worker())
    with pytest.raises(UnsupportedError, match=r"'0\.weight' is sparse.*sparse=False") as caught:
        model(torch.tensor([1, 2, 2])).sum().backward()
    assert opt is not None
    return str(caught.value)


def test_a_sparse_gradient_is_refused(run):
    run(send_sparse, world=1)


def change_lr_between(ctx: Context) -> Any:
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), worker=ctx.worker())
    steps_in_hub(opt, range(1), rank=ctx.rank)
    opt.zero_grad()
    backward(params, gradients(params, ctx.rank, 1))
    opt.param_groups[0]["lr"] = 0.2
    opt.step()
    train_once(opt, params, gradients(params, ctx.rank, 2))
    return values(params)


def test_a_learning_rate_set_before_the_step_counts_in_it(run):
    late = [[[2 * grad for grad in grads] for grads in of_round(k)] for k in (1, 2)]
    for result in run(change_lr_between):
        assert_close(result, reference([of_round(0), *late]))


def change_samples_between(ctx: Context, *, overlap: bool) -> Any:
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), overlap=overlap, worker=ctx.worker())
    steps_in_hub(opt, range(1), rank=ctx.rank)
    opt.zero_grad()
    backward(params, gradients(params, ctx.rank, 1))
    opt.samples = 1.0 + 2 * ctx.rank
    opt.step()
    return values(params)


@OVERLAP
def test_samples_set_before_the_step_count_in_it(run, overlap):
    first, second = of_round(1)
    weighted = [[a / 2 for a in first], [b * 3 / 2 for b in second]]
    for result in run(change_samples_between, overlap=overlap):
        assert_close(result, reference([of_round(0), weighted]))


def fail_in_backward(ctx: Context) -> list[torch.Tensor]:
    """An error of the user's own, when some gradients have been copied."""
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), worker=ctx.worker())
    steps_in_hub(opt, range(1), rank=ctx.rank)
    opt.zero_grad()
    if ctx.rank == 1:
        handle = params[0].register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            backward(params, gradients(params, ctx.rank, 1))
        handle.remove()
    train_once(opt, params, gradients(params, ctx.rank, 1))
    return values(params)


def fail(gradient: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError


def test_an_error_of_the_users_own_in_backward_spoils_nothing(run):
    for result in run(fail_in_backward):
        assert_close(result, reference([of_round(0), of_round(1)]))


def wait_in_vain(ctx: Context) -> list[torch.Tensor]:
    params = new_params()
    limit = 20.0 if ctx.rank else 0.2
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), worker=ctx.worker(timeout_s=limit))
    ctx.meet()
    if ctx.rank == 1:
        ctx.hear(0)
        return steps_in_hub(opt, range(2), rank=1)
    set_gradients(params, gradients(params, 0, 0))
    with pytest.raises(WaitTimeout, match=r"the hub waits for ranks \[1\]"):
        opt.step()
    ctx.tell(1)
    wait_until_stepped(opt)
    set_gradients(params, gradients(params, 0, 1))
    wait_until_stepped(opt)
    return values(params)


def wait_until_stepped(opt: zps.Optimizer) -> None:
    while True:
        with contextlib.suppress(WaitTimeout):
            return opt.step()


def test_a_step_that_timed_out_can_be_tried_again(run):
    for result in run(wait_in_vain):
        assert_close(result, reference([of_round(0), of_round(1)]))


# --- weights ----------------------------------------------------------------------------------


def write_weights(ctx: Context, how: str, *, overlap: bool) -> list[torch.Tensor]:
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), overlap=overlap, worker=ctx.worker())
    steps_in_hub(opt, range(2), rank=ctx.rank)
    ctx.meet()  # nobody writes while another still reads
    if how == "in place":
        with torch.no_grad():
            for p, fresh in zip(params, new_params(), strict=True):
                p.copy_(fresh)
    else:
        params[3].data = new_params()[3].detach()
    with pytest.raises(WeightsModified, match=r"'group0\.\d' was written on rank \d.*publish\(\)"):
        train_once(opt, params, gradients(params, ctx.rank, 2))
    opt.publish()
    opt.zero_grad()
    return values(params) + steps_in_hub(opt, range(2, 4), rank=ctx.rank)


@OVERLAP
@pytest.mark.parametrize("how", ["in place", "other memory"])
def test_weights_written_without_publish_are_noticed(run, how, overlap):
    trained = reference([of_round(0), of_round(1)])
    fresh = values(new_params())
    start = fresh if how == "in place" else [*trained[:3], fresh[3], *trained[4:]]
    grads = [average(of_round(round_)) for round_ in (2, 3)]
    end = [p - 0.1 * a - 0.1 * b for p, a, b in zip(start, *grads, strict=True)]
    for result in run(write_weights, how, overlap=overlap):
        assert_close(result, start + end)


def load_on_rank_0(ctx: Context) -> Any:
    torch.manual_seed(ctx.rank)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4))
    opt = zps.Optimizer(torch.optim.Adam(model.parameters(), lr=0.1), model, worker=ctx.worker())
    if ctx.rank == 0:
        model.load_state_dict(
            {name: torch.full_like(v, 3) for name, v in model.state_dict().items()}
        )
    opt.publish()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ctx.meet()
    model(torch.randn(4, 3)).sum().backward()
    opt.step()
    return state, [float((p.detach() - 3).abs().max()) for p in model[1].parameters()]


@pytest.mark.parametrize("mode", ["bsp", "ssp", "async"])
def test_publish_makes_rank_0s_weights_and_buffers_everyones(run, mode):
    for state, moved in run(load_on_rank_0, hub={"mode": mode}):
        assert all(bool((value == 3).all()) for value in state.values())
        assert all(0.05 < step < 0.25 for step in moved)


# --- models -----------------------------------------------------------------------------------


def build_another_model(ctx: Context, what: str) -> Any:
    """Rank 1 is wrong first, and right at its second try: rank 0 never notices."""
    wrong = {
        "shape": nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7)),
        "missing": nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4, bias=False)),
        "dtype": nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4).bfloat16()),
        "buffer": nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False)),
    }
    worker = ctx.worker()
    text = ""
    if ctx.rank == 1:
        model = wrong[what]
        with pytest.raises(LayoutMismatch) as caught:
            zps.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, worker=worker)
        text = str(caught.value)
    torch.manual_seed(ctx.rank)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4))
    opt = zps.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, worker=worker)
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    return text, values(model.parameters())


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("shape", "parameter '1.weight' is (7, 5) on rank 1 but (4, 5) on rank 0"),
        ("missing", "parameter '1.bias' of rank 0 is missing on rank 1"),
        ("dtype", "parameter '1.weight' is bfloat16 on rank 1 but float32 on rank 0"),
        ("buffer", "buffer 'buffer 2.running_mean' of rank 1 is missing on rank 0"),
    ],
)
def test_another_model_on_another_rank_names_the_first_difference(run, what, text):
    (_, first), (message, second) = run(build_another_model, what)
    assert text in message
    assert "Every worker must build the same model" in message
    assert_same_bits(first, second)


def use_other_groups(ctx: Context) -> str:
    model = nn.Linear(2, 3)
    worker = ctx.worker()
    code = ""
    if ctx.rank == 1:
        with pytest.raises(zps.errors.Rejected, match="other groups than rank 0") as caught:
            zps.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, worker=worker)
        code = caught.value.code
    groups = [{"params": [p]} for p in model.parameters()]
    zps.Optimizer(torch.optim.SGD(groups, lr=0.1), model, worker=worker)
    return code


def test_other_parameter_groups_on_another_rank_are_refused(run):
    assert run(use_other_groups) == ["", "groups"]


def use_another_rule(ctx: Context) -> str:
    params = new_params([(2,)])
    worker = ctx.worker()
    code = ""
    if ctx.rank == 1:
        with pytest.raises(
            zps.errors.Rejected, match="'adam' on rank 1.*'sgd' on rank 0"
        ) as caught:
            zps.Optimizer(torch.optim.Adam(params, lr=0.1), worker=worker)
        code = caught.value.code
    zps.Optimizer(torch.optim.SGD(params, lr=0.1), worker=worker)
    return code


def test_another_optimizer_on_another_rank_is_refused(run):
    assert run(use_another_rule) == ["", "rule"]


def declare_bad(ctx: Context) -> None:
    worker = ctx.worker()
    double = nn.Linear(2, 2).double()
    with pytest.raises(TensorMismatch, match=r"'weight' has dtype 'float64'.*cast to float32"):
        zps.Optimizer(torch.optim.SGD(double.parameters(), lr=0.1), double, worker=worker)
    params = new_params([(2,)])
    with pytest.raises(ConfigError, match="'everywhere'"):
        zps.Optimizer(torch.optim.SGD(params, lr=0.1), apply="everywhere", worker=worker)
    with pytest.raises(ConfigError, match="max_grad_norm"):
        zps.Optimizer(torch.optim.SGD(params, lr=0.1), max_grad_norm=-1.0, worker=worker)
    differentiable = torch.optim.SGD(params, lr=0.1, differentiable=True)
    with pytest.raises(UnsupportedError, match="differentiable"):
        zps.Optimizer(differentiable, worker=worker)
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), worker=worker)
    with pytest.raises(UnsupportedError, match="requires_grad=False"):
        opt.add_param_group({"params": new_params([(3,)])})
    assert len(opt.param_groups) == 1
    with pytest.raises(LayoutError, match="rank 0 has declared its tensors already"):
        zps.Optimizer(torch.optim.SGD(params, lr=0.1), worker=worker)
    opt.param_groups[0]["lr"] = -1.0
    params[0].grad = torch.ones(2)
    with pytest.raises(ConfigError, match="sgd, group 0, lr: .* not -1"):
        opt.step()


def test_what_cannot_be_trained_is_refused_at_once(run):
    run(declare_bad, world=1)


# --- processes --------------------------------------------------------------------------------


def fork(ctx: Context) -> str:
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), worker=ctx.worker())
    steps_in_hub(opt, range(1), rank=ctx.rank)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            steps_in_hub(opt, range(1, 2), rank=ctx.rank)
        except ForkedProcess as error:
            os.write(write, pickle.dumps(str(error)))
        finally:
            opt._worker.close()
            os._exit(0)
    os.close(write)
    text = pickle.loads(os.read(read, 4096))
    os.close(read)
    os.waitpid(child, 0)
    steps_in_hub(opt, range(1, 2), rank=ctx.rank)  # the parent has not noticed
    return text


def test_a_forked_child_is_told_to_start_its_own(run):
    for text in run(fork):
        assert "zps.init() after the fork" in text
