"""Optimizers that a user might have written, where a hub can import them."""

from __future__ import annotations

from typing import Any

import torch


class Signed(torch.optim.Optimizer):
    """Steps of one size, which has no default, and a count of them."""

    def __init__(self, params: Any, size: float, decay: tuple[float, float] = (0.0, 1.0)):
        super().__init__(params, {"size": size, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            assert isinstance(group["decay"], tuple)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["steps"] = state.get("steps", 0) + 1
                    shrink = group["decay"][0] / (group["decay"][1] + state["steps"])
                    p.mul_(1 - shrink).sub_(p.grad.sign(), alpha=group["size"])


class MySgd(torch.optim.SGD):
    """A subclass may do anything: it is not run by the kernel of its base."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=2 * group["lr"])


class Counting(torch.optim.Optimizer):
    """Keeps a count of steps in the group, as many optimizers outside torch do."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] / group["count"])


class Failing(torch.optim.SGD):
    """Works once."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step()
        self.step = self._fail  # type: ignore[method-assign]

    def _fail(self, closure: Any = None) -> Any:
        raise RuntimeError("no more steps")


def not_an_optimizer(params: Any) -> None:
    """Importable, and of no use."""
