"""Schedules of the guidance scale over the tokens of a picture, in the order of writing.

Early tokens settle what a picture shows: a scale that is high there costs variety. 1 is no guidance, 0 no class.
"""

from collections.abc import Callable

import numpy as np

from vgpt_jax.errors import check_range, choose


def constant(scale: float, share: np.ndarray, power: float) -> np.ndarray:
    """The same scale everywhere."""
    return np.full_like(share, scale)


def linear(scale: float, share: np.ndarray, power: float) -> np.ndarray:
    """From 1 at the first token evenly to the scale at the last (MUSE, arXiv 2301.00704, section 2.7)."""
    return 1 + (scale - 1) * share


def power_cosine(scale: float, share: np.ndarray, power: float) -> np.ndarray:
    """From 1 to the scale, later for a greater ``power``: ``(1 - cos(pi * share ** power)) / 2`` of the way (RAR, 2411.00776)."""
    return 1 + (scale - 1) * (1 - np.cos(np.pi * share**power)) / 2


def cut_off(scale: float, share: np.ndarray, power: float) -> np.ndarray:
    """The scale for the first ``power`` of the tokens (a share, at most 1), then 1: as LlamaGen's ``cfg_interval``."""
    return np.where(share < power, scale, 1.0)


GUIDANCE_SCHEDULES: dict[str, Callable[[float, np.ndarray, float], np.ndarray]] = {
    "constant": constant,
    "linear": linear,
    "power_cosine": power_cosine,
    "cut_off": cut_off,
}


def guidance_scales(num_tokens: int, scale: float, schedule: str = "constant", power: float = 1.0) -> np.ndarray | None:
    """The scale at each token.

    Args:
      num_tokens: N.
      scale: the greatest, at least 0.
      schedule: a name in ``GUIDANCE_SCHEDULES``.
      power: for "power_cosine" the exponent, for "cut_off" the share of the tokens that are guided.

    Returns:
      ``[N]`` float32, or None where it is 1 everywhere: no guidance, at half the work.

    Raises:
      UserError: an unknown name, or a number out of its range.
    """
    check_range("guidance", scale, least=0, most=1e6)
    check_range("guidance_power", power, above=0, most=1 if schedule == "cut_off" else None)
    shape = choose("guidance_schedule", schedule, GUIDANCE_SCHEDULES)
    share = np.arange(num_tokens) / (num_tokens if schedule == "cut_off" else max(num_tokens - 1, 1))
    scales = shape(scale, share, power).astype(np.float32)
    return None if (scales == 1).all() else scales
