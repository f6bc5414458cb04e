"""Several tokens a step, for models of random order: fewer, wider steps.

The tokens of a step are drawn as if independent given all that is written. Every place that is to be written has a query of its
own: the last token that was written, told this place as its target (the double positions of sigma-GPT, arXiv 2404.09562;
RandAR's position instruction tokens, 2412.01827, and ARPG's queries, 2503.10568, are inputs beside the tokens). What was drawn in
the step before goes in at the same time, as it would have one by one, so that with one token a step this is `generate`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vgpt_jax.errors import UserError, choose
from vgpt_jax.models.gpt import GPT
from vgpt_jax.sampling.generate import (
    Given,
    Options,
    by_place,
    draw_token,
    in_order,
    predict,
    scale_at,
    start_cache,
    where,
)


def even(share: np.ndarray) -> np.ndarray:
    return share


def cosine(share: np.ndarray) -> np.ndarray:
    """Few at first, when nothing is settled, and more and more (MaskGIT, arXiv 2202.04200, section 3.3)."""
    return 1 - np.cos(np.pi / 2 * share)


GROUP_SCHEDULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"even": even, "cosine": cosine}


def group_sizes(num_tokens: int, num_steps: int, schedule: str = "cosine") -> np.ndarray:
    """How many tokens each step writes: ``[num_steps]``, at least 1, ``num_tokens`` in all.

    Raises:
      UserError: more steps than tokens, or an unknown schedule.
    """
    if not 1 <= num_steps <= num_tokens:
        raise UserError(f"num_steps is {num_steps}, but must be between 1 and the {num_tokens} tokens of a picture")
    written = choose("group_schedule", schedule, GROUP_SCHEDULES)(np.arange(1, num_steps + 1) / num_steps) * num_tokens
    ends = np.round(written).astype(int)
    for step in range(num_steps):  # at least one each, and enough left for those to come
        least = ends[step - 1] + 1 if step else 1
        ends[step] = min(max(ends[step], least), num_tokens - (num_steps - 1 - step))
    return np.diff(ends, prepend=0)


def generate_in_parallel(
    gpt: GPT,
    conditions: Array,
    uniforms: Array,
    options: Options,
    *,
    orders: Array,
    sizes: tuple[int, ...],
    given: Given | None = None,
) -> Array:
    """Writes N tokens after each condition, in ``len(sizes)`` steps.

    Args:
      gpt: a generator of random order.
      conditions, uniforms, options, orders: as for `sampling.generate.generate`.
      sizes: static, how many tokens each step writes (`group_sizes`); all but the given ones together.
      given: tokens to keep, all of them first in the order.

    Returns:
      ``[B, N]`` int32 token ids, by place.
    """
    widest, num_tokens, first = max(sizes), gpt.num_tokens, 0 if given is None else given.num_first
    orders_and_beyond = jnp.pad(orders, ((0, 0), (0, widest)))
    own_places = jnp.pad(orders_and_beyond + 1, ((0, 0), (1, 0)))  # of the inputs: first the condition
    uniforms = jnp.pad(in_order(uniforms, orders), ((0, 0), (0, widest)))

    def step(carry, now):
        ids, cache = carry  # ids [B, 1 + N + widest]: the condition, then the tokens in the order of writing
        scale = scale_at(options, now["written"])
        if scale is not None and jnp.ndim(scale):
            scale = scale[None, :, None]
        logits, cache = predict(
            gpt,
            ids[:, now["inputs"]],
            cache,
            now["index"],
            scale,
            rows=now["rows"],
            positions=own_places[:, now["inputs"]],
            targets=orders_and_beyond[:, now["targets"]],
            mask=now["mask"],
        )
        draw_each = jax.vmap(lambda x, u: draw_token(x, u, options), in_axes=1, out_axes=1)
        drawn = draw_each(logits, uniforms[:, now["written"]])  # [B, widest]
        return (jax.lax.dynamic_update_slice(ids, drawn, (0, now["written"][0] + 1)), cache), None

    ids = jnp.pad(conditions[:, None], ((0, 0), (0, num_tokens + widest)))
    cache = start_cache(gpt, conditions, num_tokens + 2 * widest, options)
    if first:  # all but the last of the given go in at once
        ids = ids.at[:, 1 : first + 1].set(in_order(given.token_ids, orders)[:, :first])
        _, cache = predict(gpt, ids[:, :first], cache, 0, scale_at(options, 0), **where(orders, 0, first))
    (ids, _), _ = jax.lax.scan(step, (ids, cache), step_plans(sizes, num_tokens, first))
    return by_place(ids[:, 1 : num_tokens + 1], orders)


def step_plans(sizes: tuple[int, ...], num_tokens: int, first: int = 0) -> dict[str, np.ndarray]:
    """What each step does, with rows up to ``R = 2 * widest - 1``; those beyond a step's own change nothing.

    Of a step's rows the first are the inputs that the step before wrote; the last of these is repeated with each further target.
    The first step writes the tokens from number ``first`` on.

    Returns:
      ``inputs`` ``[S, R]``, which input each row is; ``targets`` ``[S, R]``, the index in the order that it asks for; ``index``
      ``[S]``, where in the cache the rows go; ``mask`` ``[S, R, cached]``; ``rows`` ``[S, widest]``, whose logits are drawn from;
      ``written`` ``[S, widest]``, the indices in the order that are written, those beyond the step's own being overwritten.
    """
    sizes, widest = np.asarray(sizes), max(sizes)
    ends = first + np.cumsum(sizes)
    starts, before = ends - sizes, np.concatenate([[1], sizes[:-1]])  # the condition, or the last given, goes in first
    row = np.arange(2 * widest - 1)[None]
    start, before = starts[:, None], before[:, None]
    index = start - before + 1
    is_written, is_query = row < before, (row >= before) & (row < before + sizes[:, None] - 1)
    inputs = np.where(is_written, index + row, start)
    targets = np.where(is_written | is_query, index + row, start)
    cached = np.arange(num_tokens + 2 * widest)[None, None]
    own = cached == (index + row)[..., None]
    past = cached < np.where(is_written, index + row, np.where(is_query, start, 0))[..., None]
    written = start + np.arange(widest)
    return {
        "inputs": inputs,
        "targets": targets,
        "index": index[:, 0],
        "mask": own | past,
        "rows": before - 1 + np.arange(widest),
        "written": written,
    }
