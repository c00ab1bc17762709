"""What a worker with codecs keeps in memory, and what it counts as having left."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.workers import Crew, together
from zps import Worker
from zps.codec.plan import Plan
from zps.codec.spec import Compression
from zps.core.layout import Layout, Param
from zps.worker.encoder import Encoder

HUB = {"compression": "int8; raw=int8:ef=false; plain=none; half=topk", "compression_min_bytes": 0}
N = 3000
TENSORS = {
    "coded": torch.zeros(N),
    "raw": torch.zeros(N),
    "plain": torch.zeros(N),
    "half": torch.zeros(N, dtype=torch.bfloat16),
}


def staged(worker: Worker) -> set[str]:
    """The tensors of which this worker keeps a gradient of its own, in full."""
    names = list(worker.layout.index)
    return {names[index] for index in worker.model._staged}


def gradients() -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(tensor) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("link", ["shm", "message"])
def test_a_gradient_is_kept_whole_only_for_a_loop_that_asks_for_its_slot(crew: Crew, link: str):
    with together(crew.hub(**HUB).address, TENSORS, world=1, link=link) as (worker,):
        worker.push(gradients()).wait()
        assert staged(worker) == set()
        slot = worker.slot("half")
        assert (slot.shape, slot.dtype) == ((N,), torch.bfloat16)
        assert slot.data_ptr() == worker.slot("half").data_ptr()
        assert worker.slot("plain").data_ptr() == worker.slot("plain").data_ptr()
        assert staged(worker) == {"half"}
        worker.push(gradients()).wait()
        assert staged(worker) == {"half"}


@pytest.mark.parametrize("link", ["shm", "message"])
def test_what_is_lost_takes_memory_only_where_it_is_fed_back(crew: Crew, link: str):
    with together(crew.hub(**HUB).address, TENSORS, world=1, link=link) as (worker,):
        (channel,) = worker.channels
        residual = channel.encoder._residual
        assert residual is not None
        padding = 16 * len(worker.layout.pieces)
        assert 2 * N <= residual.nbytes // 8 <= 2 * N + padding  # `coded` and `half`, twice, fp32
        slots = channel.link.slots.nbytes
        whole = sum(tensor.nbytes for tensor in TENSORS.values())
        assert slots < 0.6 * whole


@pytest.mark.parametrize("compression", ["none", "int8:ef=false", "bf16", "randk"])
def test_nothing_is_kept_where_nothing_is_fed_back(crew: Crew, compression: str):
    hub = crew.hub(compression=compression, compression_min_bytes=0)
    with together(hub.address, TENSORS, world=1) as (worker,):
        worker.push(gradients()).wait()
        assert staged(worker) == set()
        assert worker.channels[0].encoder._residual is None


# --- what has left ------------------------------------------------------------------------------

COUNT = 100
LAYOUT = Layout.build(
    [Param("a", (COUNT,), "float32"), Param("b", (COUNT,), "float32")], bucket_bytes=4096, fuse=True
)


class One:
    """An encoder of two tensors in one bucket, and what would be decoded of the first."""

    def __init__(self) -> None:
        self.plan = Plan.build(LAYOUT, Compression.parse("topk:ratio=0.1"))
        self.slots = np.zeros(self.plan.total_bytes, np.uint8)
        self.encoder = Encoder(self.plan, self.slots, stream=0)
        self.grads = torch.randn(2, COUNT, generator=torch.Generator().manual_seed(0))

    def encode(self, factor: float = 1.0, scale: float = 1.0) -> bytes:
        for param, grad in enumerate(self.grads):
            self.encoder.encode(param, grad * factor, scale)
        return self.slots.tobytes()

    def push(self, scale: float = 1.0) -> None:
        self.encode(scale, scale)
        self.encoder.commit([0], scale)


def test_a_gradient_may_be_encoded_again_until_it_leaves() -> None:
    one = One()
    one.push()
    first = one.encode()
    one.encode(7.0)
    assert one.encode() == first
    one.encoder.commit([0], 1.0)
    assert one.encode() != first


def test_what_is_withheld_or_taken_back_leaves_what_was_lost_before() -> None:
    one = One()
    one.push()
    expected = one.encode()
    one.encode(7.0)
    one.encoder.withhold([0])
    assert one.encode() == expected
    one.encoder.withhold([0])
    one.encoder.revert([0])  # the round was skipped, as this worker had said
    assert one.encode() == expected
    one.push()
    one.encoder.revert([0])
    one.encoder.revert([0])
    assert one.encode() == expected


def test_a_gradient_that_is_not_finite_loses_nothing_and_its_neighbour_does() -> None:
    one, other = One(), One()
    for each in (one, other):
        each.push()
    good = one.grads.clone()
    one.grads[0, 3] = torch.nan
    one.push()
    one.grads = good
    # The same with a first gradient that is absent.
    other.encode()
    other.encoder.commit([0], 1.0, absent=[0])
    assert one.encode() == other.encode()


def test_what_was_lost_follows_the_scale_of_the_loss() -> None:
    one, other = One(), One()
    for scale in (1.0, 4.0, 0.5):
        one.push()
        other.push(scale)
    decoded = []
    for each, scale in ((one, 1.0), (other, 64.0)):
        each.encode(scale, scale)
        encoding = each.encoder._pieces[0][0].encoding
        out = np.zeros(COUNT, np.float32)
        encoding.decode(int(each.slots.ctypes.data), int(out.ctypes.data))
        decoded.append(out / scale)
    assert np.array_equal(*decoded)
    assert decoded[0].any()
