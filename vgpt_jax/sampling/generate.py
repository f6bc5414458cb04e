"""Token generation: prefill the condition, then one `lax.scan` over the rest, with a key-value cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range
from vgpt_jax.models.gpt import GPT
from vgpt_jax.sampling.logits import draw

MAX_BATCH = 64
"""Pictures drawn in one program; larger requests are split."""


def generate(
    gpt: GPT, conditions: Array, uniforms: Array, temperature: Array | float, top_p: Array | float | None, *, top_k: int
) -> Array:
    """Writes N tokens after each condition. To be traced: the layers are unrolled, the positions scanned.

    Args:
      gpt: the generator.
      conditions: ``[B]`` int32, ids of the first position (`GPT.condition_ids`).
      uniforms: ``[B, N]`` float32 in ``[0, 1)``, one for each token: the only randomness.
      temperature, top_p: as in `sampling.logits.draw`, may be traced. ``top_p`` None: off.
      top_k: static; 0: off.

    Returns:
      ``[B, N]`` int32 token ids.
    """

    def write(logits: Array, uniform: Array) -> Array:
        return draw(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p)

    graph, state = nnx.split(gpt)

    def next_token(carry, inputs):
        token, cache = carry
        position, uniform = inputs
        logits, cache = nnx.merge(graph, state).step(token[:, None], position, cache)
        token = write(logits, uniform)
        return (token, cache), token

    logits, cache = gpt.step(conditions[:, None], 0, gpt.init_cache(conditions.shape[0]))
    first = write(logits, uniforms[:, 0])
    positions = jnp.arange(1, gpt.num_tokens)
    _, rest = jax.lax.scan(next_token, (first, cache), (positions, uniforms[:, 1:].T))
    return jnp.concatenate([first[:, None], rest.T], axis=1)  # [B, N]


def sample_uniforms(seed: int, indices: Array, num_tokens: int) -> Array:
    """The randomness of pictures number ``indices`` ``[B]`` under ``seed``: ``[B, num_tokens]`` float32 in ``[0, 1)``.

    A picture's row depends on the seed and its own number alone, not on what is drawn beside it.
    """
    key = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.uniform(jax.random.fold_in(key, index), (num_tokens,)))(indices)


def bucket(count: int) -> int:
    """The batch that ``count`` pictures are padded to: the next power of two, at most `MAX_BATCH`."""
    return min(1 << max(count - 1, 0).bit_length(), MAX_BATCH)


def check_sampling_options(
    *, temperature: float, top_k: int, top_p: float | None, num_codes: int, seed: int = 0
) -> None:
    """Raises `UserError` for options that mean nothing: one line that names the option, its value and its range."""
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}, but must be above 0 (for the most probable token use top_k 1)")
    if not 0 <= top_k <= num_codes:
        raise UserError(
            f"top_k is {top_k}, but must be between 1 and the {num_codes} codes of the tokenizer, or 0 for all"
        )
    if top_p is not None:
        check_range("top_p", top_p, above=0, most=1)
    check_range("seed", seed, least=0, most=2**32 - 1)
