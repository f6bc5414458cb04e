"""Spectral normalisation: a convolution whose kernel is divided by its greatest singular value."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

INITIAL_ITERATIONS = 15  # of the power method, from random vectors; as many as PyTorch's


class SpectralState(nnx.Variable):
    """Estimates of a kernel's first singular vectors: saved with the model, moved by `update` alone, reached by no gradient."""


class SpectralConv(nnx.Conv):
    """A convolution of ``kernel / sigma``; arguments as `flax.nnx.Conv`'s, ``strides`` and ``padding`` a pair each.

    ``sigma = u^T W v``, of the kernel as a matrix ``W`` ``[out, kh * kw * in]`` and of the stored u ``[out]`` and v, float32.
    The gradient goes through ``W`` here too, and not through u and v.

    A forward pass changes nothing. `update` does one iteration of the power method; a training step calls it once, after
    its optimizer's update, so that the next step's forward pass sees what it would had it iterated itself.

    Reference: Miyato et al. 2018, arXiv 1802.05957, section 2.1 and algorithm 1.
    """

    def __init__(self, *args, rngs: nnx.Rngs, **kwargs):
        super().__init__(*args, rngs=rngs, **kwargs)
        u = jax.random.normal(rngs.params(), (self.out_features,))
        u, v = jax.lax.fori_loop(1, INITIAL_ITERATIONS, lambda _, uv: self._iterate(uv[0]), self._iterate(u))
        self.u, self.v = SpectralState(u), SpectralState(v)

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...] / self.sigma()
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
        y = jax.lax.conv_general_dilated(
            x, kernel, self.strides, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y if bias is None else y + bias

    def sigma(self) -> Array:
        """The estimate of the greatest singular value, a float32 scalar; differentiable with respect to the kernel."""
        u, v = jax.lax.stop_gradient((self.u[...], self.v[...]))
        return jnp.vdot(matmul(v, self._matrix()), u, precision=jax.lax.Precision.HIGHEST)

    def update(self) -> None:
        """One iteration of the power method, in place."""
        self.u[...], self.v[...] = self._iterate(self.u[...])

    def _matrix(self) -> Array:
        return self.kernel[...].reshape(-1, self.out_features)  # [kh * kw * in, out], so W^T

    def _iterate(self, u: Array) -> tuple[Array, Array]:
        matrix = jax.lax.stop_gradient(self._matrix())
        v = unit(matmul(matrix, u))
        return unit(matmul(v, matrix)), v


def matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def unit(vector: Array) -> Array:
    """The vector at length 1; zeros stay zeros."""
    return vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12)
