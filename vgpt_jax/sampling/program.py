"""One program from labels to pictures: generate, decode, score, keep the best. The candidates never leave the device."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import Array

from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import GPT
from vgpt_jax.sampling.generate import Given, Options, generate
from vgpt_jax.sampling.parallel import generate_in_parallel
from vgpt_jax.sampling.request import picture_keys, uniforms_of

PIXELS_AT_ONCE = 2**19
"""Pixels that the decoder makes at a time, on each device: 8 pictures of 256 by 256."""

Score = Callable[[Array, Array], Array]
"""Images ``[B, H, W, 3]`` float32 in 0..1 and labels ``[B]`` (-1: none) to scores ``[B]``, the greater the better."""

LEAST = float(np.finfo(np.float32).min)
"""What a score that is no number, or minus infinity, counts as: its candidate loses, but not to one for another picture."""


class ClassifierScore(nnx.Module):
    """The softmax score of the label: a `Score` of a classifier.

    Args:
      classifier: images in ``value_range`` to logits ``[B, L]``.
      value_range: of the images that it is given.
      matches: ``[classes, L]`` bool, which of the classifier's labels mean each class; a class scores the sum over its own. None:
        the two are the same.
    """

    def __init__(self, classifier: nnx.Module, value_range: tuple[float, float], matches: np.ndarray | None = None):
        self.classifier, self.value_range = classifier, value_range
        self.matches = None if matches is None else nnx.Variable(jnp.asarray(matches, jnp.float32))

    def class_scores(self, images: Array) -> Array:
        """Images ``[B, H, W, 3]`` in 0..1 to scores of all classes, ``[B, classes]`` float32 in 0..1."""
        low, high = self.value_range
        scores = jax.nn.softmax(self.classifier(images * (high - low) + low), axis=-1)
        return scores if self.matches is None else jnp.einsum("bl,cl->bc", scores, self.matches[...])

    def __call__(self, images: Array, labels: Array) -> Array:
        return jnp.take_along_axis(self.class_scores(images), jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]


@struct.dataclass
class Batch:
    """Candidates ``[B]`` for up to G pictures.

    Attributes:
      labels: ``[B]`` int32, -1 without a class.
      indices: ``[B]`` int32, their numbers: with the seed, all of their randomness.
      slots: ``[B]`` int32, which picture each is for; -1 for those that only fill the batch.
    """

    labels: Array
    indices: Array
    slots: Array


@dataclass(frozen=True)
class Plan:
    """What is static of a program beside its shapes.

    Attributes:
      num_kept: G, pictures that are kept.
      random: whether the order of writing is.
      sizes: how many tokens each step writes; empty: one after the other.
      num_given: places that are kept of a given picture.
      num_first: how many of these come first in raster order.
      devices: over which the batch is spread.
    """

    num_kept: int
    random: bool = False
    sizes: tuple[int, ...] = ()
    num_given: int = 0
    num_first: int = 0
    devices: int = 1


@functools.partial(jax.jit, static_argnames=("graph", "score", "plan"))
def draw_pictures(
    graph: nnx.GraphDef,
    state: nnx.State,
    batch: Batch,
    seed: Array,
    options: Options,
    given: tuple[Array, Array] | None,
    value_range: tuple[float, float],
    *,
    score: Score | None,
    plan: Plan,
) -> dict[str, Array]:
    """Draws candidates and keeps the best for each picture.

    Args:
      graph, state: of ``(gpt, tokenizer, scorer)``. The scorer, a module, is used where ``score`` is None, and may be None too:
        then the batch has one candidate for each picture, and all are kept.
      batch: the candidates.
      seed: uint32.
      options: how they are drawn.
      given: token ids ``[N]`` int32 and which of them are kept ``[N]`` bool, of a picture that is completed; or None.
      value_range: least and greatest value of the tokenizer's images.
      score: a function.
      plan: static.

    Returns:
      ``images`` ``[G, H, W, 3]`` in 0..1, ``token_ids`` ``[G, *token_shape]`` and ``orders`` ``[G, N]``, the places as they were
      written, of the best; ``chosen`` ``[G]``, which of the batch they are; and ``scores`` ``[B]`` of all where something scores.

    Raises:
      UserError: the score is not one number for each picture.
    """
    gpt, tokenizer, scorer = nnx.merge(graph, state)
    score = score or scorer
    token_ids, orders = _write(gpt, batch, seed, options, given, plan)
    token_ids = token_ids.reshape(-1, *tokenizer.token_shape)
    low, high = value_range
    decode = lambda ids: (jnp.clip(tokenizer.decode(ids), low, high) - low) / (high - low)  # noqa: E731
    images = in_pieces(decode, token_ids, max(1, PIXELS_AT_ONCE // tokenizer.image_size**2) * plan.devices)
    if score is None:
        return {"images": images, "token_ids": token_ids, "orders": orders, "chosen": jnp.arange(len(images))}
    scores = score(images, batch.labels)
    if scores.shape != batch.labels.shape:
        raise UserError(
            f"the score of {len(images)} pictures has shape {scores.shape}, but must be one number for each of them"
        )
    scores = scores.astype(jnp.float32)
    for_slot = batch.slots[None, :] == jnp.arange(plan.num_kept)[:, None]  # [G, B]
    chosen = jnp.argmax(jnp.where(for_slot, jnp.nan_to_num(scores, nan=LEAST), -jnp.inf), axis=1)
    best = {"images": images[chosen], "token_ids": token_ids[chosen], "orders": orders[chosen]}
    return best | {"chosen": chosen, "scores": scores}


def _write(gpt: GPT, batch: Batch, seed: Array, options: Options, given, plan: Plan) -> tuple[Array, Array]:
    """The token ids ``[B, N]`` of the candidates, and the order in which they were written, what was kept first."""
    count = len(batch.labels)
    conditions = jnp.where(batch.labels < 0, gpt.begin_id, gpt.num_codes + batch.labels)
    keys = picture_keys(seed, batch.indices)
    uniforms = uniforms_of(keys, gpt.num_tokens)
    kept = None if given is None else jnp.broadcast_to(given[1], (count, gpt.num_tokens))
    ranks = jnp.broadcast_to(jnp.arange(gpt.num_tokens, dtype=jnp.float32), (count, gpt.num_tokens))
    if plan.random:
        ranks = uniforms_of(jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys), gpt.num_tokens)
    if given is not None:  # what is kept comes first, so that all that is drawn can see it
        ranks = jnp.where(kept, -1.0, ranks)
    shown = jnp.argsort(ranks, axis=1)
    orders = shown if gpt.random_order and (plan.random or given is not None) else None
    if given is not None:
        ids = jnp.broadcast_to(given[0], (count, gpt.num_tokens))
        given = Given(ids, kept, plan.num_first if orders is None else plan.num_given)
    drawn = (gpt, conditions, uniforms, options)
    if plan.sizes:
        return generate_in_parallel(*drawn, orders=orders, sizes=plan.sizes, given=given), shown
    return generate(*drawn, orders=orders, given=given), shown


def in_pieces(function: Callable[[Array], Any], x: Array, piece: int) -> Array:
    """``function`` of ``x`` ``[B, ...]``, at most ``piece`` examples at a time, one piece after the other.

    The examples of a piece are far apart in ``x``, so that all devices have their share of each.
    """
    pieces = -(-len(x) // piece)
    if pieces == 1:
        return function(x)
    padding = [(0, -len(x) % pieces)] + [(0, 0)] * (x.ndim - 1)
    stacked = jnp.pad(x, padding, mode="edge")
    stacked = jnp.swapaxes(stacked.reshape(-1, pieces, *x.shape[1:]), 0, 1)  # [pieces, piece, ...]
    y = jnp.swapaxes(jax.lax.map(function, stacked), 0, 1)
    return y.reshape(-1, *y.shape[2:])[: len(x)]
