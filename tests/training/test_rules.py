"""How a torch optimizer is described to a hub."""

from __future__ import annotations

import pytest
import torch

import zps
from tests.training.custom import MySgd
from zps.errors import ConfigError
from zps.optim import registry
from zps.training.rules import rule_of


def params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2))]


NATIVE = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "lion": zps.Lion,
}


@pytest.mark.parametrize("name", NATIVE)
def test_a_class_with_a_kernel_is_described_by_what_its_rule_knows(name):
    optimizer = NATIVE[name](params())
    spec = rule_of(optimizer)
    assert (spec.name, spec.native) == (name, True)
    (hypers,) = spec.hypers(optimizer.param_groups)
    assert set(hypers) == set(registry.rule(name).group.model_fields) & set(
        optimizer.param_groups[0]
    )
    registry.rule(name).pack([hypers])  # takes them all


@pytest.mark.parametrize("name", [name for name in NATIVE if name != "lion"])
def test_what_only_says_how_torch_computes_is_left_out(name):
    plain = rule_of(NATIVE[name](params())).hypers(NATIVE[name](params()).param_groups)
    how = NATIVE[name](params(), foreach=True)
    torch.optim.lr_scheduler.OneCycleLR(how, 0.1, total_steps=3, cycle_momentum=False)
    (hypers,) = rule_of(how).hypers(how.param_groups)
    assert hypers.keys() == plain[0].keys()


def test_a_class_without_a_kernel_is_described_by_its_path():
    spec = rule_of(torch.optim.NAdam(params()))
    assert (spec.name, spec.native, spec.states()) == ("torch.optim.NAdam", False, ())
    assert "foreach" not in spec.hypers(torch.optim.NAdam(params()).param_groups)[0]


def test_a_subclass_is_not_taken_for_its_base():
    assert rule_of(MySgd(params())).name == "tests.training.custom.MySgd"


def test_a_learning_rate_may_be_a_tensor_of_one_element():
    optimizer = torch.optim.Adam(params(), lr=torch.tensor(0.25))
    assert rule_of(optimizer).hypers(optimizer.param_groups)[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(2), "group 0, lr: a tensor of 2 elements"),
        (object(), "group 0, lr: object cannot be sent"),
    ],
)
def test_what_cannot_be_sent_names_the_group_and_the_option(value, text):
    optimizer = torch.optim.Adam(params())
    optimizer.param_groups[0]["lr"] = value
    with pytest.raises(ConfigError, match=text):
        rule_of(optimizer).hypers(optimizer.param_groups)
