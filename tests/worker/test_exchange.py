"""What workers of the low-level interface get for what they push."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from tests.workers import Crew, at_once, together
from zps import Worker
from zps.memory.control import Outcome

LINKS = ("shm", "message", "tcp")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: One element, a few, and more than one bucket of 4096 bytes.
SHAPES = {"one": (1,), "few": (3, 5), "many": (50, 70)}


@pytest.fixture
def hub(crew: Crew) -> str:
    return crew.hub().address


def ones(
    shapes: dict[str, tuple[int, ...]] = SHAPES, value: float = 1.0
) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, value) for name, shape in shapes.items()}


def push_all(
    workers: Sequence[Worker], gradients: Callable[[int], dict[str, torch.Tensor]], **options: float
) -> None:
    works = [worker.push(gradients(worker.rank), **options) for worker in workers]
    for work in works:
        work.wait()


def values(worker: Worker) -> dict[str, torch.Tensor]:
    return {name: worker.weights(name).clone() for name in worker.layout.index}


# --- rules --------------------------------------------------------------------------------------

RULES: dict[str, Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]] = {
    "sum": lambda _, pushed: torch.stack(pushed).sum(0),
    "mean": lambda _, pushed: torch.stack(pushed).mean(0),
    "assign": lambda _, pushed: pushed[0],
    "add": lambda before, pushed: before + torch.stack(pushed).sum(0),
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_does_what_it_says(hub, rule, dtype, world):
    # Small integers: exact in every dtype and in every order.
    def tensors(seed: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(seed)
        return {
            name: torch.randint(-8, 8, shape, generator=random).to(dtype)
            for name, shape in SHAPES.items()
        }

    start = tensors(99)
    with together(hub, start, rule, world=world) as workers:
        expected = {name: tensor.float() for name, tensor in start.items()}
        for round_ in range(3):
            pushed = [tensors(10 * round_ + rank) for rank in range(world)]
            push_all(workers, lambda rank, pushed=pushed: pushed[rank])
            for name in expected:
                gradients = [tensors_[name].float() for tensors_ in pushed]
                expected[name] = RULES[rule](expected[name], gradients)
            for worker in workers:
                for name, value in values(worker).items():
                    assert value.dtype == dtype
                    assert torch.equal(value.float(), expected[name]), name


def test_contributions_are_added_in_rank_order_whoever_comes_first(hub):
    # In floating point 1e8 + 1 - 1e8 depends on the order.
    gradients = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    expected = (gradients[0] + gradients[1]) + gradients[2]
    assert not torch.equal(expected, (gradients[0] + gradients[2]) + gradients[1])
    with together(hub, {"x": torch.zeros(1)}, world=3) as workers:
        for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0], [2, 1, 0]):
            works = [workers[rank].push({"x": gradients[rank]}) for rank in order]
            for work in works:
                work.wait()
            assert torch.equal(workers[0].weights("x"), expected)


def test_a_mean_is_weighted_by_samples(hub):
    with together(hub, ones(), "mean") as workers:
        works = [workers[0].push(ones(value=8.0), samples=1), workers[1].push(ones(), samples=3)]
        for work in works:
            work.wait()
        for value in values(workers[1]).values():
            assert torch.equal(value, torch.full_like(value, (8 + 3 * 1) / 4))


@pytest.mark.parametrize("samples", [(1, 1), (3, 3), (3, 4)])
def test_a_sum_is_weighted_by_samples(hub, samples):
    with together(hub, ones(), "sum") as workers:
        works = [w.push(ones(), samples=n) for w, n in zip(workers, samples, strict=True)]
        for work in works:
            work.wait()
        assert torch.equal(workers[1].weights("few"), torch.full((3, 5), float(sum(samples))))


def test_a_weight_of_zero_leaves_a_worker_out(hub):
    with together(hub, ones(), "mean") as workers:
        works = [workers[0].push(ones(value=5.0)), workers[1].push(ones(), samples=0)]
        for work in works:
            work.wait()
        assert torch.equal(workers[1].weights("few"), torch.full((3, 5), 5.0))


def test_a_round_that_nobody_counts_in_changes_nothing_but_goes_on(hub):
    with together(hub, ones(value=7.0), "mean") as workers:
        push_all(workers, lambda rank: ones(), samples=0)
        assert torch.equal(workers[0].weights("few"), torch.full((3, 5), 7.0))
        push_all(workers, lambda rank: ones())
        assert torch.equal(workers[0].weights("few"), torch.ones(3, 5))


def test_half_precision_is_added_up_in_single(hub):
    # 60000 + 60000 is infinite in float16; its half is not.
    start = {"x": torch.zeros(8, dtype=torch.float16)}
    gradient = {"x": torch.full((8,), 60000.0, dtype=torch.float16)}
    with together(hub, start, "mean") as workers:
        push_all(workers, lambda rank: gradient)
        assert torch.equal(workers[0].weights("x"), gradient["x"])


def test_half_precision_weights_have_single_precision_masters(hub):
    # In bfloat16 alone, 256 + 1 is 256 for ever.
    with together(hub, {"x": torch.full((4,), 256.0, dtype=torch.bfloat16)}, "add") as workers:
        one = {"x": torch.ones(4, dtype=torch.bfloat16)}
        for _ in range(4):
            push_all(workers[:2], lambda rank: one)
        assert workers[0].weights("x").tolist() == [264.0] * 4
        master = np.frombuffer(workers[0].channels[0].read("weights", 0), np.float32)
        assert master[:4].tolist() == [264.0] * 4


# --- ways to push -------------------------------------------------------------------------------


def test_a_gradient_written_in_place_equals_one_that_is_copied(hub):
    gradient = torch.randn(50, 70)
    with together(hub, ones(), "sgd", hypers={"lr": 0.1, "momentum": 0.9}) as (first, second):
        for _ in range(3):
            for name in SHAPES:
                second.slot(name)[:] = 2 * gradient[0, 0]
            second.slot("many").copy_(gradient)
            copied = {name: torch.full(shape, 2 * gradient[0, 0]) for name, shape in SHAPES.items()}
            works = [first.push({**copied, "many": gradient}), second.push(list(SHAPES))]
            for work in works:
                work.wait()
        in_place = values(second)
    with together(hub, ones(), "sgd", hypers={"lr": 0.1, "momentum": 0.9}) as workers:
        for _ in range(3):
            push_all(workers, lambda rank: {**copied, "many": gradient})
        for name, value in values(workers[0]).items():
            assert torch.equal(value, in_place[name])


def test_each_name_has_rounds_of_its_own(hub):
    with together(hub, ones(), "add") as (first, second):
        works = []
        for _ in range(3):
            works += [first.push({"one": torch.ones(1)}), second.push({"one": torch.ones(1)})]
            works[-1].wait()
            works[-2].wait()
        assert first.weights("one").item() == 1 + 3 * 2
        assert torch.equal(first.weights("few"), torch.ones(3, 5))
        late = first.push({"few": torch.ones(3, 5), "one": torch.ones(1)})
        assert not late.done()
        second.push("few").wait()  # its slot is still zero
        assert not late.done()
        second.push("one").wait()  # and here still one
        late.wait()
        assert first.weights("one").item() == 1 + 4 * 2
        assert torch.equal(first.weights("few"), torch.full((3, 5), 2.0))


def test_tensors_that_were_fused_are_pushed_together(hub):
    shapes = {f"p{i}": (i,) for i in range(1, 9)}
    with together(hub, ones(shapes), "add", hypers={"fuse": True}) as workers:
        assert len(workers[0].layout.buckets) == 1
        push_all(workers, lambda rank: ones(shapes))
        for name, shape in shapes.items():
            assert torch.equal(workers[1].weights(name), torch.full(shape, 3.0))


def test_more_buckets_than_a_message_holds_go_in_several(hub):
    shapes = {f"p{i:03}": (4,) for i in range(300)}
    with together(hub, ones(shapes), "add") as workers:
        assert len(workers[0].layout.buckets) == 300
        for _ in range(2):
            push_all(workers, lambda rank: ones(shapes))
        assert all((worker.weights(name) == 5).all() for worker in workers for name in shapes)


def test_scalars_and_empty_tensors_are_tensors_too(hub):
    shapes = {"scalar": (), "none": (0,), "flat": (3, 0, 2), "one": (1,)}
    with together(hub, ones(shapes), "add") as workers:
        for _ in range(2):
            push_all(workers, lambda rank: ones(shapes))
        assert workers[0].weights("scalar").shape == ()
        assert workers[0].weights("scalar").item() == 5
        assert workers[1].weights("none").shape == (0,)
        assert workers[1].weights("flat").shape == (3, 0, 2)
        push_all(workers, lambda rank: ones({"none": (0,)}))  # a bucket without an element
        assert workers[1].weights("one").item() == 5


def test_a_model_without_parameters_is_a_model(hub):
    with together(hub, {}) as workers:
        for worker in workers:
            work = worker.push({})
            assert work.done()
            assert work.wait().outcomes == ()
        at_once(*(worker.barrier for worker in workers))


def test_a_gradient_may_lie_anyhow(hub):
    base = torch.arange(24.0).reshape(4, 6).requires_grad_()
    for gradient in (
        base.t(),
        base[:, ::2].t().expand(3, 4),
        base[0, 0].expand(2, 3),
        base.flip(0),
    ):
        with together(hub, {"x": torch.zeros(gradient.shape)}, world=1) as (worker,):
            worker.push({"x": gradient}).wait()
            assert torch.equal(worker.weights("x"), gradient)


def test_push_pull_is_an_all_reduce_in_place(hub):
    with together(hub, ones()) as workers:
        for round_ in range(3):
            tensors = [ones(value=10.0 * round_ + worker.rank) for worker in workers]
            works = [worker.push_pull(tensors[worker.rank]) for worker in workers]
            for work in works:
                work.wait()
                work.wait()  # no second effect
            for mine in tensors:
                for tensor in mine.values():
                    assert (tensor == 20 * round_ + 1).all()


def test_push_pull_of_names_leaves_the_result_in_weights(hub):
    with together(hub, {"x": torch.zeros(4)}) as workers:
        for worker in workers:
            worker.slot("x").fill_(worker.rank + 1)
        works = [worker.push_pull("x") for worker in workers]
        for work in works:
            work.wait()
        assert workers[1].weights("x").tolist() == [3.0] * 4


# --- waiting ------------------------------------------------------------------------------------


def test_work_is_done_when_all_have_pushed(hub):
    with together(hub, ones(), world=3) as workers:
        works = [workers[2].push(ones()), workers[0].push(ones())]
        assert not any(work.done() for work in works)
        workers[1].push(ones()).wait()
        while not all(work.done() for work in works):  # an answer of their own may be on its way
            pass
        assert works[0].outcomes == ()
        assert set(works[0].wait().outcomes) == {Outcome.APPLIED}


def test_a_slot_is_not_overwritten_before_the_hub_has_read_it(hub):
    with together(hub, {"x": torch.zeros(4)}) as (first, second):
        early = first.push({"x": torch.ones(4)})
        second.slot("x").fill_(1)

        def push_again() -> None:
            first.push({"x": torch.full((4,), 100.0)})  # waits for its slot
            assert early.done()

        def be_late() -> torch.Tensor:
            assert not early.done()
            second.push("x").wait()
            return second.weights("x").clone()

        _, value = at_once(push_again, be_late)
        assert value.tolist() == [2.0] * 4


@pytest.mark.parametrize("mode", ["async", "ssp"])
def test_without_rounds_in_step_a_push_is_applied_on_arrival(crew, mode):
    hub = crew.hub(mode=mode, staleness=2).address
    with together(hub, {"x": torch.zeros(4)}, "add") as (first, second):
        ahead = 2 if mode == "ssp" else 5
        for _ in range(ahead):
            first.push({"x": torch.ones(4)}).wait()
        assert first.weights("x").tolist() == [0.0] * 4  # a copy, until it is pulled
        first.pull()
        assert first.weights("x").tolist() == [ahead] * 4
        if mode == "ssp":
            parked = first.push({"x": torch.ones(4)})
            assert not parked.done()
            second.push({"x": torch.ones(4)}).wait()
            parked.wait()
            second.pull("x")
            assert second.weights("x").tolist() == [ahead + 2.0] * 4


# --- beyond gradients ---------------------------------------------------------------------------


def test_everyone_begins_with_the_values_of_rank_0(hub):
    extras = {"steps": torch.tensor(7), "mask": torch.tensor([True, False]), "none": torch.empty(0)}
    workers = [Worker(hub, rank=rank, world_size=2, timeout_s=20) for rank in range(2)]
    with workers[0], workers[1]:
        at_once(
            lambda: workers[0].declare(ones(value=3.0), extras=extras),
            lambda: workers[1].declare(
                ones(value=4.0), extras={k: torch.zeros_like(v) for k, v in extras.items()}
            ),
        )
        for worker in workers:
            assert all((value == 3).all() for value in values(worker).values())
            for name, value in extras.items():
                assert torch.equal(worker.extra(name), value)
                assert worker.extra(name).dtype == value.dtype


def test_publish_makes_the_values_of_rank_0_the_truth(hub):
    start = {"x": torch.zeros(3), "y": torch.zeros(2, dtype=torch.bfloat16)}
    with together(hub, start, "add") as workers:
        new = {"x": torch.arange(3.0), "y": torch.tensor([5.0, 6.0]).bfloat16()}
        ignored = {name: value + 100 for name, value in new.items()}
        at_once(lambda: workers[0].publish(new), lambda: workers[1].publish(ignored))
        push_all(workers, lambda rank: {"y": torch.ones(2, dtype=torch.bfloat16)})
        assert workers[1].weights("x").tolist() == [0, 1, 2]
        assert workers[1].weights("y").tolist() == [7, 8]  # the masters followed


def test_a_barrier_holds_until_all_are_there(hub):
    with together(hub, {}, world=3) as workers:
        passed: list[int] = []

        def meet(worker: Worker) -> None:
            worker.barrier()
            passed.append(worker.rank)

        def come_last(worker: Worker) -> None:
            while worker.stats()["waiting_for"] != [2]:
                pass
            assert not passed
            meet(worker)

        at_once(
            *(lambda w=w, f=f: f(w) for w, f in zip(workers, [meet, meet, come_last], strict=True))
        )
        assert sorted(passed) == [0, 1, 2]
