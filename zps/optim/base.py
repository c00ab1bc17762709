"""What every rule has in common: checked hyperparameters, packed for a kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from zps import native
from zps.errors import ConfigError

#: Zero or more, as torch.optim demands of rates, decays and epsilons.
NonNegative = Annotated[float, Field(ge=0)]

#: A decay rate of a running average.
Beta = Annotated[float, Field(ge=0, lt=1)]

#: A pair of decay rates; messages carry it as a list.
Betas = Annotated[
    tuple[Beta, Beta], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]


class Group(BaseModel):
    """The hyperparameters of one parameter group, with torch's names and defaults."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    def columns(self) -> dict[str, float]:
        """What the kernel is told, by the names in csrc/optim; more than it asks for is fine."""
        return self.model_dump()

    def initial(self) -> dict[str, float]:
        """The states that do not start at zero."""
        return {}


class BetasGroup(Group):
    """A group with a pair of betas, which kernels take one by one."""

    betas: Betas

    def columns(self) -> dict[str, float]:
        beta1, beta2 = self.betas
        return {**super().columns(), "beta1": beta1, "beta2": beta2}


@dataclass(frozen=True, slots=True)
class Rule:
    """How gradients change weights.

    name    the rule's name in settings and messages
    facts   the kernel: its id, the order of its hyperparameters and states
    group   the model of one group's hyperparameters
    """

    name: str
    facts: native.RuleFacts
    group: type[Group]

    @property
    def kernel(self) -> int:
        return self.facts.kernel

    @property
    def states(self) -> tuple[str, ...]:
        """torch's state names, in the order of native.Job.state_ptrs."""
        return self.facts.states

    def pack(self, groups: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Check the groups and lay them out for native.Job.hypers, one row each.

        A hyperparameter that a group leaves out has torch's default. Raises ConfigError naming the
        group and the field.
        """
        packed = np.zeros((len(groups), len(self.facts.hypers)))
        for row, group in enumerate(groups):
            columns = self._checked(group, row).columns()
            packed[row] = [columns[name] for name in self.facts.hypers]
        return packed

    def state_used(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The states that exist under this group's options: without momentum, no buffer."""
        return native.states_used(self.kernel, self.pack([group])[0])

    def initial(self, group: Mapping[str, Any]) -> dict[str, float]:
        """The value each state starts with."""
        return dict.fromkeys(self.states, 0.0) | self._checked(group, 0).initial()

    def _checked(self, group: Mapping[str, Any], row: int) -> Group:
        try:
            return self.group.model_validate(dict(group))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "options"
            given = f", not {first['input']!r}" if first["loc"] else ""
            text = first["msg"].removeprefix("Value error, ")
            raise ConfigError(
                f"{self.name}, group {row}, {field}: {text}{given}. "
                f"Its hyperparameters are {', '.join(self.group.model_fields) or 'none'}."
            ) from error
