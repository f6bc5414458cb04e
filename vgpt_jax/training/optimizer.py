"""The optimizer and its schedule, from a config's section."""

import jax
import optax

from vgpt_jax.errors import UserError, check_range

SCHEDULES = ("constant", "cosine")


def make_schedule(*, learning_rate: float, schedule: str, warmup_steps: int, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 in ``warmup_steps``, then constant, or a cosine to a hundredth.

    Raises:
      UserError: an unknown schedule, or a warm-up that is longer than the training.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"optimizer.schedule is {schedule!r}, but must be one of {', '.join(SCHEDULES)}")
    check_range("optimizer.warmup_steps", warmup_steps, least=0, most=num_steps)
    if schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup_steps else learning_rate, learning_rate, warmup_steps, max(num_steps, 1), 0.01 * learning_rate
        )
    if not warmup_steps:
        return optax.constant_schedule(learning_rate)
    return optax.linear_schedule(0.0, learning_rate, warmup_steps)


def make_optimizer(
    *,
    learning_rate: float,
    num_steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    grad_clip: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) with clipping by global norm.

    Args:
      learning_rate: the greatest of the schedule.
      num_steps: length of the training, for the schedule.
      schedule, warmup_steps: as in `make_schedule`.
      b1, b2: decay of the first and second moment.
      weight_decay: decoupled, on arrays of two dimensions and more; norms and biases are left alone.
      grad_clip: greatest global norm of the gradients; 0: no clipping.

    Raises:
      UserError: as `make_schedule`, or a number out of its range.
    """
    check_range("optimizer.learning_rate", learning_rate, above=0)
    check_range("num_steps", num_steps, least=1)
    for name, value in (("b1", b1), ("b2", b2)):
        check_range(f"optimizer.{name}", value, least=0, most=0.999999)
    for name, value in (("weight_decay", weight_decay), ("grad_clip", grad_clip)):
        check_range(f"optimizer.{name}", value, least=0)
    rate = make_schedule(learning_rate=learning_rate, schedule=schedule, warmup_steps=warmup_steps, num_steps=num_steps)
    matrices = lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)  # noqa: E731
    adam = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(grad_clip), adam) if grad_clip else adam
