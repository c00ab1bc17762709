"""Handwritten digits, learned by several processes that share one model through a hub.

    zps launch -n 2 examples/digits.py
    python examples/digits.py                 # one worker; zps starts a hub by itself

Real data (scikit-learn's 1,797 scans of 8 x 8 pixels), a fixed split, and a real bar to clear: exit
code 1 if the network that comes out recognises fewer than 97 % of the test digits.
"""

from __future__ import annotations

import sys
import time
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import zps


class Net(nn.Module):
    """Two convolutions and two dense layers, about 38,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, test images, train labels, test labels), the same in every process."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(x / 16, dtype=torch.float32) for x in parts[:2])
    train_y, test_y = (torch.tensor(y, dtype=torch.int64) for y in parts[2:])
    return train_x.view(-1, 1, 8, 8), test_x.view(-1, 1, 8, 8), train_y, test_y


def jitter(images: Tensor) -> Tensor:
    """The same images, moved by up to a pixel: a digit is the same digit a little to the left."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return images.roll((down, right), (2, 3))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main(
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per worker and round.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak of the schedule.")] = 4e-3,
    seed: int = 0,
    min_accuracy: Annotated[float, typer.Option(help="Exit code 1 below it, in per cent.")] = 97.0,
) -> None:
    """Train, test, and print what it took."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # more would only get in each other's way: the network is tiny
    train_x, test_x, train_y, test_y = load()

    zps.init()
    rank, workers = zps.rank(), zps.world_size()
    model = Net()
    opt = zps.Optimizer(torch.optim.AdamW(model.parameters(), lr=lr), model)
    # Every worker takes the same number of rounds, and each epoch deals the samples out anew.
    rounds = len(train_x) // (workers * batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=epochs * rounds)
    dealer = torch.Generator().manual_seed(seed)

    progress = Progress(
        TextColumn("loss {task.fields[loss]:.3f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        disable=rank != 0 or not sys.stdout.isatty(),
    )
    begin = time.perf_counter()
    with progress:
        bar = progress.add_task("rounds", total=epochs * rounds, loss=float("nan"))
        for _ in range(epochs):
            order = torch.randperm(len(train_x), generator=dealer)
            for batch in order[rank::workers].split(batch_size)[:rounds]:
                opt.zero_grad()
                logits = model(jitter(train_x[batch]))
                loss = nn.functional.cross_entropy(logits, train_y[batch])
                loss.backward()
                opt.step()
                schedule.step()
                progress.update(bar, advance=1, loss=loss.item())
    elapsed_s = time.perf_counter() - begin

    share = accuracy(model, test_x, test_y) * 100 if rank == 0 else 0.0
    zps.shutdown()
    if rank != 0:
        return
    total = epochs * rounds
    print(f"test accuracy {share:.2f} % of {len(test_y)} digits")
    print(
        f"throughput {total * batch_size * workers / elapsed_s:,.0f} samples/s, "
        f"{total / elapsed_s:,.1f} rounds/s, {elapsed_s / total * 1e3:.2f} ms per round, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {workers} workers"
    )
    if share < min_accuracy:
        raise SystemExit(f"test accuracy is below {min_accuracy:g} %")


if __name__ == "__main__":
    typer.run(main)
