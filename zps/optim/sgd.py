"""torch.optim.SGD."""

from __future__ import annotations

from pydantic import model_validator
from typing_extensions import Self

from zps import native
from zps.optim.base import Group, NonNegative, Rule


class SgdGroup(Group):
    lr: NonNegative = 1e-3
    momentum: NonNegative = 0.0
    dampening: float = 0.0
    weight_decay: NonNegative = 0.0
    nesterov: bool = False
    maximize: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs a momentum above 0 and a dampening of 0")
        return self


#: The momentum buffer starts as the first gradient, not as zero: the kernel knows by step 1.
SGD = Rule("sgd", native.RULES["sgd"], SgdGroup)
