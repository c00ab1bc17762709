"""Gradients encoded for their journey: what everybody gets, and what becomes of what was lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

import zps
from tests.integration.replay import Replay, total
from tests.training.reference import assert_close, assert_same_bits, gradients, new_params, values
from tests.workers import Context, Crew, at_once, together
from zps import Worker
from zps.core.layout import Layout, Param
from zps.core.shards import Shard, cut
from zps.errors import NonFiniteGradient
from zps.memory.control import Outcome

LINKS = ("shm", "message")

ROUNDS = 4
BUCKET_BYTES = 4096

#: Each test names its tensors after the codec it wants, so that they all share one hub.
CODECS = {
    "plain": "none",
    "fp16": "fp16",
    "fp16-ef": "fp16:ef=true",
    "bf16": "bf16",
    "fp8": "fp8",
    "int8": "int8",
    "int8-16": "int8:block=16",
    "int8-raw": "int8:ef=false",
    "int4": "int4",
    "onebit": "onebit",
    "ternary": "ternary",
    "topk": "topk:ratio=0.1",
    "topk-exact": "topk:ratio=0.05,exact=true,value=fp16",
}
RANDOM = {
    "int8-random": "int8:rounding=stochastic",
    "fp8-random": "fp8:rounding=stochastic",
    "int4-random": "int4:rounding=stochastic,ef=false",
    "ternary-random": "ternary:rounding=stochastic",
    "randk": "randk:ratio=0.1",
    "randk-ef": "randk:ratio=0.1,ef=true",
}
COMPRESSION = "; ".join(
    ["none", *(f"{name}.*={codec}" for name, codec in {**CODECS, **RANDOM}.items())]
)
HUB = {"compression": COMPRESSION, "compression_min_bytes": 0}

TOPK = {"compression": "topk:ratio=0.1", "compression_min_bytes": 0}

#: Pieces in three buckets, in a whole one and in a part of one; a scalar, and nothing at all.
SHAPES = {"matrix": (43, 53), "exact": (1024,), "few": (3, 7), "scalar": (), "nothing": (0, 3)}
DTYPES = ("float32", "bfloat16", "float16")


def tensors_of(codec: str) -> dict[str, torch.Tensor]:
    """Zeros of all shapes and dtypes, named so that they have this codec."""
    return {
        f"{codec}.{dtype}.{name}": torch.zeros(shape, dtype=getattr(torch, dtype))
        for dtype in DTYPES
        for name, shape in SHAPES.items()
    }


def drawn(tensors: Mapping[str, torch.Tensor], rank: int, round_: int) -> dict[str, torch.Tensor]:
    """Gradients of one rank in one round."""
    grads = gradients(list(tensors.values()), rank, round_)
    return dict(zip(tensors, grads, strict=True))


def layout_of(tensors: Mapping[str, torch.Tensor], *, fuse: bool = False) -> Layout:
    params = [
        Param(name, tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for name, t in tensors.items()
    ]
    return Layout.build(params, bucket_bytes=BUCKET_BYTES, fuse=fuse)


def replays(
    tensors: Mapping[str, torch.Tensor],
    compression: str = COMPRESSION,
    world: int = 2,
    **options: Any,
) -> list[Replay]:
    layout = layout_of(tensors, **options)
    return [Replay(layout, compression) for _ in range(world)]


# --- what everybody gets ------------------------------------------------------------------------


def summed(ctx: Context, codec: str, *, in_place: bool = False, slow: int = -1) -> Any:
    """The sums of all rounds, as this worker sees them; rank `slow` always pushes last."""
    worker, tensors = ctx.worker(), tensors_of(codec)
    worker.declare(tensors, "sum")
    seen = []
    for round_ in range(ROUNDS):
        grads = drawn(tensors, ctx.rank, round_)
        if ctx.rank == slow:
            ctx.hear(1 - slow)
        if in_place:
            for name, grad in grads.items():
                worker.slot(name).copy_(grad)
        work = worker.push(list(grads) if in_place else grads)
        if ctx.rank == 1 - slow:
            worker.stats()  # the hub has the push when it answers
            ctx.tell(slow)
        work.wait()
        seen.append([worker.weights(name).clone() for name in tensors])
        ctx.meet()
    return seen


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_everybody_gets_the_sum_of_what_was_encoded(run, codec, in_place):
    tensors = tensors_of(codec)
    ranks = replays(tensors)
    results = run(summed, codec, in_place=in_place, hub=HUB)
    for round_ in range(ROUNDS):
        sums = total([r.send(drawn(tensors, i, round_)) for i, r in enumerate(ranks)])
        expected = [sums[name].to(t.dtype) for name, t in tensors.items()]
        for result in results:
            assert_same_bits(result[round_], expected, f"{codec} round {round_}")


@pytest.mark.parametrize("codec", ["int8", "topk", *RANDOM])
def test_the_order_in_which_gradients_arrive_changes_nothing(run, codec):
    runs = [run(summed, codec, slow=slow, hub=HUB) for slow in (0, 1)]
    for first, second in zip(*runs, strict=True):
        for mine, theirs in zip(first, second, strict=True):
            assert_same_bits(mine, theirs, codec)


def random_choices(ctx: Context) -> Any:
    """What every rank's ones become, alone, in two rounds: the others send nothing."""
    worker = ctx.worker()
    tensors = {name: torch.zeros(1000) for name in ("randk.a", "randk.b")}
    worker.declare(tensors, "sum")
    seen = {}
    for round_ in range(4):
        chosen = 1.0 if round_ % 2 == ctx.rank else 0.0
        worker.push({name: torch.full((1000,), chosen) for name in tensors}).wait()
        for name in tensors:
            seen[round_, name] = worker.weights(name).nonzero().flatten().tolist()
    return seen


def test_each_rank_round_and_tensor_makes_random_choices_of_its_own(run):
    seen, _ = run(random_choices, hub=HUB)
    assert len({tuple(indices) for indices in seen.values()}) == len(seen) == 8
    assert all(len(indices) == 100 for indices in seen.values())


def by_name(ctx: Context, tensors: Mapping[str, torch.Tensor]) -> Any:
    worker = ctx.worker()
    worker.declare(tensors, "sum")
    for round_ in range(ROUNDS):
        worker.push(drawn(tensors, ctx.rank, round_)).wait()
    return [worker.weights(name).clone() for name in tensors]


def test_a_pattern_chooses_the_codec_and_small_tensors_travel_as_they_are(run):
    text = "int4; *.bias=none; embed*=topk:ratio=0.02"
    tensors = {
        "fc.weight": torch.zeros(60, 20),
        "fc.bias": torch.zeros(600),
        "embed.weight": torch.zeros(100, 20),
        "norm.weight": torch.zeros(255),
        "half.weight": torch.zeros(511, dtype=torch.bfloat16),
        "last.weight": torch.zeros(256),
    }
    results = run(by_name, tensors, hub={"compression": text, "compression_min_bytes": 1024})
    ranks = [Replay(layout_of(tensors), text, min_bytes=1024) for _ in range(2)]
    for round_ in range(ROUNDS):
        grads = [drawn(tensors, i, round_) for i in range(2)]
        sums = total([r.send(g) for r, g in zip(ranks, grads, strict=True)])
    plain = total(grads)
    for name, tensor in tensors.items():
        as_it_is = torch.equal(sums[name].to(tensor.dtype), plain[name])
        assert as_it_is == (name in ("fc.bias", "norm.weight", "half.weight")), name
    for result in results:
        assert_same_bits(result, [sums[name].to(t.dtype) for name, t in tensors.items()])


def parts_of(shard: Shard, grads: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What one of several hubs gets of these gradients, by its own names."""
    flat = [grad.reshape(-1) for grad in grads.values()]
    return {
        param.name: flat[part.param][part.begin : part.begin + part.count]
        for param, part in zip(shard.layout.params, shard.parts, strict=True)
    }


@pytest.mark.parametrize("in_place", [False, True])
def test_each_of_several_hubs_gets_its_parts_encoded(crew: Crew, in_place):
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    hubs = [crew.hub(hub_threads=threads, **TOPK) for threads in (1, 2)]
    shards = cut(layout_of(tensors), len(hubs))
    parts = [part.param for shard in shards for part in shard.parts]
    assert len(set(parts)) < len(parts)  # one of the tensors is spread
    by_shard = [[Replay(shard.layout, TOPK["compression"]) for _ in range(2)] for shard in shards]
    with together(",".join(hub.address for hub in hubs), tensors, "sum") as workers:
        for round_ in range(ROUNDS):
            works = []
            for worker in workers:
                grads = drawn(tensors, worker.rank, round_)
                if in_place:
                    for name, grad in grads.items():
                        worker.slot(name).copy_(grad)
                works.append(worker.push(list(grads) if in_place else grads))
            at_once(*(work.wait for work in works))
            for shard, ranks in zip(shards, by_shard, strict=True):
                drawn_parts = [parts_of(shard, drawn(tensors, i, round_)) for i in range(2)]
                sums = total([r.send(g) for r, g in zip(ranks, drawn_parts, strict=True)])
                for worker in workers:
                    seen = parts_of(shard, {name: worker.weights(name) for name in tensors})
                    assert_same_bits(list(seen.values()), [s.reshape(-1) for s in sums.values()])


# --- zps.Optimizer ------------------------------------------------------------------------------

LR = 0.5  # a power of two: a step is then rounded once, whoever takes it
PARAMS = new_params()
NAMES = [f"group0.{index}" for index in range(len(PARAMS))]

Backward = Callable[[int], None]


def plain(opt: zps.Optimizer, backward: Backward) -> None:
    backward(0)


def twice(opt: zps.Optimizer, backward: Backward) -> None:
    backward(0)
    backward(1)


def forgotten(opt: zps.Optimizer, backward: Backward) -> None:
    backward(1)
    opt.zero_grad()
    backward(0)


def gathered(opt: zps.Optimizer, backward: Backward) -> None:
    with opt.no_sync():
        backward(0)
    backward(1)


def begun_alone(opt: zps.Optimizer, backward: Backward) -> None:
    """A first part goes as usual, and a second is accumulated behind its back."""
    backward(0)
    with opt.no_sync():
        backward(1)


WAYS: dict[Callable[..., None], tuple[int, ...]] = {
    plain: (0,),
    twice: (0, 1),
    forgotten: (0,),
    gathered: (0, 1),
    begun_alone: (0, 1),
}
"""How a round's gradients come to be, and which of the drawn ones they are the sum of."""


def present(rank: int, round_: int) -> list[int]:
    """The parameters that have a gradient: not all of them always, and one sometimes nowhere."""
    left_out = {1: {3 * rank, 2}, 2: {4}}.get(round_, set())
    return [index for index in range(len(NAMES)) if index not in left_out]


def loss_of(params: Sequence[torch.Tensor], rank: int, round_: int, part: int) -> torch.Tensor:
    """Its gradient is what is drawn for this part of the round."""
    grads = gradients(params, rank, 2 * round_ + part)
    return sum((params[i] * grads[i]).sum() for i in present(rank, round_))


def sent(rank: int, round_: int, parts: Sequence[int]) -> dict[str, torch.Tensor]:
    """What `p.grad` is in the end."""
    by_part = [gradients(PARAMS, rank, 2 * round_ + part) for part in parts]
    return {
        NAMES[i]: sum((grads[i] for grads in by_part[1:]), by_part[0][i])
        for i in present(rank, round_)
    }


def descend(params: list[torch.Tensor], decoded: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """SGD by the mean of what was decoded; who has no gradient counts as zeros."""
    for name, grad in total(decoded).items():
        params[NAMES.index(name)] -= LR * (grad / len(decoded))


def replay_of(world: int = 2) -> list[Replay]:
    named = dict(zip(NAMES, PARAMS, strict=True))
    return replays(named, TOPK["compression"], world, fuse=True)


def train(
    ctx: Context, way: Callable[..., None], *, overlap: bool, apply: str = "hub", **options: Any
) -> Any:
    params = new_params()
    sgd = torch.optim.SGD(params, lr=LR)
    opt = zps.Optimizer(sgd, worker=ctx.worker(), overlap=overlap, apply=apply, **options)
    seen = []
    for round_ in range(ROUNDS):
        opt.zero_grad()
        way(opt, lambda part, r=round_: loss_of(params, ctx.rank, r, part).backward())
        opt.step()
        seen.append(values(params))
    return seen


@pytest.mark.parametrize("apply", ["hub", "worker"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_was_lost_is_added_once_however_gradients_come_to_be(run, way, overlap, apply):
    results = run(train, way, overlap=overlap, apply=apply, hub=TOPK)
    ranks, params = replay_of(), values(new_params())
    for round_ in range(ROUNDS):
        descend(params, [r.send(sent(i, round_, WAYS[way])) for i, r in enumerate(ranks)])
        for result in results:
            assert_same_bits(result[round_], params, f"round {round_}")


@pytest.mark.parametrize("overlap", [True, False])
def test_the_norm_that_is_clipped_is_that_of_what_was_decoded(run, overlap):
    results = run(train, plain, overlap=overlap, max_grad_norm=2.0, hub=TOPK)
    ranks, params = replay_of(), new_params()
    sgd = torch.optim.SGD(params, lr=LR)
    for round_ in range(ROUNDS):
        sums = total([r.send(sent(i, round_, (0,))) for i, r in enumerate(ranks)])
        for name, param in zip(NAMES, params, strict=True):
            param.grad = sums[name] / 2 if name in sums else None
        norm = torch.nn.utils.clip_grad_norm_(params, 2.0)
        assert norm > 4.0
        sgd.step()
        for result in results:
            assert_close(result[round_], values(params), f"round {round_}")


def train_half(ctx: Context, *, overlap: bool) -> Any:
    params = half_params()
    sgd = torch.optim.SGD(params, lr=LR)
    opt = zps.Optimizer(sgd, worker=ctx.worker(), overlap=overlap)
    for round_ in range(ROUNDS):
        opt.zero_grad()
        loss_of(params, ctx.rank, round_, 0).backward()
        opt.step()
    return values(params)


def half_params() -> list[torch.nn.Parameter]:
    dtypes = [torch.float16, torch.float32, torch.bfloat16]
    return [
        torch.nn.Parameter(p.detach().to(dtypes[index % 3])) for index, p in enumerate(new_params())
    ]


@pytest.mark.parametrize("overlap", [True, False])
def test_half_parameters_have_their_gradients_encoded_as_they_are(run, overlap):
    results = run(train_half, overlap=overlap, hub=TOPK)
    params = half_params()
    named = dict(zip(NAMES, params, strict=True))
    in_order = dict(sorted(named.items(), key=lambda item: str(item[1].dtype)))
    ranks = replays(in_order, TOPK["compression"], fuse=True)
    masters = [p.detach().float() for p in params]
    for round_ in range(ROUNDS):
        decoded = []
        for rank, replay in enumerate(ranks):
            grads = gradients(params, rank, 2 * round_)
            decoded.append(replay.send({NAMES[i]: grads[i] for i in present(rank, round_)}))
        descend(masters, decoded)
    for result in results:
        expected = [master.to(p.dtype) for master, p in zip(masters, params, strict=True)]
        assert_same_bits(result, expected)


class Tied(torch.nn.Module):
    """One matrix, used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = torch.nn.Linear(30, 30)
        self.outer = torch.nn.Linear(30, 30)
        self.outer.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x).relu())


def tied_batch(rank: int, round_: int) -> torch.Tensor:
    return torch.randn(8, 30, generator=torch.Generator().manual_seed(10 * round_ + rank))


def train_tied(ctx: Context, *, overlap: bool) -> Any:
    model = Tied()
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    opt = zps.Optimizer(sgd, model, overlap=overlap, worker=ctx.worker())
    for round_ in range(ROUNDS):
        opt.zero_grad()
        model(tied_batch(ctx.rank, round_)).square().mean().backward()
        opt.step()
    return values(list(model.parameters()))


@pytest.mark.parametrize("overlap", [True, False])
def test_tied_weights_are_encoded_once_with_the_sum_of_both_uses(run, overlap):
    results = run(train_tied, overlap=overlap, hub=TOPK)
    model = Tied()
    named = {name: p.detach() for name, p in model.named_parameters()}
    ranks = replays(named, TOPK["compression"], fuse=True)
    for round_ in range(ROUNDS):
        decoded = []
        for rank, replay in enumerate(ranks):
            model.zero_grad()
            model(tied_batch(rank, round_)).square().mean().backward()
            decoded.append(replay.send({n: p.grad for n, p in model.named_parameters()}))
        sums = total(decoded)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param -= LR * (sums[name] / 2)
    for result in results:
        assert_close(result, values(list(model.parameters())))


# --- scales and infinities ----------------------------------------------------------------------

BAD_ROUND = 2


def train_scaled(ctx: Context, *, overlap: bool, unscale: bool) -> Any:
    """The scale doubles after every good round; in one round rank 1 finds an infinity."""
    params = new_params()
    sgd = torch.optim.SGD(params, lr=LR)
    opt = zps.Optimizer(sgd, worker=ctx.worker(), overlap=overlap)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1)
    scales, seen = [], []
    for round_ in range(ROUNDS + 2):
        opt.zero_grad()
        loss = loss_of(params, ctx.rank, round_, 0)
        if round_ == BAD_ROUND and ctx.rank == 1:
            loss = loss * torch.inf
        scales.append(scaler.get_scale())
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        seen.append(values(params))
    return scales, seen


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("overlap", [True, False])
def test_what_was_lost_is_kept_in_the_unit_of_the_loss(run, overlap, unscale):
    results = run(train_scaled, overlap=overlap, unscale=unscale, hub=TOPK)
    scales = [scales for scales, _ in results]
    assert scales[0] == [16.0, 32.0, 64.0, 128.0, 256.0, 512.0]  # nothing is wrong here
    assert scales[1] == [16.0, 32.0, 64.0, 32.0, 64.0, 128.0]
    ranks, params = replay_of(), values(new_params())
    for round_ in range(ROUNDS + 2):
        if round_ != BAD_ROUND:
            decoded = []
            for rank, replay in enumerate(ranks):
                scale = 1.0 if unscale else scales[rank][round_]
                grads = {n: g * scale for n, g in sent(rank, round_, (0,)).items()}
                sums = replay.send(grads, scale=scale)
                decoded.append({name: grad / scale for name, grad in sums.items()})
            descend(params, decoded)
        for _, seen in results:
            assert_same_bits(seen[round_], params, f"round {round_}")


def train_skipping(ctx: Context, *, overlap: bool) -> Any:
    params = new_params()
    worker = ctx.worker(nonfinite="skip")
    opt = zps.Optimizer(torch.optim.SGD(params, lr=LR), worker=worker, overlap=overlap)
    seen = []
    for round_ in range(ROUNDS + 1):
        opt.zero_grad()
        loss = loss_of(params, ctx.rank, round_, 0)
        (loss * torch.nan if round_ == BAD_ROUND and ctx.rank == 1 else loss).backward()
        opt.step()
        seen.append(values(params))
    return seen


@pytest.mark.parametrize("overlap", [True, False])
def test_a_round_that_is_skipped_leaves_what_was_lost_before_with_everybody(run, overlap):
    results = run(train_skipping, overlap=overlap, hub=TOPK)
    ranks, params = replay_of(), values(new_params())
    for round_ in range(ROUNDS + 1):
        if round_ != BAD_ROUND:
            descend(params, [r.send(sent(i, round_, (0,))) for i, r in enumerate(ranks)])
        for result in results:
            assert_same_bits(result[round_], params, f"round {round_}")


def train_raising(ctx: Context, *, overlap: bool) -> Any:
    params = new_params()
    opt = zps.Optimizer(torch.optim.SGD(params, lr=LR), worker=ctx.worker(), overlap=overlap)
    for round_ in range(ROUNDS):
        if ctx.rank == 1 and round_ == BAD_ROUND:
            opt.zero_grad()
            (loss_of(params, ctx.rank, round_, 1) * torch.nan).backward()
            with pytest.raises(NonFiniteGradient):
                opt.step()
        opt.zero_grad()
        loss_of(params, ctx.rank, round_, 0).backward()
        opt.step()
    return values(params)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_gradient_that_was_refused_leaves_what_was_lost_before(run, overlap):
    results = run(train_raising, overlap=overlap, hub=TOPK)
    ranks, params = replay_of(), values(new_params())
    for round_ in range(ROUNDS):
        descend(params, [r.send(sent(i, round_, (0,))) for i, r in enumerate(ranks)])
    for result in results:
        assert_same_bits(result, params)


# --- pushes that come to nothing ----------------------------------------------------------------

N = 3000
W = {"w": torch.zeros(N)}


def grad_of(rank: int, round_: int) -> dict[str, torch.Tensor]:
    return drawn(W, rank, round_)


def assert_sum(workers: Sequence[Worker], decoded: Sequence[Mapping[str, torch.Tensor]]) -> None:
    for worker in workers:
        worker.pull()
        assert_same_bits([worker.weights("w")], [total(decoded)["w"]])


def push_all(workers: Sequence[Worker], round_: int) -> None:
    works = [worker.push(grad_of(worker.rank, round_)) for worker in workers]
    at_once(*(work.wait for work in works))


def test_an_empty_batch_leaves_what_was_lost_before(crew: Crew):
    with together(crew.hub(**TOPK).address, W, "sum") as workers:
        ranks = replays(W, TOPK["compression"])
        for round_ in range(ROUNDS):
            works = [
                w.push(grad_of(w.rank, round_), samples=float(round_ != 1 or w.rank == 0))
                for w in workers
            ]
            at_once(*(work.wait for work in works))
            counted = ranks if round_ != 1 else ranks[:1]
            decoded = [r.send(grad_of(i, round_)) for i, r in enumerate(counted)]
            assert_sum(workers, decoded)


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "allow"])
def test_a_bad_gradient_leaves_what_was_lost_before(crew: Crew, nonfinite):
    with together(crew.hub(**TOPK).address, W, "sum", nonfinite=nonfinite) as workers:
        ranks = replays(W, TOPK["compression"])
        push_all(workers, 0)
        assert_sum(workers, [r.send(grad_of(i, 0)) for i, r in enumerate(ranks)])
        bad = grad_of(1, 1)
        bad["w"][7] = torch.nan
        if nonfinite == "raise":
            with pytest.raises(NonFiniteGradient):
                workers[1].push(bad)
        else:
            works = [workers[0].push(grad_of(0, 1)), workers[1].push(bad)]
            at_once(*(work.wait for work in works))
            alone = ranks[0].send(grad_of(0, 1))
            if nonfinite == "skip":
                assert_sum(workers, [alone])
            else:
                assert bool(workers[0].weights("w")[7].isnan())
        for round_ in (2, 3):
            push_all(workers, round_)
            assert_sum(workers, [r.send(grad_of(i, round_)) for i, r in enumerate(ranks)])


@pytest.mark.parametrize("waited", [True, False])
def test_a_late_gradient_gives_back_what_it_took_along(crew: Crew, waited):
    with together(crew.hub(quorum=0.5, **TOPK).address, W, "sum") as (fast, slow):
        early, late = replays(W, TOPK["compression"])
        slow.push(grad_of(1, 0)).wait()
        late.send(grad_of(1, 0))
        for round_ in range(3):
            fast.pull()
            fast.push(grad_of(0, round_)).wait()
            early.send(grad_of(0, round_))
        # It has not pulled, so this was computed for a round that is over.
        work = slow.push(grad_of(1, 1))
        if waited:
            assert set(work.wait().outcomes) == {Outcome.LATE}
        slow.stats()
        slow.pull()
        assert set(slow.push(grad_of(1, 2)).wait().outcomes) == {Outcome.APPLIED}
        assert_sum([slow], [late.send(grad_of(1, 2))])
        work.wait()  # at last; what became of it is known already
        slow.pull()
        slow.push(grad_of(1, 3)).wait()
        assert_sum([slow], [late.send(grad_of(1, 3))])


@pytest.mark.parametrize("mode", ["async", "ssp"])
def test_what_is_applied_on_arrival_is_encoded_with_what_was_lost_before(crew: Crew, mode):
    hub = crew.hub(mode=mode, staleness=2, **TOPK)
    with together(hub.address, W, "add") as workers:
        ranks, value = replays(W, TOPK["compression"]), torch.zeros(N)
        for round_ in range(ROUNDS):
            for worker, replay in zip(workers, ranks, strict=True):
                worker.push(grad_of(worker.rank, round_)).wait()
                value += replay.send(grad_of(worker.rank, round_))["w"]
        assert_sum(workers, [{"w": value}])


@pytest.mark.parametrize("waited", [True, False])
def test_a_gradient_that_is_too_stale_gives_back_what_it_took_along(crew: Crew, waited):
    hub = crew.hub(mode="async", staleness_policy="drop", staleness=1, **TOPK)
    with together(hub.address, W, "add") as (fast, slow):
        (early, late), value = replays(W, TOPK["compression"]), torch.zeros(N)
        slow.push(grad_of(1, 0)).wait()
        value += late.send(grad_of(1, 0))["w"]
        for round_ in range(3):
            fast.pull()
            fast.push(grad_of(0, round_)).wait()
            value += early.send(grad_of(0, round_))["w"]
        work = slow.push(grad_of(1, 1))
        if waited:
            assert set(work.wait().outcomes) == {Outcome.STALE}
        slow.stats()
        for round_ in (2, 3):
            slow.pull()
            assert set(slow.push(grad_of(1, round_)).wait().outcomes) == {Outcome.APPLIED}
            value += late.send(grad_of(1, round_))["w"]
        assert_sum([slow], [{"w": value}])
