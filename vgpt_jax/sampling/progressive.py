"""What the decoder makes of a picture's tokens so far: the true view of autoregressive decoding."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT
from vgpt_jax.sampling.program import PIXELS_AT_ONCE
from vgpt_jax.sampling.request import MAX_BATCH


def decode_so_far(
    model: CondVisualGPT, token_ids: np.ndarray, orders: np.ndarray, counts: np.ndarray
) -> Iterator[np.ndarray]:
    """Decodes each picture with only its first tokens; the rest counts as not written (`Quantizer.dequantize_written`).

    Args:
      model: whose tokenizer decodes.
      token_ids: ``[M, *token_shape]`` int32.
      orders: ``[M, N]``, the places in the order in which they are written.
      counts: ``[F]``, how many tokens each frame has.

    Yields:
      F frames, ``[M, H, W, 3]`` float32 in 0..1.
    """
    graph, state = nnx.split(model.tokenizer)
    ranks, counts = np.argsort(orders, axis=1), np.asarray(counts)
    pictures, of_all = len(token_ids), len(counts) * len(token_ids)
    batch = min(MAX_BATCH, max(1, PIXELS_AT_ONCE // model.tokenizer.image_size**2))
    waiting = np.zeros((0, *[model.tokenizer.image_size] * 2, 3), np.float32)
    for start in range(0, of_all, batch):
        frame, picture = np.divmod(np.arange(start, start + batch) % of_all, pictures)  # the last batch is filled up
        written = ranks[picture] < counts[frame, None]
        images = _decode_written(graph, state, token_ids[picture], written, model.value_range)
        waiting = np.concatenate([waiting, np.asarray(images)[: of_all - start]])
        while len(waiting) >= pictures:
            yield waiting[:pictures]
            waiting = waiting[pictures:]


@functools.partial(jax.jit, static_argnames="graph")
def _decode_written(graph, state, token_ids: Array, written: Array, value_range) -> Array:
    tokenizer = nnx.merge(graph, state)
    latents = tokenizer.quantizer.dequantize_written(token_ids, written.reshape(token_ids.shape))
    low, high = value_range
    return (jnp.clip(tokenizer.decode_latents(latents), low, high) - low) / (high - low)
