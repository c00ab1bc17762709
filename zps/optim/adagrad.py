"""torch.optim.Adagrad."""

from __future__ import annotations

from zps import native
from zps.optim.base import Group, NonNegative, Rule


class AdagradGroup(Group):
    lr: NonNegative = 1e-2
    lr_decay: NonNegative = 0.0
    weight_decay: NonNegative = 0.0
    initial_accumulator_value: NonNegative = 0.0
    eps: NonNegative = 1e-10
    maximize: bool = False

    def initial(self) -> dict[str, float]:
        return {"sum": self.initial_accumulator_value}


ADAGRAD = Rule("adagrad", native.RULES["adagrad"], AdagradGroup)
