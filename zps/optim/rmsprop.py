"""torch.optim.RMSprop."""

from __future__ import annotations

from zps import native
from zps.optim.base import Group, NonNegative, Rule


class RmspropGroup(Group):
    lr: NonNegative = 1e-2
    alpha: NonNegative = 0.99
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    momentum: NonNegative = 0.0
    centered: bool = False
    maximize: bool = False


RMSPROP = Rule("rmsprop", native.RULES["rmsprop"], RmspropGroup)
