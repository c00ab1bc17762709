"""What each worker of bench.converge runs: learn digits, and keep what was reached when.

    zps launch -n 2 -m bench.peers.digits_loop DATA FILE EPOCHS SEED

DATA is what bench.converge has written. Rank 0 writes FILE: one JSON object, see `Curve`. The loss
is worked out when all is over: without rounds the others would go on pushing while rank 0 looks,
and their work would not count.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import zps
from zps.launch.sizes import measure
from zps.training.current import current

BATCH = 32
LOOK_EVERY = 4  # rounds
LR = 2e-3


@dataclass(slots=True)
class Curve:
    """Rank 0's way: after how many rounds, seconds and pushed bytes which loss was reached."""

    push_bytes: int  # of one worker and round
    rounds: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: float = 0.0  # of the test digits, in the end


def model() -> nn.Module:
    """About 75,000 parameters: enough that a codec has something to do."""
    layers = (nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 224), nn.ReLU(), nn.Linear(224, 10))
    return nn.Sequential(*layers)


def load(data: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, test images, train labels, test labels)"""
    with np.load(data) as parts:
        train_x, test_x, train_y, test_y = (torch.from_numpy(parts[name]) for name in parts.files)
    return train_x, test_x, train_y, test_y


def main(data: Path, file: Path, epochs: int, seed: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    train_x, test_x, train_y, test_y = load(data)
    zps.init()
    rank, workers = zps.rank(), zps.world_size()
    net, criterion = model(), nn.CrossEntropyLoss()
    # Without rounds every gradient is a step of its own: as far in all as one of their average.
    lr = LR if current().settings.mode == "bsp" else LR / workers
    opt = zps.Optimizer(torch.optim.AdamW(net.parameters(), lr=lr), net)
    curve = Curve(measure(net, current().settings).push.encoded_nbytes)
    dealer = torch.Generator().manual_seed(seed)
    each = len(train_x) // (workers * BATCH)
    number, spent_s = 0, 0.0
    passed: list[Tensor] = []  # the weights at each look

    def look() -> None:
        curve.rounds.append(number)
        curve.seconds.append(round(spent_s, 6))
        passed.append(nn.utils.parameters_to_vector(net.parameters()).detach())

    for _ in range(epochs):
        order = torch.randperm(len(train_x), generator=dealer)
        for batch in order[rank::workers].split(BATCH)[:each]:
            if rank == 0 and number % LOOK_EVERY == 0:
                look()
            began = time.perf_counter()
            opt.zero_grad()
            criterion(net(train_x[batch]), train_y[batch]).backward()
            opt.step()
            spent_s += time.perf_counter() - began
            number += 1
    if rank == 0:
        look()
    zps.shutdown()
    if rank == 0:
        outputs = [outputs_of(weights, train_x) for weights in passed]
        curve.loss = [round(float(criterion(output, train_y)), 5) for output in outputs]
        found = outputs_of(passed[-1], test_x).argmax(1)
        curve.accuracy = float((found == test_y).float().mean())
        file.write_text(json.dumps(asdict(curve)))


@torch.no_grad()
def outputs_of(weights: Tensor, images: Tensor) -> Tensor:
    """(images, 10): what a network with these weights, a flat vector, makes of the images."""
    net = model()
    nn.utils.vector_to_parameters(weights, net.parameters())
    return torch.as_tensor(net(images))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
