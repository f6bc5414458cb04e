"""The rotation trick: a gradient through quantization that keeps the angle between latent and gradient."""

import jax
import jax.numpy as jnp
from jax import Array

from vgpt_jax.quantizers.quantizer import straight_through

SHORTEST = 1e-6  # a vector below this norm has no direction


def rotate_to(z_e: Array, codes: Array) -> Array:
    """``codes`` to the bit, with the gradient of the linear map that takes each latent to its code.

    The map is the rescaled rotation ``lambda R``, ``lambda = |c| / |z|``: in the plane of z and c, R turns z onto c. It
    counts as a constant, so a gradient g reaches z as ``lambda R^T g``: where the straight-through estimator shifts g to z
    as it is, here g keeps its angle to the vector it belongs to. No gradient reaches ``codes``.

    A latent without a direction (norm below 1e-6) gets the straight-through gradient. One that is opposite to its code gets
    the reflection at the plane across c, since no plane of rotation is distinguished; one whose code is 0 gets no gradient.

    Args:
      z_e: ``[..., D]`` of any float dtype, computed on in float32.
      codes: ``[..., D]``, one for each latent.

    Returns:
      ``[..., D]`` float32.

    Reference: Fifty et al. 2024, arXiv 2410.06424, section 4 (4.2 for the form without a matrix).
    """
    z = jnp.asarray(z_e, jnp.float32)
    codes = jax.lax.stop_gradient(jnp.asarray(codes, jnp.float32))
    fixed = jax.lax.stop_gradient(z)
    z_norm, code_norm = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (fixed, codes))
    u, q = (x / jnp.maximum(norm, SHORTEST) for x, norm in ((fixed, z_norm), (codes, code_norm)))
    middle = u + q
    middle_norm = jnp.linalg.norm(middle, axis=-1, keepdims=True)
    w = jnp.where(middle_norm > SHORTEST, middle / jnp.maximum(middle_norm, SHORTEST), 0.0)

    # R = I - 2 w w^T + 2 q u^T, without making the matrix
    rotated = z - 2.0 * w * jnp.sum(w * z, axis=-1, keepdims=True) + 2.0 * q * jnp.sum(u * z, axis=-1, keepdims=True)
    rescaled = rotated * (code_norm / jnp.maximum(z_norm, SHORTEST))
    return straight_through(jnp.where(z_norm > SHORTEST, rescaled, z), codes)
