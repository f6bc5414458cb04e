"""Schedules of the guidance scale by hand."""

import numpy as np
import pytest

from vgpt_jax.errors import UserError
from vgpt_jax.sampling.guidance import GUIDANCE_SCHEDULES, guidance_scales


@pytest.mark.parametrize(
    ("schedule", "power", "expected"),
    [
        ("constant", 1.0, [3, 3, 3, 3, 3]),
        ("linear", 1.0, [1, 1.5, 2, 2.5, 3]),
        ("power_cosine", 1.0, [1, 2 - 0.5**0.5, 2, 2 + 0.5**0.5, 3]),
        ("power_cosine", 2.0, [1, 2 - np.cos(np.pi / 16), 2 - 0.5**0.5, 2 - np.cos(np.pi * 9 / 16), 3]),
        ("cut_off", 1.0, [3, 3, 3, 3, 3]),
        ("cut_off", 0.4, [3, 3, 1, 1, 1]),
        ("cut_off", 0.5, [3, 3, 3, 1, 1]),
        ("cut_off", 0.01, [3, 1, 1, 1, 1]),
    ],
)
def test_schedules_equal_what_was_computed_by_hand(schedule, power, expected):
    scales = guidance_scales(5, 3.0, schedule, power)
    assert scales.dtype == np.float32
    np.testing.assert_allclose(scales, expected, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "power_cosine"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_rising_schedules_go_from_1_to_the_scale(schedule, scale):
    scales = guidance_scales(64, scale, schedule, 2.5 if schedule == "power_cosine" else 1.0)
    np.testing.assert_allclose(scales[[0, -1]], [1, scale], atol=1e-6)
    assert (np.diff(scales) * (scale - 1) >= 0).all()


def test_a_greater_power_guides_later():
    early, late = (guidance_scales(64, 4.0, "power_cosine", power) for power in (0.5, 3.0))
    assert (late[1:-1] < early[1:-1]).all()


def test_the_cut_off_is_a_share_of_the_tokens():
    for share in (0.1, 0.3, 0.7, 0.9):
        assert (guidance_scales(10, 2.0, "cut_off", share) == 2).sum() == round(10 * share)


@pytest.mark.parametrize("schedule", GUIDANCE_SCHEDULES)
def test_a_scale_of_1_everywhere_is_no_guidance(schedule):
    assert guidance_scales(6, 1.0, schedule) is None
    assert guidance_scales(6, 0.0, schedule) is not None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"scale": -0.5}, "guidance is -0.5"),
        ({"scale": float("nan")}, "guidance is nan"),
        ({"scale": 2.0, "schedule": "square"}, "guidance_schedule is 'square'"),
        ({"scale": 2.0, "schedule": "power_cosine", "power": 0.0}, "guidance_power is 0"),
        ({"scale": 2.0, "schedule": "cut_off", "power": 1.5}, "guidance_power is 1.5"),
    ],
)
def test_what_means_nothing_is_refused(arguments, named):
    with pytest.raises(UserError, match=named):
        guidance_scales(6, **arguments)
