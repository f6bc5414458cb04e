"""The entropy loss of soft assignments: each latent sure of its code, all codes in use."""

import jax
import jax.numpy as jnp
from jax import Array


def entropy_loss(logits: Array, temperature: float | Array) -> tuple[Array, Array, Array]:
    """How unsure latents are of their codes, less how evenly the codes are used; minimised, it mends both.

    With ``p_m = softmax(logits_m / temperature)`` the sample entropy is ``mean_m H(p_m)``, the codebook entropy
    ``H(mean_m p_m)``, and the loss the one less the other: minus the mutual information of latent and code.

    Args:
      logits: ``[M, K]`` of any float dtype, the greatest at the code that is taken; computed on in float32.
      temperature: positive; in the units of the logits.

    Returns:
      The loss, in ``[-log K, 0]``, the sample entropy and the codebook entropy, in ``[0, log K]``: float32 scalars, nats.

    Reference: Jansen et al. 2019, arXiv 1911.05894 (clusters that are confident and balanced); as a loss of visual
    tokenizers, Yu et al. 2023, arXiv 2310.05737, section 3.1, L_entropy.
    """
    logits = jnp.asarray(logits, jnp.float32)
    # The shift changes nothing but the rounding: what is large and then divided by a small temperature has no digits left.
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    log_p = jax.nn.log_softmax(shifted / temperature, axis=-1)
    p = jnp.exp(log_p)
    sample_entropy = -jnp.mean(jnp.sum(p * log_p, axis=-1))
    usage = jnp.mean(p, axis=0)  # [K]
    codebook_entropy = -jnp.sum(usage * jnp.log(jnp.maximum(usage, 1e-30)))
    return sample_entropy - codebook_entropy, sample_entropy, codebook_entropy
