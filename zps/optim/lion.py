"""Lion. Source: Chen et al., Symbolic Discovery of Optimization Algorithms (2023), algorithm 2."""

from __future__ import annotations

from zps import native
from zps.optim.base import Betas, BetasGroup, NonNegative, Rule


class LionGroup(BetasGroup):
    lr: NonNegative = 1e-4
    betas: Betas = (0.9, 0.99)
    weight_decay: NonNegative = 0.0
    maximize: bool = False


LION = Rule("lion", native.RULES["lion"], LionGroup)
