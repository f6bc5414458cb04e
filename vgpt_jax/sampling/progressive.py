"""What the decoder makes of a picture's tokens so far: the true view of autoregressive decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from vgpt_jax.sampling.cond_visual_gpt import CondVisualGPT
from vgpt_jax.sampling.generate import MAX_BATCH


def decode_so_far(model: CondVisualGPT, token_ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Decodes each picture with only its first tokens; the rest counts as not written (`Quantizer.dequantize_written`).

    Args:
      model: whose tokenizer decodes.
      token_ids: ``[M, *token_shape]`` int32.
      counts: ``[F]``, how many tokens each frame has, in the order in which they are written.

    Returns:
      ``[F, M, H, W, 3]`` float32 in 0..1.
    """
    graph, state = nnx.split(model.tokenizer)
    frame, picture = np.divmod(np.arange(len(counts) * len(token_ids)), len(token_ids))
    frames = []
    for start in range(0, len(frame), MAX_BATCH):
        indices = np.arange(start, start + MAX_BATCH) % len(frame)  # the last batch is filled up with the first frames
        frames.append(
            _decode_first(
                graph, state, token_ids[picture[indices]], np.asarray(counts)[frame[indices]], model.value_range
            )
        )
    images = np.concatenate([np.asarray(f) for f in frames])[: len(frame)]
    return images.reshape(len(counts), len(token_ids), *images.shape[1:])


@functools.partial(jax.jit, static_argnames="graph")
def _decode_first(graph, state, token_ids: Array, counts: Array, value_range) -> Array:
    tokenizer = nnx.merge(graph, state)
    written = jnp.arange(token_ids[0].size)[None, :] < counts[:, None]
    latents = tokenizer.quantizer.dequantize_written(token_ids, written.reshape(token_ids.shape))
    low, high = value_range
    return (jnp.clip(tokenizer.decode_latents(latents), low, high) - low) / (high - low)
