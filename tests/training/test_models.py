"""Models with everything that real ones have, in two workers as in one process."""

from __future__ import annotations

import copy
import io
import multiprocessing
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import zps
from tests.training.reference import (
    assert_close,
    assert_same_bits,
    average,
    gradients,
    set_gradients,
    values,
)
from tests.workers import Context
from zps.wire.messages import MAX_PUSH_BUCKETS

LINKS = ("shm", "message")

ROUNDS = 20
BATCH = 8  # of one worker; a power of two, see Everything
HALF = (torch.bfloat16, torch.float16)
UNFREEZE_AT = 8


def seldom_used(round_: int) -> bool:
    return round_ % 3 == 1


class Everything(nn.Module):
    """Tied weights, a frozen layer, a layer that is seldom used, BatchNorm, narrow parameters.

    The loss is linear in the narrow parameters, with small integers over a power of two as their
    gradients: these are exact in bfloat16 and float16 however a batch is cut. So all that rounds is
    the weight itself, which the hub does from its fp32 master, and so does the comparison.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.frozen = nn.Linear(8, 8)
        self.seldom = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.decode = nn.Linear(8, 11, bias=False)
        self.decode.weight = self.embed.weight
        self.bf16 = nn.Parameter(torch.randn(6).bfloat16())
        self.fp16 = nn.Parameter(torch.randn(3, 2).half())
        self.frozen.requires_grad_(False)

    def loss(self, ids: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor, round_: int):
        h = torch.tanh(self.frozen(self.embed(ids)))
        if seldom_used(round_):
            h = h + self.seldom(h)
        loss = F.cross_entropy(self.decode(self.norm(h)), targets)
        for p in (self.bf16, self.fp16.view(-1)):
            loss = loss + (p * counts.to(p.dtype)).float().sum() / len(ids)
        return loss


def new_model(seed: int = 0) -> Everything:
    torch.manual_seed(seed)
    model = Everything()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


def batch(rank: int, round_: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1000 * round_ + rank)
    ids = torch.randint(0, 11, (BATCH,), generator=generator)
    targets = torch.randint(0, 11, (BATCH,), generator=generator)
    return ids, targets, torch.randint(-3, 4, (BATCH, 6), generator=generator)


OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3, "eps": 1e-4}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-2, "eps": 1e-4}),
}


def train_everything(ctx: Context, name: str, *, overlap: bool) -> Any:
    kind, options = OPTIMIZERS[name]
    model = new_model(seed=ctx.rank)  # rank 0's becomes everyone's
    base = kind(model.parameters(), **options)
    opt = zps.Optimizer(base, model, overlap=overlap, worker=ctx.worker())
    for round_ in range(ROUNDS):
        if round_ == UNFREEZE_AT:
            model.frozen.requires_grad_(True)
        opt.zero_grad()
        model.loss(*batch(ctx.rank, round_), round_).backward()
        opt.step()
    assert model.decode.weight is model.embed.weight
    return {name: value.clone() for name, value in model.state_dict().items()}


def train_everything_alone(name: str) -> dict[str, torch.Tensor]:
    """On the concatenated batch, with an fp32 master of each narrow parameter."""
    kind, options = OPTIMIZERS[name]
    model = new_model()
    params = list(model.parameters())
    masters = [nn.Parameter(p.detach().float()) if p.dtype in HALF else p for p in params]
    optimizer = kind(masters, **options)
    for round_ in range(ROUNDS):
        if round_ == UNFREEZE_AT:
            model.frozen.requires_grad_(True)
        model.zero_grad()
        whole = [torch.cat(parts) for parts in zip(batch(0, round_), batch(1, round_), strict=True)]
        model.loss(*whole, round_).backward()
        narrow = [(p, m) for p, m in zip(params, masters, strict=True) if p is not m]
        for p, master in narrow:
            master.grad = p.grad.float()
        optimizer.step()
        for p, master in narrow:
            p.data.copy_(master)
    return model.state_dict()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_workers_train_as_one_process_on_both_batches(run, name, overlap):
    expected = train_everything_alone(name)
    untrained = new_model().state_dict()
    moved = {key for key in expected if not torch.equal(expected[key], untrained[key])}
    assert {"frozen.weight", "seldom.weight", "bf16", "fp16", "embed.weight"} <= moved
    for state in run(train_everything, name, overlap=overlap):
        assert list(state) == list(expected)
        assert_close(list(state.values()), list(expected.values()))
        assert_same_bits([state["bf16"], state["fp16"]], [expected["bf16"], expected["fp16"]])


def train_with_forked_loader(ctx: Context) -> list[torch.Tensor]:
    """The loader's processes are forked from one that has a worker, at every epoch."""
    multiprocessing.current_process()._config["daemon"] = False  # may have children here
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    opt = zps.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, worker=ctx.worker())
    data = TensorDataset(torch.arange(24.0).view(8, 3) / 24)
    for _ in range(2):
        for (x,) in DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context="fork"):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
    return values(model.parameters())


def test_data_may_come_from_forked_processes(run):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in 2 * (torch.arange(24.0).view(8, 3) / 24).split(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for result in run(train_with_forked_loader):
        assert_close(result, values(model.parameters()))


def train_many_buckets(ctx: Context) -> Any:
    """More buckets than one message names, in one tensor."""
    param = nn.Parameter(torch.ones(1100, 1024))
    worker = ctx.worker()
    opt = zps.Optimizer(torch.optim.SGD([param], lr=0.1), max_grad_norm=1e9, worker=worker)
    for _ in range(2):
        opt.zero_grad()
        (param * (1.0 + ctx.rank)).sum().backward()
        opt.step()
    return len(worker.layout.buckets), param.detach().aminmax()


def test_a_tensor_may_take_more_buckets_than_a_message_names(run):
    for buckets, (least, most) in run(train_many_buckets):
        assert buckets == 1100 > MAX_PUSH_BUCKETS
        assert abs(least - 0.7) < 1e-6
        assert least == most


# --- shapes and strides -----------------------------------------------------------------------


def odd_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(4)
    return [
        nn.Parameter(torch.randn(shape, generator=generator))
        for shape in [(0,), (3, 0, 2), (), (1,), (7, 5), (4, 3, 6, 6)]
    ]


def odd_gradients(params: list[nn.Parameter], rank: int, round_: int) -> list[torch.Tensor]:
    """Gradients that are transposed, expanded, sliced, or in another memory format."""
    *_, matrix, image = grads = gradients(params, rank, round_)
    grads[3] = torch.full((1, 1), 0.5 + rank).expand(1, 4)[0, 1:2]
    grads[4] = matrix.t().contiguous().t() if round_ % 2 else matrix[0, 0].expand(7, 5)
    grads[5] = image.to(memory_format=torch.channels_last)
    return grads


def train_odd_shapes(ctx: Context) -> list[torch.Tensor]:
    params = odd_params()
    params[4].data = params[4].data.t().contiguous().t()
    params[5].data = params[5].data.to(memory_format=torch.channels_last)
    opt = zps.Optimizer(torch.optim.Adam(params, lr=0.1), worker=ctx.worker())
    for round_ in range(4):
        for p, grad in zip(params, odd_gradients(params, ctx.rank, round_), strict=True):
            p.grad = grad
        opt.step()
    return values(params)


def test_shapes_without_elements_or_dimensions_and_any_strides(run):
    params = odd_params()
    optimizer = torch.optim.Adam(params, lr=0.1)
    for round_ in range(4):
        by_rank = [odd_gradients(params, rank, round_) for rank in range(2)]
        set_gradients(params, average(by_rank))
        optimizer.step()
    for result in run(train_odd_shapes):
        assert_close(result, params)


# --- buffers ----------------------------------------------------------------------------------


class Buffers(nn.Module):
    def __init__(self, rank: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.kept = nn.Parameter(torch.full((2,), float(rank)))  # not given to the optimizer
        self.register_buffer("count", torch.tensor(7 * rank))
        self.register_buffer("mask", torch.tensor([True, rank == 0]))
        self.register_buffer("table", torch.full((3, 2), rank + 0.5, dtype=torch.float64))
        self.register_buffer("narrow", torch.full((5,), rank + 0.25).bfloat16(), persistent=False)
        self.register_buffer("none", torch.empty(0, 3))
        self.register_buffer("missing", None)

    def facts(self) -> list[Any]:
        return [t.tolist() for t in (self.kept, self.count, self.mask, self.table, self.narrow)]


def follow_rank_0(ctx: Context) -> Any:
    model = Buffers(ctx.rank)
    opt = zps.Optimizer(torch.optim.SGD([model.weight], lr=0.1), model, worker=ctx.worker())
    first = model.facts()
    with torch.no_grad():
        for tensor in (*model.buffers(), model.kept):
            tensor.zero_() if ctx.rank else tensor.fill_(1)
    model.weight.grad = torch.ones(3)
    opt.step()  # buffers are everyone's own while training
    own = model.facts()
    opt.publish()
    return first, own, model.facts(), values([model.weight])


def test_buffers_and_parameters_left_out_follow_rank_0(run):
    expected = Buffers(0).facts()
    ones = [[1, 1], 1, [True, True], [[1, 1]] * 3, [1] * 5]
    zeros = [[0, 0], 0, [False, False], [[0, 0]] * 3, [0] * 5]
    for rank, (first, own, published, weights) in enumerate(run(follow_rank_0)):
        assert first == expected
        assert own == (zeros if rank else ones)
        assert published == ones
        assert_close(weights, [torch.full((3,), 0.9)])


# --- the model as an object -------------------------------------------------------------------


def save_and_copy(ctx: Context) -> Any:
    torch.manual_seed(ctx.rank)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 4))
    opt = zps.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, worker=ctx.worker())
    one, everything = io.BytesIO(), io.BytesIO()
    torch.save(model[1].bias, one)
    torch.save(model.state_dict(), everything)
    everything.seek(0)
    loaded = torch.load(everything)
    average_of_weights = copy.deepcopy(model)
    model[1].bias.grad = torch.ones(4)
    opt.step()
    return {
        "one": len(one.getvalue()),
        "everything": len(everything.getvalue()),
        "arena": sum(p.numel() * 4 for p in model.parameters()),
        "loaded": loaded,
        "copied": average_of_weights.state_dict(),
        "now": {name: value.clone() for name, value in model.state_dict().items()},
    }


@pytest.mark.parametrize("hub", [{"mode": "bsp"}, {"mode": "async"}], ids=lambda hub: hub["mode"])
def test_saving_one_parameter_does_not_save_the_arena(run, hub):
    (facts,) = run(save_and_copy, world=1, hub=hub)
    assert facts["one"] < 4096
    assert facts["everything"] < facts["arena"] + 8192
    moved = facts["now"].pop("1.bias")
    for kept in ("loaded", "copied"):
        before = facts[kept].pop("1.bias")
        assert_close([before - 0.1], [moved])
        assert facts[kept].keys() == facts["now"].keys()
        assert_same_bits(list(facts[kept].values()), list(facts["now"].values()))


def train_twice_the_same(ctx: Context) -> list[torch.Tensor]:
    """A parameter in no module, one the module knows by two names, and named parameter groups."""
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": layer})
    free = nn.Parameter(torch.zeros(2))
    with torch.no_grad():
        layer.weight.fill_(1 + ctx.rank)
        layer.bias.zero_()
    groups = [
        {"params": list(model.named_parameters())},
        {"params": [("free", free)], "lr": 1.0},
    ]
    opt = zps.Optimizer(torch.optim.SGD(groups, lr=0.1), model, worker=ctx.worker())
    assert list(opt._worker.layout.index) == ["a.weight", "a.bias", "group1.0"]
    opt.zero_grad()
    (model["b"](torch.ones(2)).sum() + free.sum()).backward()
    opt.step()
    return values([layer.weight, layer.bias, free])


def test_names_come_from_the_model(run):
    for weight, bias, free in run(train_twice_the_same):
        assert_close([weight], [torch.full((2, 2), 0.9)])
        assert_close([bias], [torch.full((2,), -0.1)])
        assert_close([free], [torch.full((2,), -1.0)])
