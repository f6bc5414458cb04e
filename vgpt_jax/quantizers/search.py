"""The search for the nearest code, and the losses that spread latents and codes. Pure functions, float32."""

import jax
import jax.numpy as jnp
from jax import Array


def l2_normalize(x: Array, epsilon: float = 1e-12) -> Array:
    """Divides by the l2 norm over the last axis; a zero vector stays zero, and its gradient finite."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), epsilon))


def squared_distances(z: Array, codes: Array) -> Array:
    """Squared Euclidean distances ``[M, K]`` between latents ``[M, D]`` and codes ``[K, D]``, all float32.

    ``|z|^2 - 2 z.c + |c|^2`` with the product at the highest precision: at a lower one, codes flip.
    """
    products = jnp.einsum("md,kd->mk", z, codes, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(z * z, axis=-1)[:, None] + jnp.sum(codes * codes, axis=-1)[None, :]
    return squares - 2.0 * products  # [M, K]


def uniformity_penalty(distances: Array, temperature: float) -> Array:
    """How far the average soft assignment is from uniform, in nats: ``log K - H(mean_m softmax(-d_m / s_m))``.

    Zero when the codes are used alike, near ``log K`` when one takes everything; minimising it raises the entropy of
    code use. The scale ``s_m`` is ``temperature`` times the spread (greatest less least) of a latent's distances. So the
    same temperature means the same sharpness whatever the scale of the latents, and the logits span ``1 / temperature``
    nats however far the codes are: a codebook that has collapsed still gets a gradient.

    Args:
      distances: ``[M, K]`` float32, squared distances.
      temperature: sharpness of the assignment; small follows the nearest code, large blurs over all.
    """
    sg = jax.lax.stop_gradient
    nearest, farthest = (reduce(distances, axis=-1, keepdims=True) for reduce in (jnp.min, jnp.max))
    spread = farthest - nearest + 1e-4 * jnp.abs(farthest) + 1e-12  # rounding makes a spread where all are equal
    assignment = jax.nn.softmax(-(distances - sg(nearest)) / (temperature * sg(spread)), axis=-1)
    usage = jnp.mean(assignment, axis=0)  # [K]
    # The divergence from uniform; as log K less the entropy it would be the small difference of two large numbers.
    return jnp.sum(usage * jnp.log(jnp.maximum(usage * distances.shape[-1], 1e-30)))


def orthogonality_loss(codes: Array) -> Array:
    """Mean squared cosine of all pairs of codes ``[K, D]``, less ``1 / K`` for each code with itself; 0: all orthogonal.

    With more codes than dimensions its least value is ``1 / D - 1 / K``. The sum over pairs ``|C C^T|^2`` is computed as
    ``|C^T C|^2``, which takes ``D^2`` memory instead of ``K^2``.

    Reference: Shin et al. 2021, arXiv 2112.00384, eq. 2.
    """
    num_codes = codes.shape[0]
    unit = l2_normalize(codes)
    gram = jnp.einsum("kd,ke->de", unit, unit, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(gram**2) / num_codes**2 - 1.0 / num_codes
