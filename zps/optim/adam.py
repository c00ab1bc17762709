"""torch.optim.Adam and torch.optim.AdamW: one kernel, weight decay in the gradient or beside it."""

from __future__ import annotations

from zps import native
from zps.optim.base import Betas, BetasGroup, NonNegative, Rule


class AdamGroup(BetasGroup):
    lr: NonNegative = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    amsgrad: bool = False
    maximize: bool = False
    decoupled_weight_decay: bool = False


class AdamWGroup(AdamGroup):
    weight_decay: NonNegative = 1e-2
    decoupled_weight_decay: bool = True


ADAM = Rule("adam", native.RULES["adam"], AdamGroup)
ADAMW = Rule("adamw", native.RULES["adam"], AdamWGroup)
