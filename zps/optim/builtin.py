"""Rules without an optimizer: the value is the sum or mean of what was pushed, or the push."""

from __future__ import annotations

from zps import native
from zps.optim.base import Group, Rule


class NoGroup(Group):
    """No hyperparameters."""


#: value = sum of scale * contribution
SUM = Rule("sum", native.RULES["sum"], NoGroup)

#: value = that, divided
MEAN = Rule("mean", native.RULES["mean"], NoGroup)

#: value = the first contribution
ASSIGN = Rule("assign", native.RULES["assign"], NoGroup)

#: value += sum of scale * contribution
ADD = Rule("add", native.RULES["add"], NoGroup)
