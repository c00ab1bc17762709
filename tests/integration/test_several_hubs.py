"""A model over several hubs: what comes out is what comes out of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zps
from tests.training.reference import assert_close, assert_same_bits, set_gradients
from tests.workers import Context, Crew, at_once, together
from zps.errors import ConfigError, DuplicateRank, LayoutError, LayoutMismatch
from zps.memory.control import Outcome
from zps.worker.channel import Channel
from zps.worker.link import PushInfo
from zps.worker.worker import Worker

ROUNDS = 10
SEVERAL = [2, 3]


class Net(nn.Module):
    """Tied weights, a parameter of half precision, one that not every round uses, a large one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(50, 40)
        self.hidden = nn.Linear(40, 40)
        self.norm = nn.BatchNorm1d(40)
        self.scale = nn.Parameter(torch.randn(40).bfloat16())
        self.sometimes = nn.Linear(40, 40)
        self.large = nn.Parameter(torch.randn(5000) / 50)
        self.decoder = nn.Linear(40, 50)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, more: bool) -> torch.Tensor:
        h = self.norm(self.hidden(self.embedding(tokens))).tanh() * self.scale
        if more:
            h = h + self.sometimes(h)
        return self.decoder(h) * self.large.reshape(100, 50).sum(0)


RULES: dict[str, Any] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "foreign": lambda params: torch.optim.NAdam(params, lr=0.01),
}


def make(ctx: Context, rule: str, *, worker: Worker | None = None, **options: Any) -> Any:
    model = Net()
    with_decay = [p for p in model.parameters() if p.dim() > 1]
    without = [p for p in model.parameters() if p.dim() <= 1]
    inner = RULES[rule]([{"params": with_decay}, {"params": without, "lr": 0.02}])
    worker = ctx.worker() if worker is None else worker
    return model, zps.Optimizer(inner, model, worker=worker, **options)


def steps(ctx: Context, model: nn.Module, opt: zps.Optimizer, rounds: range) -> None:
    for number in rounds:
        generator = torch.Generator().manual_seed(100 * number + ctx.rank)
        tokens = torch.randint(50, (16,), generator=generator)
        opt.zero_grad()
        # Used by one rank, by the other, by none.
        model(tokens, more=number % 3 == ctx.rank).square().mean().backward()
        opt.step()


def results(model: nn.Module, opt: zps.Optimizer) -> list[torch.Tensor]:
    """Weights and optimizer state."""
    found = [p.detach().clone() for p in model.parameters()]
    for _, state in sorted(opt.state_dict()["state"].items()):
        found += [torch.as_tensor(value) for _, value in sorted(state.items())]
    return found


def train(ctx: Context, rule: str, **options: Any) -> tuple[list[torch.Tensor], int]:
    model, opt = make(ctx, rule, **options)
    steps(ctx, model, opt, range(ROUNDS))
    found = results(model, opt)
    ctx.meet()
    return found, len(opt._worker.channels)


@pytest.mark.parametrize("rule", RULES)
def test_training_comes_to_the_same_bits(run: Any, rule: str) -> None:
    expected = run(train, rule)[0][0]
    for hubs in SEVERAL:
        for found, count in run(train, rule, hubs=hubs):
            assert count == hubs
            assert_same_bits(found, expected, (rule, hubs))


@pytest.mark.parametrize("codec", ["int8", "int8:rounding=stochastic", "randk:ratio=0.1", "topk"])
def test_with_a_codec_training_comes_to_the_same_bits(run: Any, codec: str) -> None:
    # The last part of `large` alone is smaller than what is worth a codec; all of it is not.
    hub = {"compression": codec, "compression_min_bytes": 4000}
    expected = run(train, "sgd", hub=hub)[0][0]
    for found, _ in run(train, "sgd", hubs=2, hub=hub):
        assert_same_bits(found, expected)


def test_averages_alone_come_to_the_same_bits(run: Any) -> None:
    expected = run(train, "adam", apply="worker")[0][0]
    for found, _ in run(train, "adam", apply="worker", hubs=2):
        assert_same_bits(found, expected)


# --- one large tensor -----------------------------------------------------------------------------


def exchange(ctx: Context, pull: str) -> None:
    worker = ctx.worker(pull=pull)
    large, small = torch.arange(5000.0).reshape(50, 100), torch.ones(3)
    worker.declare({"large": large, "small": small}, "add")
    owners = [c for c in worker.channels if any(part.param == 0 for part in c.parts)]
    assert len(owners) == len(worker.channels)
    assert torch.equal(worker.weights("large"), large)

    worker.slot("large").copy_(large)
    worker.push("large").wait()
    worker.pull("large")
    assert torch.equal(worker.weights("large"), large * (1 + ctx.world))

    gradient = {"large": torch.full((50, 100), 2.0), "small": torch.ones(3)}
    worker.push_pull(gradient).wait()
    expected = large * (1 + ctx.world) + 2 * ctx.world
    assert torch.equal(gradient["large"], expected)
    assert torch.equal(worker.weights("large"), expected)
    assert torch.equal(worker.weights("small"), small + ctx.world)
    assert worker.times_updated("large") == 2

    worker.publish({"large": -large, "small": small})
    assert torch.equal(worker.weights("large"), -large)
    worker.push("large").wait()  # what lies in the slot
    if worker.aliased:
        assert torch.equal(worker.weights("large"), -large + 2 * ctx.world)
    ctx.meet()


@pytest.mark.parametrize("hubs", [1, *SEVERAL])
@pytest.mark.parametrize("pull", ["auto", "copy"])
def test_a_tensor_over_several_hubs_is_one_tensor(run: Any, hubs: int, pull: str) -> None:
    run(exchange, pull, hubs=hubs)


def push_first(ctx: Context) -> list[str]:
    """Rank 1 comes late: what rank 0 has sent by then lies at both hubs."""
    worker = ctx.worker()
    worker.declare({"a": torch.zeros(900), "b": torch.zeros(900)}, "add")
    if ctx.rank == 0:
        work = worker.push({"a": torch.ones(900), "b": torch.ones(900)})
        while any(account["waiting_for"] != [1] for account in worker.stats()["hubs"]):
            pass
        assert not work.done()
        ctx.tell(1)
    else:
        ctx.hear(0)
        work = worker.push({"a": torch.ones(900), "b": torch.ones(900)})
    work.wait()
    return [name for c in worker.channels for name in c.layout.index]


def test_a_push_is_at_all_hubs_before_any_is_waited_for(run: Any) -> None:
    assert run(push_first, hubs=2) == [["a", "b"]] * 2


# --- verdicts -------------------------------------------------------------------------------------

SHAPES = {"a": (4,), "b": (2000,), "c": (30, 10)}


def clipped(ctx: Context, limit: float, mode: str) -> list[torch.Tensor]:
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values()]
    inner = torch.optim.SGD(params, lr=1.0)
    opt = zps.Optimizer(inner, worker=ctx.worker(), max_grad_norm=limit)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        set_gradients(params, [torch.randn(p.shape, generator=generator) for p in params])
        opt.step()
        if mode != "bsp":
            opt._worker.barrier()
    opt._worker.refresh()
    found = [p.detach().clone() for p in params]
    ctx.meet()
    return found


@pytest.mark.parametrize("mode", ["bsp", "ssp", "async"])
@pytest.mark.parametrize("hubs", SEVERAL)
def test_a_gradient_is_clipped_by_its_norm_over_all_hubs(run: Any, hubs: int, mode: str) -> None:
    expected = [torch.zeros(shape) for shape in SHAPES.values()]
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        gradient = [torch.randn(shape, generator=generator) for shape in SHAPES.values()]
        norm = torch.cat([g.reshape(-1) for g in gradient]).norm()
        for weight, g in zip(expected, gradient, strict=True):
            weight -= (1 if mode == "bsp" else 2) * g * (5.0 / norm)
    for found in run(clipped, 5.0, mode, hubs=hubs, hub={"mode": mode}):
        assert_close(found, expected)


def skipped(
    ctx: Context, bad: int, norm: float | None
) -> tuple[list[torch.Tensor], list[int], dict[str, int]]:
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values()]
    inner = torch.optim.Adam(params, lr=0.1)
    worker = ctx.worker(nonfinite="skip" if norm is None else "allow")
    opt = zps.Optimizer(inner, worker=worker, max_grad_norm=norm)
    set_gradients(params, [torch.ones(p.shape) for p in params])
    if ctx.rank == 1:
        params[bad].grad.view(-1)[-1] = float("inf")
    opt.step()
    after = [p.detach().clone() for p in params]
    steps = [opt._worker.times_updated(name) for name in opt._worker.layout.index]
    counters = opt._worker.stats()["counters"]
    opt.zero_grad()
    set_gradients(params, [torch.ones(p.shape) for p in params])
    opt.step()
    assert all((p < -0.05).all() for p in params)
    ctx.meet()
    return after, steps, counters


@pytest.mark.parametrize("norm", [None, 9.0], ids=["found by a worker", "found in the norm"])
@pytest.mark.parametrize("bad", range(len(SHAPES)))
@pytest.mark.parametrize("hubs", SEVERAL)
def test_an_infinity_at_one_hub_skips_the_round_at_all(
    run: Any, hubs: int, bad: int, norm: float | None
) -> None:
    for weights, steps, counters in run(skipped, bad, norm, hubs=hubs):
        assert all((weight == 0).all() for weight in weights)
        assert steps == [0] * len(SHAPES)
        assert counters == {"rounds_skipped": 1}


def test_whoever_only_asks_whether_it_is_done_decides_too(crew: Crew) -> None:
    tensors = {"a": torch.zeros(900), "b": torch.zeros(900)}
    with together(
        crew.addresses(2), tensors, "sgd", hypers={"lr": 1.0, "max_grad_norm": 1.0}
    ) as workers:
        works = [w.push({"a": torch.ones(900), "b": torch.ones(900)}) for w in workers]
        while not all(work.done() for work in works):
            pass
        weights = torch.cat([workers[0].weights(name) for name in "ab"])
        assert weights.norm() == pytest.approx(1, rel=1e-5)


def test_a_hub_that_had_nothing_on_hold_is_not_waited_for(crew: Crew) -> None:
    """A worker that dies in the middle of its pushes may be the only one that wanted to hold."""
    tensors = {"a": torch.zeros(900), "b": torch.zeros(900)}
    with together(crew.addresses(2), tensors, "add") as (first, second):
        work = first.push({"a": torch.ones(900), "b": torch.ones(900)})
        for number, channel in enumerate(second.channels):
            for index in range(len(channel.layout.params)):
                channel.slot(index).fill_(1.0)
            every = second.every_bucket[number]
            channel.push(every, PushInfo(hold=number == 0))
        assert set(work.wait().outcomes) == {Outcome.APPLIED}
        assert first.weights("a")[0] == first.weights("b")[0] == 2.0


# --- state ----------------------------------------------------------------------------------------


def save_and_load(ctx: Context) -> tuple[dict[str, Any], list[torch.Tensor], list[torch.Tensor]]:
    model, opt = make(ctx, "adam")
    steps(ctx, model, opt, range(4))
    saved = opt.state_dict()
    weights = [p.detach().clone() for p in model.parameters()]
    steps(ctx, model, opt, range(4, 7))
    ahead = results(model, opt)
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    opt.publish()
    # torch would cast the state of a bfloat16 parameter to that.
    fp32 = [[p.detach().float().clone() for p in g["params"]] for g in opt.param_groups]
    plain = torch.optim.Adam([{"params": params} for params in fp32])
    plain.load_state_dict(saved)
    opt.load_state_dict(plain.state_dict())
    assert_same_bits(results(model, opt)[: len(weights)], weights)
    again = opt.state_dict()["state"]
    for index, values in saved["state"].items():
        assert_same_bits(list(values.values()), list(again[index].values()))
    ctx.meet()
    return saved["state"], ahead, weights


def test_state_goes_to_plain_torch_and_back(run: Any) -> None:
    (expected, ahead, _), _ = run(save_and_load)
    for hubs in SEVERAL:
        for state, then, _ in run(save_and_load, hubs=hubs):
            assert state.keys() == expected.keys()
            for index, values in state.items():
                assert_same_bits(list(values.values()), list(expected[index].values()))
            assert_same_bits(then, ahead)


def foreign_state(ctx: Context) -> None:
    model, opt = make(ctx, "foreign")
    steps(ctx, model, opt, range(3))
    saved = opt.state_dict()
    steps(ctx, model, opt, range(3, 5))
    opt.load_state_dict(saved)
    again = opt.state_dict()["state"]
    for index, values in saved["state"].items():
        assert_same_bits(list(values.values()), list(again[index].values()))
    ctx.meet()


def test_a_foreign_rules_state_comes_back_to_its_hubs(run: Any) -> None:
    run(foreign_state, hubs=2)


# --- modes ----------------------------------------------------------------------------------------


def falls(ctx: Context, norm: float | None) -> tuple[float, float, int]:
    params = [nn.Parameter(torch.ones(shape)) for shape in SHAPES.values()]
    inner = torch.optim.SGD(params, lr=0.05)
    opt = zps.Optimizer(inner, worker=ctx.worker(), max_grad_norm=norm)
    before = sum(float(p.square().sum()) for p in params)
    for _ in range(20):
        opt.zero_grad()
        sum(p.square().sum() for p in params).backward()
        opt.step()
    opt._worker.barrier()
    opt._worker.refresh()
    after = sum(float(p.square().sum()) for p in params)
    ctx.meet()
    return before, after, opt._worker.stats()["counters"]["updates"]


MODES: list[dict[str, Any]] = [
    {"mode": "ssp"},
    {"mode": "async"},
    {"mode": "async", "staleness_policy": "inverse"},
    {"mode": "async", "staleness_policy": "drop", "staleness": 3},
    {"mode": "async", "staleness_policy": "dc"},
]


@pytest.mark.parametrize(
    ("hub", "norm"),
    [({"quorum": 0.5}, None), *((hub, norm) for hub in MODES for norm in (None, 100.0))],
    ids=str,
)
def test_every_mode_trains(run: Any, hub: dict[str, Any], norm: float | None) -> None:
    for before, after, updates in run(falls, norm, hubs=2, hub=hub):
        assert after < before / 4
        assert updates > 20


def hold(ctx: Context) -> None:
    worker = ctx.worker()
    tensors = {"a": torch.zeros(9), "b": torch.zeros(9)}
    with pytest.raises(ConfigError, match="with quorum=0.5 needs a single hub"):
        worker.declare(tensors, "sgd", lr=0.1, max_grad_norm=1.0)
    with pytest.raises(ConfigError, match="with quorum=0.5 needs a single hub"):
        worker.declare(tensors, "torch.optim.NAdam", fuse=True)
    worker.declare(tensors, "sgd", lr=0.1)
    with pytest.raises(ConfigError, match="with quorum=0.5 needs a single hub"):
        worker.push_buckets(worker.every_bucket, PushInfo(hold=True))
    ctx.meet()


def test_no_round_is_held_back_where_hubs_close_it_each_by_itself(run: Any) -> None:
    run(hold, hubs=2, hub={"quorum": 0.5})


# --- joining and being refused --------------------------------------------------------------------


def test_a_rank_without_a_number_has_one_number_at_all_hubs(crew: Crew) -> None:
    address = crew.addresses(2)
    with Worker(address, world_size=2) as first, Worker(address, world_size=2) as second:
        assert {first.rank, second.rank} == {0, 1}
        for worker in (first, second):
            assert {session.rank for session in worker._sessions} == {worker.rank}


def test_the_first_hub_gives_the_rank_and_the_others_are_asked_for_it(crew: Crew) -> None:
    one, other = crew.addresses(2).split(",")
    with Worker(other, rank=0, world_size=2):
        with pytest.raises(DuplicateRank):
            Worker(f"{one},{other}", world_size=2)
        with Worker(one, world_size=2) as worker:  # what it had got there is free again
            assert worker.rank == 0


def test_hubs_in_another_order_are_refused(crew: Crew) -> None:
    one, other = crew.addresses(2).split(",")
    tensors = {"a": torch.zeros(10), "b": torch.zeros(10)}
    with (
        Worker(f"{one},{other}", rank=0, world_size=2, timeout_s=3) as first,
        Worker(f"{other},{one}", rank=1, world_size=2, timeout_s=20) as second,
    ):

        def refused() -> None:
            with pytest.raises(ConfigError, match="the same hubs in the same order") as error:
                second.declare(tensors)
            assert "number 1 of 2 on rank 1, but number 2 of 2 on rank 0" in str(error.value)

        def alone() -> None:
            with pytest.raises(zps.errors.WaitTimeout, match=r"ranks \[1\] have not joined"):
                first.declare(tensors)

        at_once(alone, refused)


def test_one_hub_of_several_is_not_a_job_of_its_own(crew: Crew) -> None:
    one, other = crew.addresses(2).split(",")
    tensors = {"a": torch.zeros(10), "b": torch.zeros(10)}
    with (
        Worker(one, rank=0, world_size=2, timeout_s=3) as first,
        Worker(f"{one},{other}", rank=1, world_size=2, timeout_s=20) as second,
    ):

        def refused() -> None:
            with pytest.raises(ConfigError, match="number 1 of 2 on rank 1, but number 1 of 1"):
                second.declare(tensors)

        def alone() -> None:
            with pytest.raises(zps.errors.WaitTimeout):
                first.declare(tensors)

        at_once(alone, refused)


def test_hubs_with_other_settings_are_refused(crew: Crew) -> None:
    address = ",".join([crew.hub().address, crew.hub(mode="async").address])
    with pytest.raises(ConfigError, match="mode is 'bsp' at the hub .* but 'async' at the hub"):
        Worker(address, rank=0, world_size=1)
    with Worker(address.split(",")[0], rank=0, world_size=1) as worker:  # the rank is free
        assert worker.rank == 0


def test_another_model_is_named_as_with_one_hub(crew: Crew) -> None:
    address = crew.addresses(2)
    with (
        Worker(address, rank=0, world_size=2, timeout_s=3) as first,
        Worker(address, rank=1, world_size=2, timeout_s=20) as second,
    ):

        def refused() -> None:
            with pytest.raises(LayoutMismatch, match=r"'b' is \(3000,\) on rank 1 but \(2000,\)"):
                second.declare({"a": torch.zeros(10), "b": torch.zeros(3000)})

        def alone() -> None:
            with pytest.raises(zps.errors.WaitTimeout):
                first.declare({"a": torch.zeros(10), "b": torch.zeros(2000)})

        at_once(alone, refused)


def test_more_hubs_than_the_model_has_parts_are_refused(crew: Crew) -> None:
    with (
        Worker(crew.addresses(2), rank=0, world_size=1) as worker,
        pytest.raises(LayoutError, match="2 hubs for a model that can be cut into 1 parts"),
    ):
        worker.declare({"a": torch.zeros(10)})


@pytest.mark.parametrize("rank", [0, 1])
def test_a_death_when_one_hub_has_formed_and_another_not_is_mended(
    crew: Crew, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    address = crew.addresses(2)
    tensors = {"a": torch.full((900,), 7.0), "b": torch.full((2000,), 8.0)}
    workers = [Worker(address, rank=r, world_size=2, timeout_s=20) for r in range(2)]
    second_hub = workers[rank]._sessions[1]
    publish = Channel.publish

    def die_half_way(channel: Channel) -> None:
        if channel.session is second_hub:
            raise InterruptedError
        publish(channel)

    monkeypatch.setattr(Channel, "publish", die_half_way)

    def die_and_be_replaced() -> Worker:
        with pytest.raises(InterruptedError):
            workers[rank].declare(tensors, "add")
        workers[rank].close(goodbye=False)
        replacement = Worker(address, rank=rank, world_size=2, timeout_s=20)
        replacement.declare(tensors, "add")
        assert not replacement.joined_late
        return replacement

    other = workers[1 - rank]
    _, replacement = at_once(lambda: other.declare(tensors, "add"), die_and_be_replaced)
    with other, replacement:
        works = [w.push({name: torch.ones_like(tensors[name]) for name in "ab"}) for w in
                 (other, replacement)]  # fmt: skip
        for work in works:
            work.wait()
        for worker in (other, replacement):
            assert torch.equal(worker.weights("a"), tensors["a"] + 2)
            assert torch.equal(worker.weights("b"), tensors["b"] + 2)


def come_back(ctx: Context, norm: float | None) -> list[torch.Tensor]:
    model, opt = make(ctx, "adam", max_grad_norm=norm)
    steps(ctx, model, opt, range(3))
    if ctx.rank == 0:
        ctx.hear(1)
        steps(ctx, model, opt, range(3, 6))  # alone
        ctx.tell(1, model.large.detach().clone())
        ctx.hear(1)
    else:
        opt._worker.close()
        ctx.tell(0, "gone")
        now = ctx.hear(0)
        model, opt = make(ctx, "adam", max_grad_norm=norm)
        assert {c.link.first_round for c in opt._worker.channels} == {6}
        assert torch.equal(model.large, now)
        ctx.tell(0, "back")
    steps(ctx, model, opt, range(6, 9))
    found = results(model, opt)
    ctx.meet()
    return found


@pytest.mark.parametrize("norm", [None, 0.5])
def test_a_worker_that_comes_back_takes_the_job_as_it_is(run: Any, norm: float | None) -> None:
    expected, _ = run(come_back, norm)
    for found in run(come_back, norm, hubs=2):
        if norm is None:
            assert_same_bits(found, expected)
        else:
            assert_close(found, expected, floor=1e3)
