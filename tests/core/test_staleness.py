from __future__ import annotations

import pytest

from zps.core.staleness import StalenessPolicy, lr_factor


@pytest.mark.parametrize(("staleness", "factor"), [(0, 1.0), (1, 2 / 3), (2, 0.5), (10, 1 / 6)])
def test_inverse_lowers_the_learning_rate_with_staleness(staleness: int, factor: float) -> None:
    assert lr_factor(StalenessPolicy.INVERSE, staleness, alpha=0.5) == pytest.approx(factor)


def test_alpha_zero_is_no_correction() -> None:
    assert lr_factor(StalenessPolicy.INVERSE, 1000, alpha=0.0) == 1.0


@pytest.mark.parametrize("policy", set(StalenessPolicy) - {StalenessPolicy.INVERSE})
def test_the_other_policies_leave_the_learning_rate_alone(policy: StalenessPolicy) -> None:
    assert lr_factor(policy, 7, alpha=1.0) == 1.0
