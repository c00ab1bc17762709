"""Two nodes on one machine: they train as one process does on the averaged gradient."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import zps
from tests.integration.nodes import Cluster, node_settings, nodes
from tests.training.reference import assert_close, values
from tests.workers import at_once
from zps.errors import (
    ConfigError,
    HubUnreachable,
    LayoutMismatch,
    RankOutOfRange,
    Rejected,
    WaitTimeout,
)
from zps.relay import process as relay
from zps.worker.worker import Worker

ROUNDS = 8
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]

SGD: MakeOptimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
ADAM: MakeOptimizer = partial(torch.optim.Adam, lr=0.01, weight_decay=0.01)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Lent:
    """Two nodes with two workers each, which serve one job after another."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._stack = ExitStack()
        self._cluster: Cluster | None = None
        self._count = 0

    def get(self) -> Cluster:
        """The cluster; another, if a test that has failed has ended its hubs."""
        if self._cluster is None or not self._cluster.alive:
            self.close()
            self._count += 1
            self._cluster = self._stack.enter_context(nodes(self._folder / str(self._count)))
        return self._cluster

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lent]:
    lent = Lent(tmp_path_factory.mktemp("nodes"))
    yield lent
    lent.close()


@pytest.fixture
def cluster(lent: Lent) -> Cluster:
    return lent.get()


class Net(torch.nn.Module):
    """Several buckets, a parameter that not everybody uses, and a buffer."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(30, 50)
        self.second = torch.nn.Linear(50, 3)
        self.spare = torch.nn.Parameter(torch.randn(70))
        self.register_buffer("mark", torch.full((5,), seed, dtype=torch.int64))

    def loss(self, rank: int, round_: int) -> torch.Tensor:
        """Of one rank's batch, whose size is its number of samples."""
        generator = torch.Generator().manual_seed(100 * round_ + rank)
        x = torch.randn(samples(rank), 30, generator=generator)
        loss = (self.second(torch.tanh(self.first(x))) ** 2).mean()
        return loss + (self.spare**2).sum() if uses_spare(rank, round_) else loss


_MAKING = threading.Lock()  # torch has one seed for all threads


def net(seed: int) -> Net:
    with _MAKING:
        return Net(seed)


def samples(rank: int) -> int:
    return 2 + rank


def uses_spare(rank: int, round_: int) -> bool:
    """Nobody, one node's second worker, one node, all: in turn."""
    return (False, rank == 3, rank >= 2, True)[round_ % 4]


def alone(
    make: MakeOptimizer,
    world: int,
    *,
    max_grad_norm: float | None = None,
    skipped: int = -1,
) -> tuple[Net, torch.optim.Optimizer]:
    """One process, on the mean of all ranks' gradients weighted by their samples."""
    model = net(0)
    optimizer = make(model.parameters())
    params = list(model.parameters())
    total = sum(samples(rank) for rank in range(world))
    for round_ in range(ROUNDS):
        sums: list[torch.Tensor | None] = [None] * len(params)
        for rank in range(world):
            optimizer.zero_grad()
            model.loss(rank, round_).backward()
            for i, p in enumerate(params):
                if p.grad is not None:
                    part = p.grad * samples(rank)
                    before = sums[i]
                    sums[i] = part if before is None else before + part
        for p, grad in zip(params, sums, strict=True):
            p.grad = None if grad is None else grad / total
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
        if round_ != skipped:
            optimizer.step()
    return model, optimizer


def train(
    worker: Worker, make: MakeOptimizer, *, skipped: int = -1, **options: Any
) -> tuple[list[torch.Tensor], dict[str, Any], list[int]]:
    """One rank's share; returns weights, state and buffer."""
    model = net(worker.rank)  # rank 0's weights count, everywhere
    opt = zps.Optimizer(make(model.parameters()), model, worker=worker, **options)
    opt.samples = samples(worker.rank)
    for round_ in range(ROUNDS):
        opt.zero_grad()
        loss = model.loss(worker.rank, round_)
        (loss * float("inf") if (round_, worker.rank) == (skipped, 1) else loss).backward()
        opt.step()
    return values(list(model.parameters())), opt.state_dict(), model.mark.tolist()


def assert_trains_like_one(
    cluster: Cluster, make: MakeOptimizer, *, skipped: int = -1, **options: Any
) -> list[dict[str, Any]]:
    """Returns the hub's account, of each rank."""
    model, optimizer = alone(
        make, cluster.world, skipped=skipped, max_grad_norm=options.get("max_grad_norm")
    )
    nonfinite = "raise" if skipped < 0 else "skip"
    with cluster.workers(nonfinite=nonfinite) as workers:
        assert [(w.rank, w.world_size) for w in workers] == [(r, 4) for r in range(4)]
        results = at_once(*(partial(train, w, make, skipped=skipped, **options) for w in workers))
        accounts = [worker.stats() for worker in workers]
    expected = optimizer.state_dict()
    for weights, state, mark in results:
        assert_close(weights, values(list(model.parameters())), "weights")
        assert mark == [0] * 5  # rank 0's buffer, though every model began with its own
        assert state["param_groups"] == expected["param_groups"]
        assert state["state"].keys() == expected["state"].keys()
        for index, theirs in expected["state"].items():
            assert state["state"][index].keys() == theirs.keys()
            for name, value in theirs.items():
                if isinstance(value, torch.Tensor):
                    assert_close([state["state"][index][name]], [value], name)
    return accounts


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [SGD, ADAM], ids=["sgd", "adam"])
def test_weighted_rounds_with_absent_gradients(cluster, make):
    assert_trains_like_one(cluster, make)


@pytest.mark.parametrize("make", [SGD, ADAM], ids=["sgd", "adam"])
def test_rounds_are_clipped_by_the_norm_over_all_nodes(cluster, make):
    assert_trains_like_one(cluster, make, max_grad_norm=0.3)


@pytest.mark.parametrize("make", [SGD, ADAM], ids=["sgd", "adam"])
def test_a_round_with_an_infinity_is_skipped_on_all_nodes(cluster, make):
    accounts = assert_trains_like_one(cluster, make, skipped=3)
    assert all(account["counters"]["rounds_skipped"] == 1 for account in accounts)


def test_over_tcp(tmp_path):
    with nodes(tmp_path, tcp=True) as cluster:
        assert_trains_like_one(cluster, ADAM)


def test_a_class_of_torch_runs_in_the_hub_of_all_nodes(cluster):
    make = partial(torch.optim.NAdam, lr=0.01)
    model, _ = alone(make, cluster.world)
    with cluster.workers() as workers:
        for weights, _, _ in at_once(*(partial(train, w, make) for w in workers)):
            assert_close(weights, values(list(model.parameters())))


def test_workers_that_send_messages_to_their_node_hub(cluster):
    model, _ = alone(SGD, cluster.world)
    with cluster.workers(link="message") as workers:
        for weights, _, _ in at_once(*(partial(train, w, SGD) for w in workers)):
            assert_close(weights, values(list(model.parameters())))


def test_buckets_too_large_to_go_with_their_push_are_fetched(tmp_path):
    def rounds(worker: Worker) -> float:
        worker.declare({"x": torch.zeros(300_000)}, "add")
        for _ in range(3):
            worker.push({"x": torch.full((300_000,), 1.0 + worker.rank)}).wait()
        return float(worker.weights("x").unique().item())

    with nodes(tmp_path, bucket_bytes="512KiB") as cluster, cluster.workers() as workers:
        assert at_once(*(partial(rounds, w) for w in workers)) == [30.0] * 4


def test_what_the_last_worker_of_a_node_pushed_counts_though_it_leaves_at_once(tmp_path):
    with nodes(tmp_path, workers=1, bucket_bytes="512KiB") as cluster, cluster.workers() as workers:
        first, last = workers
        at_once(*(partial(w.declare, {"x": torch.zeros(300_000)}, "sum") for w in workers))
        first.push({"x": torch.ones(300_000)})
        first.close()
        last.push({"x": torch.ones(300_000)}).wait()
        assert bool((last.weights("x") == 2.0).all())


def test_more_buckets_than_a_socket_takes_at_once(tmp_path):
    size = 600_000

    def rounds(worker: Worker) -> list[float]:
        worker.declare({"x": torch.arange(size, dtype=torch.float32) + worker.rank}, "add")
        worker.push({"x": torch.ones(size)}).wait()
        return (worker.weights("x") - torch.arange(size)).unique().tolist()

    with nodes(tmp_path) as cluster, cluster.workers() as workers:
        assert at_once(*(partial(rounds, w) for w in workers)) == [[4.0]] * 4


@pytest.mark.parametrize(("rule", "expected"), [("sum", 25.0), ("mean", 2.5), ("assign", 1.0)])
def test_rules_without_an_optimizer(cluster, rule, expected):
    def exchange(worker: Worker) -> list[float]:
        value = torch.full((3000,), 1.0 + worker.rank)
        worker.declare({"x": value}, rule)
        worker.push_pull({"x": value}, samples=2.5 if rule == "sum" else 1.0).wait()
        return value.unique().tolist()

    with cluster.workers() as workers:
        assert at_once(*(partial(exchange, w) for w in workers)) == [[expected]] * 4


def test_a_bfloat16_parameter(cluster):
    """Means of these gradients are numbers that bfloat16 has, so the journey rounds nothing."""

    def gradient(rank: int, round_: int) -> torch.Tensor:
        return torch.full((3000,), 2.0 * rank + round_, dtype=torch.bfloat16)

    def steps(worker: Worker) -> torch.Tensor:
        param = torch.nn.Parameter(torch.ones(3000, dtype=torch.bfloat16))
        opt = zps.Optimizer(torch.optim.SGD([param], lr=0.01, momentum=0.5), worker=worker)
        for round_ in range(4):
            param.grad = gradient(worker.rank, round_)
            opt.step()
        return param.detach().clone()

    master = torch.nn.Parameter(torch.ones(3000))
    reference = torch.optim.SGD([master], lr=0.01, momentum=0.5)
    for round_ in range(4):
        master.grad = torch.stack([gradient(r, round_).float() for r in range(4)]).mean(0)
        reference.step()
    with cluster.workers() as workers:
        for result in at_once(*(partial(steps, w) for w in workers)):
            assert torch.equal(result, master.detach().to(torch.bfloat16))


def test_versions_rise_by_one_a_round_for_readers_that_copy(cluster):
    def rounds(worker: Worker) -> tuple[list[float], list[int]]:
        worker.declare({"x": torch.zeros(3000)}, "add")
        for _ in range(3):
            worker.push({"x": torch.ones(3000)}).wait()
        worker.pull()
        link = worker.channels[0].link
        versions = [link.version(bucket.index) for bucket in worker.layout.buckets]
        return worker.weights("x").unique().tolist(), versions

    with cluster.workers(pull="copy") as workers:
        results = at_once(*(partial(rounds, w) for w in workers))
    assert results == [([12.0], [3, 3, 3])] * 4


def test_a_learning_rate_that_changes_reaches_the_hub_of_all_nodes(cluster):
    def steps(worker: Worker) -> float:
        param = torch.nn.Parameter(torch.zeros(5))
        opt = zps.Optimizer(torch.optim.SGD([param], lr=1.0), worker=worker)
        for lr in (1.0, 0.5, 0.5, 0.25):
            opt.param_groups[0]["lr"] = lr
            param.grad = torch.ones(5)
            opt.step()
        return param[0].item()

    with cluster.workers() as workers:
        assert at_once(*(partial(steps, w) for w in workers)) == [-2.25] * 4


def test_a_bad_learning_rate_is_its_senders_to_hear(cluster):
    def steps(worker: Worker) -> str:
        param = torch.nn.Parameter(torch.zeros(5))
        opt = zps.Optimizer(torch.optim.SGD([param], lr=1.0), worker=worker)
        param.grad = torch.ones(5)
        if worker.rank == 2:
            opt.param_groups[0]["lr"] = -1.0
            with pytest.raises(ConfigError) as caught:
                opt.step()
            worker.close(goodbye=False)
            return str(caught.value)
        opt.step()
        return str(param[0].item())

    with cluster.workers() as workers:
        texts = at_once(*(partial(steps, w) for w in workers))
    assert "lr" in texts.pop(2)
    assert texts == ["-1.0"] * 3


def test_state_that_is_loaded_is_everyones(cluster):
    _, optimizer = alone(ADAM, cluster.world)
    saved = optimizer.state_dict()

    def load(worker: Worker) -> None:
        model = net(0)
        opt = zps.Optimizer(ADAM(model.parameters()), model, worker=worker)
        opt.load_state_dict(saved)
        mine = opt.state_dict()
        worker.barrier()  # rank 0 leaves no sooner than all have read
        assert mine["param_groups"] == saved["param_groups"]
        for index, theirs in saved["state"].items():
            for name, value in theirs.items():
                assert torch.equal(mine["state"][index][name], value), name

    with cluster.workers() as workers:
        at_once(*(partial(load, w) for w in workers))


def test_publish_makes_rank_0s_values_everyones(cluster):
    def publish(worker: Worker) -> tuple[float, int]:
        model = net(0)
        opt = zps.Optimizer(SGD(model.parameters()), model, worker=worker)
        model.loss(worker.rank, 0).backward()
        opt.step()
        if worker.rank == 0:
            with torch.no_grad():
                model.spare.fill_(7.0)
                model.mark.fill_(9)
        opt.publish()
        return model.spare.mean().item(), int(model.mark[0])

    with cluster.workers() as workers:
        assert at_once(*(partial(publish, w) for w in workers)) == [(7.0, 9)] * 4


def test_apply_worker_averages_over_all_nodes(cluster):
    model, _ = alone(ADAM, cluster.world)
    with cluster.workers() as workers:
        results = at_once(*(partial(train, w, ADAM, apply="worker") for w in workers))
    for weights, _, _ in results:
        assert_close(weights, values(list(model.parameters())))


# --- what goes up -------------------------------------------------------------------------------


ELEMENTS, BUCKET_ELEMENTS, BYTE_ROUNDS = 5000, 1024, 10
STEP_BYTES = 8  # of each bucket's step count


def bucket_bytes(codec: str) -> list[int]:
    """Bytes of each bucket as docs/compression.md has them, padded to a multiple of 64."""
    sizes = [BUCKET_ELEMENTS] * (ELEMENTS // BUCKET_ELEMENTS) + [ELEMENTS % BUCKET_ELEMENTS]
    encoded = {"none": lambda n: 4 * n, "int8": lambda n: 4 * -(-n // 256) + n}[codec]
    return [-(-encoded(n) // 64) * 64 for n in sizes]


def bytes_of_rounds(tmp_path: Path, workers: int, codec: str) -> list[tuple[int, int]]:
    """What went from a node to the hub of all nodes and back in some rounds, as ranks see it."""

    def count(worker: Worker) -> tuple[int, int]:
        upstream = worker.stats()["upstream"]
        return upstream["sent_bytes"], upstream["received_bytes"]

    def rounds(worker: Worker) -> tuple[int, int]:
        gradient = torch.linspace(-1, 1, ELEMENTS) * (1 + worker.rank)
        worker.declare({"x": torch.zeros(ELEMENTS)}, "mean")
        worker.push({"x": gradient}).wait()  # which takes the hyperparameters along
        worker.barrier()
        sent, received = count(worker)
        for _ in range(BYTE_ROUNDS):
            worker.push({"x": gradient}).wait()
        worker.barrier()
        now = count(worker)
        return now[0] - sent, now[1] - received

    codecs = {"compression": codec, "pull_compression": codec}
    with nodes(tmp_path, workers=workers, **codecs) as cluster, cluster.workers() as all_:
        return at_once(*(partial(rounds, w) for w in all_))


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_the_bytes_of_a_node_are_those_of_one_worker(
    tmp_path: Path, codec: str, workers: int
) -> None:
    buckets = bucket_bytes(codec)
    up, down = sum(buckets), sum(buckets) + STEP_BYTES * len(buckets)
    counted = bytes_of_rounds(tmp_path, workers, codec)
    assert counted == [(BYTE_ROUNDS * up, BYTE_ROUNDS * down)] * 2 * workers


# --- joining ------------------------------------------------------------------------------------


def test_another_model_on_one_node_is_named(cluster):
    def declare(worker: Worker) -> str:
        size = 10 if worker.rank < 2 else 11
        if worker.rank < 2:
            with pytest.raises(WaitTimeout) as timeout:
                worker.declare({"x": torch.zeros(size)}, "sum")
            return str(timeout.value)
        with pytest.raises(LayoutMismatch) as caught:
            worker.declare({"x": torch.zeros(size)}, "sum")
        return str(caught.value)

    with cluster.workers() as workers:
        for worker in workers:
            worker._session.settings = worker._session.settings.replace(timeout_s=2)
        first, second, third, fourth = at_once(*(partial(declare, w) for w in workers))
    assert "'x' is (11,)" in third
    assert third == fourth
    assert "hub of all nodes" in third
    assert "ranks [2, 3] have not joined" in first
    assert first == second


def test_another_model_within_a_node_is_its_workers_to_hear(cluster):
    """It comes first, and waits for the lowest rank of its node, whose model is the node's."""
    with ExitStack() as stack:
        workers = [stack.enter_context(cluster.worker(rank)) for rank in range(4)]
        errors: list[Exception] = []

        def declare_another() -> None:
            try:
                workers[3].declare({"x": torch.zeros(11)}, "sum")
            except LayoutMismatch as error:
                errors.append(error)
                workers[3].close()
                with cluster.worker(3) as again:
                    again.declare({"x": torch.zeros(10)}, "sum")

        first = threading.Thread(target=declare_another)
        first.start()
        workers[2].stats()  # takes its turn after the declaration, or before: both are to work
        at_once(*(partial(w.declare, {"x": torch.zeros(10)}, "sum") for w in workers[:3]))
        first.join()
    assert "'x' is (11,) on rank 3 but (10,) on rank 2" in str(errors[0])


def test_a_worker_that_is_missing_on_another_node_is_named(cluster):
    workers = [cluster.worker(rank) for rank in (0, 1, 2)]
    for worker in workers:
        worker._session.settings = worker._session.settings.replace(timeout_s=2)

    def declare(worker: Worker) -> str:
        with pytest.raises(WaitTimeout) as caught:
            worker.declare({"x": torch.zeros(3)}, "sum")
        return str(caught.value)

    try:
        texts = at_once(*(partial(declare, w) for w in workers))
    finally:
        for worker in workers:
            worker.close()
    assert "ranks [2, 3] have not joined" in texts[0]
    assert "ranks [3] have not joined" in texts[2]


def test_ranks_of_other_nodes_are_refused(cluster):
    with pytest.raises(RankOutOfRange, match="rank 2 is not 0 to 1, the ranks of this node's hub"):
        Worker(cluster.hubs[0].address, rank=2, world_size=4)


def test_a_worker_without_a_rank_gets_one_of_its_node(cluster):
    with Worker(cluster.hubs[1].address) as worker:
        assert (worker.rank, worker.world_size) == (2, 4)


def test_nobody_joins_a_running_job(cluster):
    def begin(worker: Worker) -> None:
        worker.declare({"x": torch.zeros(3)}, "add")

    with cluster.workers() as workers:
        at_once(*(partial(begin, w) for w in workers))
        workers[3].close()
        with (
            cluster.worker(3) as again,
            pytest.raises(Rejected, match="rank 3 cannot join a running job behind a node hub"),
        ):
            begin(again)
        for worker in workers[:3]:
            worker.push({"x": torch.ones(3)})
        at_once(*(partial(worker.push({"x": torch.ones(3)}).wait) for worker in workers[:3]))


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"mode": "ssp"}, ["mode='bsp'", "mode='ssp'"]),
        ({"quorum": 0.5}, ["quorum=1", "quorum=0.5"]),
        ({"on_death": "wait"}, ["on_death='shrink'", "'wait'"]),
        ({"world_size": 3}, ["number of nodes, 2"]),
    ],
)
def test_what_a_node_hub_cannot_do_is_said_at_its_start(tmp_path, settings, names):
    with (
        pytest.raises(HubUnreachable) as caught,
        nodes(tmp_path, **settings),
    ):
        pass
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["hub", "nodes", "node_rank"])
def test_a_node_hub_says_what_it_has_to_know(tmp_path, name):
    settings = node_settings("ipc:///nowhere", 0, tmp_path, count=2, world=4)
    with pytest.raises(HubUnreachable, match=f"needs the setting {name}"):
        relay.start(settings.replace(**{name: None}))


def test_a_node_hub_that_finds_no_hub_says_where_it_looked(tmp_path):
    settings = node_settings(f"ipc://{tmp_path}/s", 0, tmp_path, count=2, world=4)
    with pytest.raises(HubUnreachable, match="no hub took a message at"):
        relay.start(settings.replace(connect_timeout_s=0.5))


# --- codecs -------------------------------------------------------------------------------------


def test_what_leaves_a_node_is_encoded_and_what_stays_is_not(tmp_path: Path) -> None:
    """int8 with feedback both ways follows plain averaging within its resolution."""
    shape, lr, rounds = (40, 300), 0.1, 12
    start = torch.randn(shape, generator=torch.Generator().manual_seed(5))

    def gradient(rank: int, round_: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * round_ + rank)
        return torch.randn(shape, generator=generator)

    truth = start.clone()
    for round_ in range(rounds):
        truth -= lr * torch.stack([gradient(rank, round_) for rank in range(4)]).mean(0)

    codecs = {"compression": "int8", "pull_compression": "int8"}
    with nodes(tmp_path, **codecs) as cluster, cluster.workers() as workers:
        at_once(*(partial(w.declare, {"w": start}, "sgd", lr=lr) for w in workers))
        assert all(w.settings.compression == "none" for w in workers)
        before = workers[0].stats()["upstream"]["sent_bytes"]  # the first weights, among others
        for round_ in range(rounds):
            works = [w.push({"w": gradient(w.rank, round_)}) for w in workers]
            at_once(*(work.wait for work in works))
        held = [w.weights("w").clone() for w in workers]
        sent = workers[0].stats()["upstream"]["sent_bytes"] - before
    for weights in held:
        assert torch.equal(weights, held[0])
    error = (held[0] - truth).norm() / (truth - start).norm()
    assert error < 0.02
    assert sent < 1.2 * rounds * start.numel(), "a byte for each parameter, and headers"
