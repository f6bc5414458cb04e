"""What several models are made of."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


BLOCK = "block"
"""What the outputs of a network's blocks are called, for those who choose what the backward pass keeps (`jax.checkpoint`)."""


def block_output(x: Array) -> Array:
    """``x``, under the name ``BLOCK``."""
    return checkpoint_name(x, BLOCK)


def drawn_as_matrix(initializer: Callable[..., Array]) -> Callable[..., Array]:
    """An initializer of kernels ``[..., inputs, outputs]`` that draws the same numbers as a matrix, a column for each output.

    The compiler takes several times as long for a draw of four axes. Of ``initializer`` the scale may depend on how many numbers
    go into an output, but not on how many outputs a number goes into.
    """

    def draw(key: Array, shape: tuple[int, ...], *args, **kwargs) -> Array:
        return initializer(key, (math.prod(shape[:-1]), shape[-1]), *args, **kwargs).reshape(shape)

    return draw


lecun_normal = drawn_as_matrix(nnx.initializers.lecun_normal())
"""What Flax initializes kernels with."""


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes elements with probability ``rate`` and scales the rest; the identity where ``key`` is None.

    The rate is rounded to a multiple of 1/256: a byte of randomness an element, a quarter of what a float would take.
    """
    if key is None or not rate:
        return x
    dropped = min(round(256 * rate), 255)
    kept = jax.random.bits(key, x.shape, jnp.uint8) >= dropped
    return jnp.where(kept, x * (256 / (256 - dropped)), 0).astype(x.dtype)


def in_float32(module: nnx.Module) -> nnx.Module:
    """A copy of a module whose layers compute in float32, with the same parameters."""
    copy = nnx.clone(module)
    for _, layer in nnx.iter_modules(copy):
        if hasattr(layer, "dtype"):
            layer.dtype = jnp.float32
    return copy
