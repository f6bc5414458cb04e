"""Product quantization: the latents' components in groups, each quantized on its own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range, choose
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.quantizer import Quantizer
from vgpt_jax.quantizers.residual import ResidualQuantize
from vgpt_jax.quantizers.single import SINGLE_QUANTIZERS


class GroupedQuantize(Quantizer):
    """G ids for each latent: its D components are cut into G parts in a row, and each part is quantized by itself.

    K codes a group give ``K^G`` values for the search and memory of ``G K`` codes that are D/G wide. All ids weigh alike, as
    no group knows of another. The gradient of ``z_q`` is that of the inner quantizers, each to its part.

    Args:
      num_groups: G. With more groups the codes are narrower, the error falls, and the sequence is longer.
      shared_codebook: one inner quantizer for all groups ("multi-head" codes), which sees the parts of a latent as so many
        latents. Otherwise each group has its own.
      quantizer: the inner quantizers' name in ``SINGLE_QUANTIZERS``, or "residual_quantize".
      quantizer_args: their arguments; ``embedding_dim`` is the width of one group, D / G.
      rngs: given to the inner quantizers.

    Raises:
      UserError: an argument is out of its range, or there is no such quantizer; the message names it.

    Reference: Jegou et al. 2011, "Product quantization for nearest neighbor search", section II-B; residual quantizers in
    groups: Yang et al. 2023, arXiv 2305.02765.
    """

    def __init__(
        self,
        *,
        num_groups: int = 2,
        shared_codebook: bool = False,
        quantizer: str = "vector_quantize",
        quantizer_args: dict[str, Any],
        rngs: nnx.Rngs,
    ):
        check_range("grouped_quantize.num_groups", num_groups, least=1)
        inner = choose(
            "grouped_quantize.quantizer", quantizer, SINGLE_QUANTIZERS | {"residual_quantize": ResidualQuantize}
        )
        num_codebooks = 1 if shared_codebook else num_groups
        self.quantizers = nnx.List([inner(rngs=rngs, **quantizer_args) for _ in range(num_codebooks)])
        first = self.quantizers[0]
        self.num_groups = num_groups
        self.shared_codebook = shared_codebook
        self.num_codewords = first.num_codewords
        self.embedding_dim = num_groups * first.embedding_dim
        self.pretrain_steps = first.pretrain_steps
        self._group_axis = 1 - len(first.token_shape((1, 1)))  # of the token ids, counted from the end

    def __call__(self, z_e: Array, key: Array | None = None) -> QuantizerOutput:
        """Quantizes latents.

        Args:
          z_e: ``[..., D]`` of any float dtype; computed on in float32.
          key: PRNG key of a training step. All groups get the same, so that residual quantizers in them drop the same
            depths of an example.

        Returns:
          `QuantizerOutput` with ids ``[..., G]`` (``[..., G, Q]`` of residual quantizers) and the mean of the groups'
          losses: a mean over all of D.
        """
        groups = self._split(z_e)
        if self.shared_codebook:
            outputs = [self.quantizers[0](groups, key)]
            z_q, token_ids = outputs[0].z_q.reshape(z_e.shape), outputs[0].token_ids
        else:
            outputs = [quantizer(groups[..., i, :], key) for i, quantizer in enumerate(self.quantizers)]
            z_q = jnp.concatenate([output.z_q for output in outputs], axis=-1)
            token_ids = jnp.stack([output.token_ids for output in outputs], axis=self._group_axis)
        return QuantizerOutput(
            z_q=z_q,
            token_ids=token_ids,
            z_e=groups.reshape(z_e.shape),
            losses={name: sum(o.losses[name] for o in outputs) / len(outputs) for name in outputs[0].losses},
            loss=sum(output.loss for output in outputs) / len(outputs),
            parts=tuple(outputs),
        )

    def quantize(self, z_e: Array) -> Array:
        """Latents ``[..., D]`` to ids ``[..., G]`` int32 (``[..., G, Q]`` of residual quantizers)."""
        groups = self._split(z_e)
        if self.shared_codebook:
            return self.quantizers[0].quantize(groups)
        token_ids = [quantizer.quantize(groups[..., i, :]) for i, quantizer in enumerate(self.quantizers)]
        return jnp.stack(token_ids, axis=self._group_axis)

    def dequantize(self, token_ids: Array) -> Array:
        """The codes ``[..., D]`` float32 of ids ``[..., G]`` (``[..., G, Q]``), one group beside the other."""
        self._check_groups(token_ids)
        if self.shared_codebook:
            codes = self.quantizers[0].dequantize(token_ids)  # [..., G, D / G]
        else:
            ids = jnp.moveaxis(token_ids, self._group_axis, 0)
            codes = jnp.stack([quantizer.dequantize(ids[i]) for i, quantizer in enumerate(self.quantizers)], axis=-2)
        return codes.reshape(*codes.shape[:-2], self.embedding_dim)

    def dequantize_written(self, token_ids: Array, written: Array) -> Array:
        """Quantized latents ``[..., D]`` where only some tokens are there; in each group as its quantizer does.

        Args:
          token_ids: ``[..., G]`` (``[..., G, Q]``).
          written: bool, of the same shape.
        """
        self._check_groups(token_ids)
        ids, there = (jnp.moveaxis(x, self._group_axis, 0) for x in (token_ids, written))
        quantizers = [self.quantizers[0]] * self.num_groups if self.shared_codebook else self.quantizers
        parts = [quantizer.dequantize_written(ids[i], there[i]) for i, quantizer in enumerate(quantizers)]
        return jnp.concatenate(parts, axis=-1)

    def token_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """``(h, w, G)``; of residual quantizers ``(h, w, G, Q)``."""
        inner = self.quantizers[0].token_shape(grid)
        return (*grid, self.num_groups, *inner[len(grid) :])

    def is_warming_up(self) -> Array:
        """Whether the quantizers, which warm up together, are still the identity, a bool scalar."""
        return self.quantizers[0].is_warming_up()

    def surgery(self, output: QuantizerOutput, key: Array) -> None:
        """That of every inner quantizer on its part of ``output``, in place.

        Args:
          output: of this step's forward pass; ``parts`` has one output for each inner quantizer.
          key: PRNG key of this step.
        """
        for index, (quantizer, part) in enumerate(zip(self.quantizers, output.parts, strict=True)):
            quantizer.surgery(part, jax.random.fold_in(key, index))

    def _split(self, z_e: Array) -> Array:
        """Latents ``[..., D]`` to their parts ``[..., G, D / G]`` float32."""
        self.check_width(z_e)
        return z_e.astype(jnp.float32).reshape(*z_e.shape[:-1], self.num_groups, -1)

    def _check_groups(self, token_ids: Array) -> None:
        if token_ids.ndim < -self._group_axis or token_ids.shape[self._group_axis] != self.num_groups:
            raise UserError(
                f"GroupedQuantize: ids are of shape {token_ids.shape}, but axis {self._group_axis} must be that of the "
                f"{self.num_groups} groups"
            )
