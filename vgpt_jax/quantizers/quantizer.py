"""The interface of every quantizer, and what their implementations share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError
from vgpt_jax.quantizers.output import QuantizerOutput


class Buffer(nnx.Variable):
    """State of a quantizer that is saved with the model and that no gradient reaches."""


class Quantizer(nnx.Module):
    """Latents to ids of codes and back. The forward pass searches and computes losses; nothing else changes a codebook but
    the optimizer and `surgery`, which a training step calls after its optimizer's update.

    Attributes:
      num_codewords: K; a token id is in ``[0, K)``.
      embedding_dim: D, the width of the latents.
      pretrain_steps: training steps in which the quantizer is the identity with losses of 0 (warm start).
    """

    num_codewords: int
    embedding_dim: int
    pretrain_steps: int = 0

    def __call__(self, z_e: Array, key: Array | None = None) -> QuantizerOutput:
        """Quantizes latents ``[..., D]`` of any float dtype, in float32.

        Args:
          z_e: the latents.
          key: PRNG key of a training step, for the quantizers that draw; None in evaluation, which is deterministic.
        """
        raise NotImplementedError

    def quantize(self, z_e: Array) -> Array:
        """Latents ``[..., D]`` to token ids ``[...]`` int32 (composed quantizers: see `token_shape`)."""
        raise NotImplementedError

    def dequantize(self, token_ids: Array) -> Array:
        """Token ids to quantized latents ``[..., D]`` float32: what `__call__` returned as ``z_q``."""
        raise NotImplementedError

    def dequantize_written(self, token_ids: Array, written: Array) -> Array:
        """Quantized latents ``[..., D]`` where only some tokens are there: the mean code stands for the others.

        Args:
          token_ids: of any leading shape.
          written: bool, of the same shape.
        """
        blank = jnp.mean(self.dequantize(jnp.arange(self.num_codewords)), axis=0)
        return jnp.where(written[..., None], self.dequantize(token_ids), blank)

    def token_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """The shape of the token ids of one picture, for latents of ``grid`` = (h, w)."""
        return tuple(grid)

    def is_warming_up(self) -> Array:
        """Whether the quantizer is still the identity, a bool scalar."""
        return jnp.zeros((), bool)

    def surgery(self, output: QuantizerOutput, key: Array) -> None:
        """What follows the optimizer's update of a training step, in place; nothing, where codes learn by gradient alone.

        Under ``jit`` it belongs between ``nnx.merge`` and ``nnx.state``. Statistics are those of the arrays in ``output``,
        so with a sharded batch those of the global batch.

        Args:
          output: of this step's forward pass.
          key: PRNG key of this step.
        """

    def check_width(self, z_e: Array) -> None:
        """Raises `UserError` for latents of another width than D."""
        if z_e.shape[-1] != self.embedding_dim:
            raise UserError(
                f"{type(self).__name__}: latents are {z_e.shape[-1]} wide, but embedding_dim is {self.embedding_dim}"
            )


def straight_through(z_e: Array, value: Array) -> Array:
    """``value`` to the bit, with the gradient of ``z_e`` (arXiv 1308.3432)."""
    sg = jax.lax.stop_gradient
    return sg(value) + (z_e - sg(z_e))
