"""Every rule by its name."""

from __future__ import annotations

from zps.errors import ConfigError
from zps.optim.adagrad import ADAGRAD
from zps.optim.adam import ADAM, ADAMW
from zps.optim.base import Rule
from zps.optim.builtin import ADD, ASSIGN, MEAN, SUM
from zps.optim.lion import LION
from zps.optim.rmsprop import RMSPROP
from zps.optim.sgd import SGD

RULES: dict[str, Rule] = {
    rule.name: rule for rule in (SGD, ADAM, ADAMW, ADAGRAD, RMSPROP, LION, SUM, MEAN, ASSIGN, ADD)
}


def rule(name: str) -> Rule:
    """The rule of this name. Raises ConfigError, listing the names, if there is none."""
    if name not in RULES:
        raise ConfigError(f"there is no rule {name!r}; the rules are {', '.join(RULES)}")
    return RULES[name]
