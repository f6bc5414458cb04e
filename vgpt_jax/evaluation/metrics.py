"""Image and codebook metrics. Image metrics are per example, traced; codebook metrics are of counts, NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SSIM_WINDOW = 11
"""Pixels; images smaller than this have no SSIM."""


def psnr(images: Array, references: Array) -> Array:
    """Peak signal-to-noise ratio of each image, in dB: ``[B, H, W, C]`` twice, in 0..1, to ``[B]``.

    Equal images give 100 dB (a mean squared error of 1e-10), not infinity.
    """
    error = jnp.mean((images - references) ** 2, axis=(1, 2, 3))
    return -10.0 * jnp.log10(jnp.maximum(error, 1e-10))


def ssim(images: Array, references: Array, window: int = SSIM_WINDOW, sigma: float = 1.5) -> Array:
    """Structural similarity of each image: ``[B, H, W, C]`` twice, in 0..1, to ``[B]`` in -1..1.

    Gaussian window of 11 pixels and sigma 1.5, constants 0.01 and 0.03, mean over the positions where the window fits and
    over channels: scikit-image's with ``gaussian_weights=True, use_sample_covariance=False, data_range=1``.

    Reference: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    offsets = jnp.arange(window) - (window - 1) / 2
    kernel = jnp.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / jnp.sum(kernel)

    def blur(x: Array) -> Array:  # [M, H, W] -> [M, H - 10, W - 10]
        convolve = jax.vmap(jax.vmap(lambda row: jnp.convolve(row, kernel, mode="valid", precision="highest")))
        return jnp.swapaxes(convolve(jnp.swapaxes(convolve(x), 1, 2)), 1, 2)

    batch, height, width, channels = images.shape
    if min(height, width) < window:
        raise ValueError(f"ssim needs images of at least {window} pixels, but these are {height} x {width}")
    x, y = (jnp.moveaxis(i, -1, 1).reshape(batch * channels, height, width) for i in (images, references))
    mean_x, mean_y = blur(x), blur(y)
    # Second moments about each image's mean, not about 0: in float32 they would cancel where the image is flat.
    x, y = (i - jnp.mean(i, axis=(1, 2), keepdims=True) for i in (x, y))
    shift_x, shift_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - shift_x**2, blur(y * y) - shift_y**2, blur(x * y) - shift_x * shift_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return jnp.mean(similarity.reshape(batch, -1), axis=1)


def code_counts(token_ids: Array, num_codes: int) -> Array:
    """How often each code occurs in each example: ``[B, ...]`` int32 to ``[B, K]`` float32."""
    flat = token_ids.reshape(token_ids.shape[0], -1)
    return jax.vmap(lambda ids: jnp.zeros(num_codes).at[ids].add(1.0))(flat)


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that counts ``[K]`` make."""
    share = np.asarray(counts, np.float64)
    share = share[share > 0] / share.sum()
    return float(np.sum(share * np.log(1 / share)))


def codebook_metrics(counts: np.ndarray) -> dict[str, float]:
    """What counts ``[K]`` of codes say of the codebook.

    Returns:
      "code_use": share of the codes that occur at all, in 0..1; "perplexity": exp of the entropy, in 1..K;
      "code_entropy": the entropy over log K, in 0..1.
    """
    nats = entropy(counts)
    return {
        "code_use": float(np.mean(np.asarray(counts) > 0)),
        "perplexity": float(np.exp(nats)),
        "code_entropy": nats / float(np.log(len(counts))),
    }
