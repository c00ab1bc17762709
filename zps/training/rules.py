"""From a torch optimizer to the rule that the hub runs, and its hyperparameters as they travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zps.errors import ConfigError, UnsupportedError
from zps.optim import registry
from zps.training.lion import Lion

_NATIVE: dict[type, str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
    torch.optim.Adagrad: "adagrad",
    torch.optim.RMSprop: "rmsprop",
    Lion: "lion",
}
_UNSUPPORTED = {
    torch.optim.LBFGS: "evaluates the loss several times a step, and gradients are exchanged once",
    torch.optim.SparseAdam: "needs sparse gradients, which this version does not exchange",
}
#: What torch's constructor reads from its arguments alone, whatever a parameter group says.
_OF_CONSTRUCTOR: dict[type, tuple[str, ...]] = {torch.optim.Adagrad: ("initial_accumulator_value",)}
#: How torch computes, not what: meaningless in the hub.
_HOW = frozenset({"params", "foreach", "fused", "capturable", "differentiable", "initial_lr"})


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """A rule by the name that the hub knows it under.

    native  the hub has a kernel for it
    fixed   hyperparameters that all groups share, whatever they say
    """

    name: str
    native: bool
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def hypers(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Each group's hyperparameters in plain types; ConfigError names one that is not."""
        return [self._plain(group, index) for index, group in enumerate(groups)]

    def states(self) -> tuple[str, ...]:
        return registry.rule(self.name).states if self.native else ()

    def _plain(self, group: Mapping[str, Any], index: int) -> dict[str, Any]:
        group = {**group, **self.fixed}
        if self.native:
            names = registry.rule(self.name).group.model_fields
            group = {name: value for name, value in group.items() if name in names}
        return {
            name: _plain_value(value, f"group {index}, {name}")
            for name, value in group.items()
            if name not in _HOW
        }


def check_supported(optimizer: torch.optim.Optimizer) -> None:
    """Raise UnsupportedError for an optimizer that no exchange of gradients can serve."""
    for kind, why in _UNSUPPORTED.items():
        if isinstance(optimizer, kind):
            raise UnsupportedError(f"{kind.__name__} {why}; use another optimizer")


def rule_of(optimizer: torch.optim.Optimizer) -> RuleSpec:
    """How the hub runs `optimizer`: by a kernel of its own, or as the very class.

    Raises UnsupportedError for one that cannot run apart from the model.
    """
    kind = type(optimizer)
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise UnsupportedError("differentiable=True: gradients do not flow through a hub")
    if kind in _NATIVE:
        fixed = {name: optimizer.defaults[name] for name in _OF_CONSTRUCTOR.get(kind, ())}
        return RuleSpec(_NATIVE[kind], native=True, fixed=fixed)
    if getattr(torch.optim, kind.__name__, None) is kind:
        return RuleSpec(f"torch.optim.{kind.__name__}", native=False)
    if "<locals>" in kind.__qualname__ or kind.__module__ == "__main__":
        raise UnsupportedError(
            f"the hub cannot import {kind.__qualname__} from {kind.__module__}: move the class to "
            "a module and name it in ZPS_OPTIMIZERS, or use apply='worker'"
        )
    return RuleSpec(f"{kind.__module__}.{kind.__qualname__}", native=False)


def _plain_value(value: Any, what: str) -> Any:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ConfigError(f"{what}: a tensor of {value.numel()} elements is no hyperparameter")
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain_value(item, what) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"{what}: {type(value).__name__} cannot be sent to the hub")
