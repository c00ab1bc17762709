"""What a stale gradient is worth."""

from __future__ import annotations

from enum import Enum

__all__ = ["StalenessPolicy", "lr_factor"]


class StalenessPolicy(str, Enum):
    """What the hub does with a gradient computed on old weights.

    NONE     apply it as if it were fresh
    INVERSE  apply it with a smaller learning rate
    DROP     forget it when it is staler than a limit: `Rounds(drop_over=...)` decides
    DC       correct it to first order for how far the weights have moved: the kernel does
    """

    NONE = "none"
    INVERSE = "inverse"
    DROP = "drop"
    DC = "dc"


def lr_factor(policy: StalenessPolicy, staleness: int, alpha: float) -> float:
    """The factor on the learning rate for one application.

    staleness  versions, 0 or more; of several contributors, the stalest
    alpha      0 or more: how fast the factor falls
    Returns 1 / (1 + alpha * staleness) under INVERSE, 1.0 under any other policy.
    Source: Zhang et al., Staleness-aware Async-SGD for Distributed Deep Learning, IJCAI 2016
    (there 1 / max(1, staleness)).
    """
    assert staleness >= 0, f"staleness {staleness}"
    if policy is StalenessPolicy.INVERSE:
        return 1.0 / (1.0 + alpha * staleness)
    return 1.0
