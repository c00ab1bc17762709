"""What becomes of gradients on their way: accumulated, weighted, clipped, scaled, or absent."""

from __future__ import annotations

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

OVERLAP = pytest.mark.parametrize("overlap", [True, False])


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 70), nn.Tanh(), nn.Linear(70, 40), nn.Linear(40, 3))


def batch(size: int, rank: int, round_: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * round_ + rank)
    return torch.randn(size, 20, generator=generator), torch.randn(size, 3, generator=generator)


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x) - y).square().mean()


def whole(size: int, world: int, round_: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [batch(size, rank, round_) for rank in range(world)]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


# --- accumulation -----------------------------------------------------------------------------


def accumulate(ctx: Context, *, overlap: bool) -> list[torch.Tensor]:
    model = new_model()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    opt = zps.Optimizer(base, model, overlap=overlap, worker=ctx.worker())
    for round_ in range(4):
        opt.zero_grad()
        with opt.no_sync():
            for micro in range(2):
                (loss_of(model, *batch(4, ctx.rank, 10 * round_ + micro)) / 3).backward()
        (loss_of(model, *batch(4, ctx.rank, 10 * round_ + 2)) / 3).backward()
        opt.step()
    return values(model.parameters())


@OVERLAP
def test_no_sync_accumulates(run, overlap):
    model = new_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for round_ in range(4):
        optimizer.zero_grad()
        for micro in range(3):
            (loss_of(model, *whole(4, 2, 10 * round_ + micro)) / 3).backward()
        optimizer.step()
    for result in run(accumulate, overlap=overlap):
        assert_close(result, values(model.parameters()))


def never_clear(ctx: Context, *, clear: bool) -> list[torch.Tensor]:
    """Gradients are set to zero but kept, or add up over the steps."""
    model = new_model()
    opt = zps.Optimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, worker=ctx.worker())
    for round_ in range(4):
        if clear:
            opt.zero_grad(set_to_none=False)
        loss_of(model, *batch(4, ctx.rank, round_)).backward()
        opt.step()
    return values(model.parameters())


@pytest.mark.parametrize("clear", [False, True])
def test_gradients_that_are_kept_behave_as_in_torch(run, clear):
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for round_ in range(4):
        if clear:
            optimizer.zero_grad(set_to_none=False)
        loss_of(model, *whole(4, 2, round_)).backward()
        optimizer.step()
    for result in run(never_clear, clear=clear):
        assert_close(result, values(model.parameters()))


def step_with_closure(ctx: Context, *, overlap: bool) -> Any:
    model = new_model()
    base = torch.optim.RMSprop(model.parameters(), lr=0.01, eps=1e-3)
    opt = zps.Optimizer(base, model, overlap=overlap, worker=ctx.worker())
    losses = []
    for round_ in range(4):

        def closure(round_: int = round_) -> torch.Tensor:
            opt.zero_grad()
            loss = loss_of(model, *batch(4, ctx.rank, round_))
            loss.backward()
            return loss

        losses.append(opt.step(closure))
    assert torch.is_grad_enabled()
    return losses, values(model.parameters())


@OVERLAP
def test_a_closure_is_called_once_and_its_loss_returned(run, overlap):
    model = new_model()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, eps=1e-3)
    expected = []
    for round_ in range(4):
        optimizer.zero_grad()
        expected.append([loss_of(model, *batch(4, rank, round_)).detach() for rank in range(2)])
        loss_of(model, *whole(4, 2, round_)).backward()
        optimizer.step()
    for rank, (losses, result) in enumerate(run(step_with_closure, overlap=overlap)):
        assert_close(losses, [pair[rank] for pair in expected])
        assert_close(result, values(model.parameters()))


# --- weights of workers -----------------------------------------------------------------------

UNEVEN = [(8, 8, 8), (8, 5, 3), (1, 8, 0), (0, 0, 4), (0, 0, 0)]


def train_unevenly(ctx: Context, *, overlap: bool) -> list[torch.Tensor]:
    model = new_model()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = zps.Optimizer(base, model, overlap=overlap, worker=ctx.worker())
    for round_, sizes in enumerate(UNEVEN):
        size = sizes[ctx.rank]
        opt.samples = size
        opt.zero_grad()
        x, y = batch(max(size, 1), ctx.rank, round_)
        loss_of(model, x, y).backward()  # with no samples, whatever comes of it counts for nothing
        opt.step()
    return values(model.parameters())


@OVERLAP
def test_uneven_batches_are_weighted_by_their_samples(run, overlap):
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for round_, sizes in enumerate(UNEVEN):
        parts = [batch(size, rank, round_) for rank, size in enumerate(sizes) if size]
        if parts:
            optimizer.zero_grad()
            loss_of(model, *(torch.cat(part) for part in zip(*parts, strict=True))).backward()
            optimizer.step()
    for result in run(train_unevenly, world=3, overlap=overlap):
        assert_close(result, values(model.parameters()))


# --- absent gradients -------------------------------------------------------------------------

#: For each round, the ranks on which each of three parameters has no gradient.
ABSENT: list[list[set[int]]] = [
    [set(), set(), {0, 1}],
    [{0, 1}, {0}, {0, 1}],
    [set(), {1}, {0}],
    [{0, 1}, {0, 1}, {0, 1}],
    [{0}, set(), set()],
]
DECAYING = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.5}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}),
    "Lion": (zps.Lion, {"lr": 0.1, "weight_decay": 0.5}),
}
PARAMS = [(5,), (41, 37), (2, 2)]


def train_with_absences(ctx: Context, name: str, *, overlap: bool, apply: str) -> Any:
    kind, options = DECAYING[name]
    params = new_params(PARAMS)
    opt = zps.Optimizer(kind(params, **options), overlap=overlap, apply=apply, worker=ctx.worker())
    for round_, absent in enumerate(ABSENT):
        opt.zero_grad()
        grads = gradients(params, ctx.rank, round_)
        terms = [
            (p * grad).sum()
            for p, grad, ranks in zip(params, grads, absent, strict=True)
            if ctx.rank not in ranks
        ]
        if terms:
            sum(terms).backward()
        opt.step()
    ctx.meet()
    steps = {n: int(s["step"]) for n, s in opt.state_dict()["state"].items() if "step" in s}
    return values(params), steps


@pytest.mark.parametrize("apply", ["hub", "worker"])
@OVERLAP
@pytest.mark.parametrize("name", DECAYING)
def test_none_on_one_worker_is_zero_and_none_on_all_is_no_step(run, name, overlap, apply):
    kind, options = DECAYING[name]
    params = new_params(PARAMS)
    optimizer = kind(params, **options)
    for round_, absent in enumerate(ABSENT):
        by_rank = [gradients(params, rank, round_) for rank in range(2)]
        for i, ranks in enumerate(absent):
            for rank in ranks:
                by_rank[rank][i].zero_()
        set_gradients(params, average(by_rank))
        for p, ranks in zip(params, absent, strict=True):
            if ranks == {0, 1}:
                p.grad = None
        optimizer.step()
    state = optimizer.state_dict()["state"]
    counts = {n: int(s["step"]) for n, s in state.items() if "step" in s}
    for result, steps in run(train_with_absences, name, overlap=overlap, apply=apply):
        assert_close(result, params)
        assert steps == counts


# --- clipping ---------------------------------------------------------------------------------


def train_clipped(ctx: Context, limit: float, *, overlap: bool, apply: str) -> list[torch.Tensor]:
    params = new_params()
    opt = zps.Optimizer(
        torch.optim.SGD(params, lr=0.1, momentum=0.9),
        max_grad_norm=limit,
        overlap=overlap,
        apply=apply,
        worker=ctx.worker(),
    )
    return steps_in_hub(opt, range(5), rank=ctx.rank)


@pytest.mark.parametrize("apply", ["hub", "worker"])
@OVERLAP
@pytest.mark.parametrize("limit", [0.5, 28.3, 1e6])  # always, now and then, never
def test_max_grad_norm_clips_the_averaged_gradient(run, limit, overlap, apply):
    params = new_params()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    clipped = []
    for round_ in range(5):
        by_rank = [gradients(params, rank, round_) for rank in range(2)]
        set_gradients(params, average(by_rank))
        clipped.append(bool(nn.utils.clip_grad_norm_(params, limit) > limit))
        optimizer.step()
    assert (any(clipped), all(clipped)) == (limit < 1e6, limit < 1)
    for result in run(train_clipped, limit, overlap=overlap, apply=apply):
        assert_close(result, params)


# --- a GradScaler -----------------------------------------------------------------------------

INFINITE_AT = 3


def train_scaled(ctx: Context, *, apply: str, unscale: str) -> Any:
    """Rank 1's fourth batch overflows its fp16 gradient; its own scale goes down alone."""
    params = new_params()
    base = torch.optim.Adam(params, lr=0.01)
    opt = zps.Optimizer(base, apply=apply, worker=ctx.worker())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    before = []
    for round_ in range(6):
        opt.zero_grad()
        grads = gradients(params, ctx.rank, round_)
        loss = sum((p * grad).sum() for p, grad in zip(params, grads, strict=True))
        if round_ == INFINITE_AT and ctx.rank == 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(opt)
            if unscale == "clip":
                nn.utils.clip_grad_norm_(params, 10.0)
            for p in params if unscale == "clip" else ():
                p.grad.nan_to_num_()  # too late: the scaler has seen what was there
        before.append(values(params))
        scaler.step(opt)
        scaler.update()
    skipped = before[INFINITE_AT + 1]
    assert_same_bits(skipped, before[INFINITE_AT])
    stats = opt._worker.stats()["counters"]
    return values(params), scaler.get_scale(), stats["rounds_skipped"]


@pytest.mark.parametrize("unscale", ["", "unscale", "clip"])
@pytest.mark.parametrize("apply", ["hub", "worker"])
def test_a_round_with_an_infinite_gradient_is_skipped_for_everyone(run, apply, unscale):
    params = new_params()
    optimizer = torch.optim.Adam(params, lr=0.01)
    for round_ in range(6):
        if round_ == INFINITE_AT:
            continue
        by_rank = [gradients(params, rank, round_) for rank in range(2)]
        for grads in by_rank if unscale == "clip" else ():
            clip(grads, 10.0)
        set_gradients(params, average(by_rank))
        optimizer.step()
    results = run(train_scaled, apply=apply, unscale=unscale)
    for result, _, skipped in results:
        assert_close(result, params)
        assert skipped == 1
    scales = [scale for _, scale, _ in results]
    assert scales == [2.0**13, 2.0**11]


def clip(grads: list[torch.Tensor], limit: float) -> None:
    held = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    set_gradients(held, grads)
    nn.utils.clip_grad_norm_(held, limit)
    for grad, p in zip(grads, held, strict=True):
        grad.copy_(p.grad)


def skip_without_scaler(ctx: Context, bad: int, *, overlap: bool) -> Any:
    params = new_params()
    opt = zps.Optimizer(
        torch.optim.Adam(params, lr=0.01), overlap=overlap, worker=ctx.worker(nonfinite="skip")
    )
    for round_ in range(6):
        opt.zero_grad()
        grads = gradients(params, ctx.rank, round_)
        if round_ == INFINITE_AT and ctx.rank == 1:
            grads[bad].view(-1)[0] = torch.nan
        sum((p * grad).sum() for p, grad in zip(params, grads, strict=True)).backward()
        opt.step()
    return values(params), opt._worker.stats()["counters"]["rounds_skipped"]


@OVERLAP
@pytest.mark.parametrize("bad", range(5))  # alone in its bucket, or not the last to come
def test_nonfinite_skip_does_the_same_without_a_scaler(run, bad, overlap):
    params = new_params()
    optimizer = torch.optim.Adam(params, lr=0.01)
    for round_ in range(6):
        if round_ != INFINITE_AT:
            by_rank = [gradients(params, rank, round_) for rank in range(2)]
            set_gradients(params, average(by_rank))
            optimizer.step()
    for result, skipped in run(skip_without_scaler, bad, overlap=overlap):
        assert_close(result, params)
        assert skipped == 1


def allow_nan(ctx: Context) -> list[torch.Tensor]:
    params = new_params([(3,)])
    opt = zps.Optimizer(torch.optim.SGD(params, lr=0.1), worker=ctx.worker(nonfinite="allow"))
    params[0].grad = torch.tensor([torch.nan if ctx.rank else 0.0, 0.0, 0.0])
    opt.step()
    return values(params)


def test_nonfinite_allow_lets_it_through(run):
    for (weights,) in run(allow_nan):
        assert weights.isnan().tolist() == [True, False, False]
