"""Hyperparameters: torch's names and defaults, checked, packed in the kernel's order."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from zps import native
from zps.errors import ConfigError
from zps.optim.registry import RULES, rule

TORCH = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
HOW_TORCH_RUNS = {"foreach", "fused", "capturable", "differentiable", "params", "self"}


@pytest.mark.parametrize("name", TORCH)
def test_names_and_defaults_are_torchs(name):
    theirs = {
        parameter.name: parameter.default
        for parameter in inspect.signature(TORCH[name].__init__).parameters.values()
        if parameter.name not in HOW_TORCH_RUNS
    }
    mine = {key: field.default for key, field in rule(name).group.model_fields.items()}
    if name == "adamw":
        assert mine.pop("decoupled_weight_decay") is True
    if "decoupled_weight_decay" not in theirs:  # torch before 2.7
        mine.pop("decoupled_weight_decay", None)
    assert mine == theirs


@pytest.mark.parametrize("name", RULES)
def test_a_group_fills_every_column_the_kernel_asks_for(name):
    packed = rule(name).pack([{}, {}])
    assert packed.dtype == np.float64
    assert packed.shape == (2, len(rule(name).facts.hypers))


def test_packing_follows_the_kernels_order():
    packed = rule("adam").pack([{"betas": [0.5, 0.25], "amsgrad": True, "lr": 3}])
    row = dict(zip(native.RULES["adam"].hypers, packed[0], strict=True))
    assert (row["lr"], row["beta1"], row["beta2"], row["amsgrad"]) == (3, 0.5, 0.25, 1)
    assert (row["eps"], row["decoupled_weight_decay"]) == (1e-8, 0)


@pytest.mark.parametrize(
    ("name", "options", "used"),
    [
        ("sgd", {}, ()),
        ("sgd", {"momentum": 0.9}, ("momentum_buffer",)),
        ("adam", {}, ("exp_avg", "exp_avg_sq")),
        ("adamw", {"amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
        ("adagrad", {}, ("sum",)),
        ("rmsprop", {}, ("square_avg",)),
        ("rmsprop", {"centered": True}, ("square_avg", "grad_avg")),
        ("rmsprop", {"momentum": 0.1}, ("square_avg", "momentum_buffer")),
        ("lion", {}, ("exp_avg",)),
        ("mean", {}, ()),
    ],
)
def test_options_decide_which_states_exist(name, options, used):
    assert rule(name).state_used(options) == used


def test_states_start_at_zero_unless_an_option_says_otherwise():
    assert rule("adam").initial({}) == {"exp_avg": 0, "exp_avg_sq": 0, "max_exp_avg_sq": 0}
    assert rule("adagrad").initial({"initial_accumulator_value": 0.5}) == {"sum": 0.5}


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("sgd", {"lr": -1}, "sgd, group 1, lr: .* not -1"),
        ("sgd", {"lr": float("nan")}, "group 1, lr"),
        ("sgd", {"lr": float("inf")}, "group 1, lr"),
        ("sgd", {"lr": "0.1"}, "group 1, lr"),
        ("sgd", {"nesterov": 1}, "group 1, nesterov"),
        ("sgd", {"nesterov": True}, "nesterov needs a momentum"),
        ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening of 0"),
        ("adam", {"betas": (0.9, 1.0)}, "group 1, betas.1"),
        ("adam", {"betas": (0.9,)}, "group 1, betas"),
        ("adam", {"learning_rate": 0.1}, "learning_rate.*Its hyperparameters are .*lr"),
        ("mean", {"lr": 0.1}, "hyperparameters are none"),
    ],
)
def test_an_invalid_group_names_the_rule_the_group_and_the_field(name, options, text):
    with pytest.raises(ConfigError, match=text):
        rule(name).pack([{}, options])


def test_an_unknown_rule_lists_the_rules():
    with pytest.raises(ConfigError, match=r"'adm'.*sgd, adam, adamw"):
        rule("adm")
