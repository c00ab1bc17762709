"""Weights that come back encoded (ZPS_PULL_COMPRESSION), over messages."""

from __future__ import annotations

import pytest
import torch

import zps
from tests.workers import Context, at_once, together
from zps import Worker

SHAPES = {"a": (400, 300), "b": (31,), "c": (70, 50)}
CODECS = ["int8", "fp16", "fp8", "int4:block=32", "int8; c=none"]


def start() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


def gradients(round_: int, rank: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(100 * round_ + rank)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


def relative_error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("codec", CODECS)
def test_in_step_all_workers_hold_the_same_and_follow_the_truth(crew, codec):
    hub = crew.hub(pull_compression=codec)
    settings = {"link": "message", "pull_compression": codec}
    with (
        together(hub.address, start(), "sgd", hypers={"lr": 0.1}, **settings) as workers,
    ):
        truth = start()
        for round_ in range(6):
            works = [w.push(gradients(round_, w.rank)) for w in workers]
            at_once(*(work.wait for work in works))
            for name in truth:
                mean = (gradients(round_, 0)[name] + gradients(round_, 1)[name]) / 2
                truth[name] = truth[name] - 0.1 * mean
                first, second = (worker.weights(name) for worker in workers)
                assert torch.equal(first, second), name
                # What one difference loses is in the next: errors do not add up.
                assert relative_error(first, truth[name]) < 0.02, (name, round_)
        small = torch.allclose(workers[0].weights("b"), truth["b"], atol=1e-6)
        assert small, "a tensor under compression_min_bytes comes as it is"


def test_a_worker_beside_that_shares_memory_sees_the_truth_itself(crew):
    hub = crew.hub(pull_compression="int4:block=32")
    with (
        Worker(hub.address, rank=0, world_size=2, link="message") as remote,
        Worker(hub.address, rank=1, world_size=2) as local,
    ):
        at_once(*(lambda w=w: w.declare(start(), "sgd", lr=0.1) for w in (remote, local)))
        for round_ in range(3):
            works = [w.push(gradients(round_, w.rank)) for w in (remote, local)]
            at_once(*(work.wait for work in works))
        exact, near = local.weights("a"), remote.weights("a")
        assert not torch.equal(exact, near)
        assert relative_error(near, exact) < 0.02


@pytest.mark.parametrize("mode", ["ssp", "async"])
def test_out_of_step_each_worker_follows_at_its_own_pace(crew, mode):
    hub = crew.hub(mode=mode, staleness=20, pull_compression="int8")
    settings = {"link": "message"}
    with together(hub.address, start(), "sgd", hypers={"lr": 0.1}, **settings) as workers:
        truth = start()
        for round_ in range(5):
            for worker in workers:
                worker.push(gradients(round_, worker.rank)).wait()
                for name in truth:
                    truth[name] = truth[name] - 0.1 * gradients(round_, worker.rank)[name]
            workers[0].pull()  # the other one takes all of it at once
            assert relative_error(workers[0].weights("a"), truth["a"]) < 0.02
        workers[1].pull()
        assert relative_error(workers[1].weights("a"), truth["a"]) < 0.02


def joined_late(ctx: Context) -> list[torch.Tensor]:
    """The last rank comes back after some rounds; all hold the same from then on."""
    link = {"link": "message"}
    worker = ctx.worker(**link)
    worker.declare(start(), "sgd", lr=0.1)
    for round_ in range(3):
        worker.push(gradients(round_, ctx.rank)).wait()
    if ctx.rank == 1:
        worker.close()
        ctx.tell(0)
        worker = ctx.worker(**link)
        ctx.hear(0)
        worker.declare(start(), "sgd", lr=0.1)
        ctx.tell(0)
    else:
        ctx.hear(1)
        worker.push(gradients(3, 0)).wait()  # alone
        ctx.tell(1)
        ctx.hear(1)
    for round_ in range(4, 7):
        worker.push(gradients(round_, ctx.rank)).wait()
    return [worker.weights(name).clone() for name in SHAPES]


def test_a_newcomer_holds_what_the_others_hold(run):
    first, second = run(joined_late, hub={"pull_compression": "int8", "timeout_s": 20.0})
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)


def republished(ctx: Context) -> tuple[torch.Tensor, torch.Tensor]:
    model = torch.nn.Linear(300, 70)
    opt = zps.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, worker=ctx.worker(link="message")
    )
    for round_ in range(3):
        for index, param in enumerate(model.parameters()):
            random = torch.Generator().manual_seed(10 * round_ + index + 100 * ctx.rank)
            param.grad = torch.randn(param.shape, generator=random)
        opt.step()
    with torch.no_grad():
        model.weight.fill_(3.0)
    opt.publish()
    after = model.weight.detach().clone()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    return after, model.weight.detach().clone()


def test_what_is_published_again_is_held_exactly(run):
    for after, stepped in run(republished, hub={"pull_compression": "int8"}):
        assert bool((after == 3.0).all())
        assert torch.allclose(stepped, torch.full_like(stepped, 2.9), atol=2e-3)


def test_a_worker_that_pulls_what_it_has_been_sent_holds_the_same(crew):
    hub = crew.hub(pull_compression="int8")
    settings = {"link": "message", "pull": "copy"}
    with together(hub.address, start(), "sgd", hypers={"lr": 0.1}, **settings) as workers:
        truth = start()
        for round_ in range(4):
            works = [w.push(gradients(round_, w.rank)) for w in workers]
            at_once(*(work.wait for work in works))
            mean = (gradients(round_, 0)["a"] + gradients(round_, 1)["a"]) / 2
            truth["a"] = truth["a"] - 0.1 * mean
            for worker in workers:
                worker.pull()
                assert relative_error(worker.weights("a"), truth["a"]) < 0.02
