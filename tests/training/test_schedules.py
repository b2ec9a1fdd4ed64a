"""Learning rates and oracle ratios."""

from __future__ import annotations

from itertools import pairwise

import pytest

from planlm.errors import InputError
from planlm.training.schedules import learning_rate_factor, oracle_ratio, parse_oracle_mix


def test_warm_up_rises_from_the_start_of_a_group_and_decays_to_zero() -> None:
    factors = [learning_rate_factor(step, 100, start=40, warmup=0.1, schedule="cosine") for step in range(101)]
    assert factors[:40] == [0.0] * 40
    assert factors[40] == pytest.approx(0.1 * 0.5 * (1 + 0.30901699), rel=1e-6)
    assert factors[49] > factors[44] > factors[40] > 0
    assert all(early > late for early, late in pairwise(factors[50:]))
    assert factors[100] == pytest.approx(0.0)


@pytest.mark.parametrize(("schedule", "half"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_decay_shapes(schedule: str, half: float) -> None:
    assert learning_rate_factor(50, 100, warmup=0.0, schedule=schedule) == pytest.approx(half)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_oracle_ratio_goes_from_first_to_last(schedule: str) -> None:
    ratios = [oracle_ratio(step, 11, (0.8, 0.2), schedule) for step in range(11)]
    assert ratios[0] == pytest.approx(0.8) and ratios[5] == pytest.approx(0.5) and ratios[-1] == pytest.approx(0.2)
    assert parse_oracle_mix("0.8:0.2") == (0.8, 0.2) and parse_oracle_mix("0.3") == (0.3, 0.3)


def test_oracle_ratio_switches_once() -> None:
    for fraction, first in ((0.25, 3), (0.0, 0), (1.0, 12)):
        ratios = [oracle_ratio(step, 12, (1.0, 0.1), "switch", fraction) for step in range(12)]
        assert ratios == [1.0] * first + [0.1] * (12 - first)


@pytest.mark.parametrize("text", ["", "a", "1.2", "0.1:0.2:0.3", "-0.1", "nan"])
def test_bad_oracle_mix_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected RHO or RHO:RHO_END"):
        parse_oracle_mix(text)
