"""Residual quantization: each quantizer codes what the ones before it left, and the codes are added up."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range, choose
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.quantizer import Buffer, Quantizer, straight_through
from vgpt_jax.quantizers.single import SINGLE_QUANTIZERS


class SuccessiveQuantizer(Quantizer):
    """What the quantizers share that code in rounds, each round on the residuals of the rounds before.

    Where codes are drawn from latents (at the end of the warm start, or in the first step), the residuals of a round are
    what they will be only once the codes of the rounds before have been drawn. So the inner quantizers draw in
    ``num_rounds`` training steps in a row instead of in one: the first of them makes the codes of the first round right, the
    second, whose residuals are of those codes and of another batch's latents, those of the second as well, and so on. (From
    the residuals of one batch alone they cannot be drawn: a latent that has become a code has none.) The warm start lasts
    until they are done.

    Args:
      quantizers: the inner quantizers, all of one class and one set of arguments.
      num_rounds: how many residuals there are.
    """

    def __init__(self, quantizers: list[Quantizer], num_rounds: int):
        self.quantizers = nnx.List(quantizers)
        self.num_rounds = num_rounds
        first = quantizers[0]
        self.num_codewords, self.embedding_dim = first.num_codewords, first.embedding_dim
        self._first_draw = max(first.pretrain_steps, 1) - 1
        self.pretrain_steps = first.pretrain_steps + num_rounds - 1 if first.pretrain_steps else 0
        self.steps = Buffer(jnp.zeros((), jnp.int32))  # training steps seen, counted by `surgery`

    def is_warming_up(self) -> Array:
        """Whether the quantizers, which warm up together, are still the identity, a bool scalar."""
        return self.quantizers[0].is_warming_up()

    def surgery(self, output: QuantizerOutput, key: Array) -> None:
        """That of every inner quantizer on its part of ``output``, in place.

        Args:
          output: of this step's forward pass; ``parts`` has one output for each inner quantizer.
          key: PRNG key of this step.
        """
        before, structure = jax.tree.flatten(nnx.state(self.quantizers))
        for index, (quantizer, part) in enumerate(zip(self.quantizers, output.parts, strict=True)):
            quantizer.surgery(part, jax.random.fold_in(key, index))

        # A quantizer draws its codes when its count of steps says so: it draws again if the counts go back.
        round_ = self.steps[...] - self._first_draw
        again = (round_ >= 0) & (round_ < self.num_rounds - 1)
        after = [
            jnp.where(again, old, new) if jnp.issubdtype(new.dtype, jnp.integer) else new
            for old, new in zip(before, jax.tree.leaves(nnx.state(self.quantizers)), strict=True)
        ]
        nnx.update(self.quantizers, jax.tree.unflatten(structure, after))
        self.steps[...] += 1


class ResidualQuantize(SuccessiveQuantizer):
    """Q ids for each latent: the first quantizer codes the latent, each further one what is left of it; ``z_q`` is their sum.

    K codes at each of Q depths give ``K^Q`` values for the search and memory of ``Q K``. The ids are ordered by what they
    matter: the first n of them, given to `dequantize`, are the latent as n quantizers see it.

    The residual is ``z_e - sg(sum of the codes so far)``, so every inner loss reaches the encoder, and the parameters of its
    own depth only. ``z_q`` has the gradient of the identity to the latents, once, whatever estimators the inner quantizers
    have: they would add up to Q times the identity, or near it. To the parameters it has the gradients of the inner
    estimators, each as if its residual were constant (IBQ, DiVeQ, ``sync_nu``): a sum passes its gradient to every term
    alike. Its value is that of the codes, so DiVeQ's noise is in the gradient only. The rotation trick, whose gradient
    goes to the latents alone, is without effect.

    Args:
      num_quantizers: Q. Each one more lowers the error, by less the deeper it is, and makes the sequence longer.
      shared_codebook: one inner quantizer at every depth (RQ-VAE): codes for latents and residuals alike, in surgery all
        together. Otherwise each depth has its own (SoundStream).
      quantizer_dropout: share of the examples (leading axis) whose ``z_q`` in training is the sum of only the first n codes,
        n uniform in 1..Q, so that any depth decodes well (SoundStream, section III-C). Ids and losses are those of all
        depths, so every quantizer goes on learning.
      depth_scale: what depth q quantizes is its residual divided by ``depth_scale**q``, and its codes are multiplied by
        that. 1, 0.5, 0.25, ...: 1 for codes that learn their size. Codes of a fixed size cannot get finer by themselves:
        0.5 makes LFQ a binary expansion, about ``1 / levels`` suits FSQ. The inner losses are in the divided units.
      quantizer: the inner quantizers' name in ``SINGLE_QUANTIZERS``.
      quantizer_args: their arguments. ``embedding_dim`` is D, ``num_codewords`` is K of each. A warm start of theirs
        lasts ``num_quantizers - 1`` steps longer (`SuccessiveQuantizer`).
      rngs: given to the inner quantizers.

    Raises:
      UserError: an argument is out of its range, or there is no such quantizer; the message names it.

    Reference: Zeghidour et al. 2021, arXiv 2107.03312, section III-C and algorithm 1; Lee et al. 2022, arXiv 2203.01941,
    section 3.1.
    """

    def __init__(
        self,
        *,
        num_quantizers: int = 4,
        shared_codebook: bool = False,
        quantizer_dropout: float = 0.0,
        depth_scale: float = 1.0,
        quantizer: str = "vector_quantize",
        quantizer_args: dict[str, Any],
        rngs: nnx.Rngs,
    ):
        check_range("residual_quantize.num_quantizers", num_quantizers, least=1)
        check_range("residual_quantize.quantizer_dropout", quantizer_dropout, least=0, most=1)
        check_range("residual_quantize.depth_scale", depth_scale, above=0, most=1)
        if math.frexp(depth_scale)[0] != 0.5:
            # The compiler may round a product and the sum after it as one, in one program and not in the next.
            raise UserError(
                f"residual_quantize.depth_scale is {depth_scale}, but must be 1, 0.5, 0.25, ...: a power of 2, by which "
                "codes are multiplied without rounding"
            )
        inner = choose("residual_quantize.quantizer", quantizer, SINGLE_QUANTIZERS)
        num_codebooks = 1 if shared_codebook else num_quantizers
        super().__init__([inner(rngs=rngs, **quantizer_args) for _ in range(num_codebooks)], num_quantizers)
        self.num_quantizers = num_quantizers
        self.shared_codebook = shared_codebook
        self.quantizer_dropout = quantizer_dropout
        self.depth_scale = depth_scale

    def __call__(self, z_e: Array, key: Array | None = None) -> QuantizerOutput:
        """Quantizes latents.

        Args:
          z_e: ``[..., D]`` of any float dtype; computed on in float32.
          key: PRNG key of a training step, for ``quantizer_dropout`` and for inner quantizers that draw.

        Returns:
          `QuantizerOutput` with ids ``[..., Q]`` and the inner quantizers' losses, summed over depth by name. During the
          warm start ``z_q`` is ``z_e``.
        """
        self.check_width(z_e)
        z_e = z_e.astype(jnp.float32)
        sg = jax.lax.stop_gradient
        lengths = None if key is None or not self.quantizer_dropout else self._draw_lengths(key, z_e)

        outputs, codes, carrier = [], jnp.zeros_like(z_e), z_e
        value = codes
        for depth in range(self.num_quantizers):
            depth_key = None if key is None else jax.random.fold_in(key, depth)
            quantizer, scale = self._quantizer(depth), self.depth_scale**depth
            residual = (z_e - sg(codes)) / scale
            output = quantizer(residual, depth_key)
            code = self._code(depth, output.token_ids)
            # The same again (the compiler makes one of the two), but with a gradient to the parameters alone.
            estimate = scale * quantizer(sg(residual), depth_key).z_q

            codes = codes + code
            if lengths is not None:
                kept = depth < lengths
                code, estimate = jnp.where(kept, code, 0.0), jnp.where(kept, estimate, 0.0)
            value, carrier = value + code, carrier + estimate
            outputs.append(output)

        names = outputs[0].losses
        summed = {
            "losses": {name: sum(output.losses[name] for output in outputs) for name in names},
            "loss": sum(output.loss for output in outputs),
        }
        token_ids = jnp.stack([output.token_ids for output in outputs], axis=-1)
        if self.shared_codebook:
            z_qs, residuals = (jnp.stack([getattr(o, name) for o in outputs], axis=-2) for name in ("z_q", "z_e"))
            outputs = [QuantizerOutput(z_q=z_qs, token_ids=token_ids, z_e=residuals, **summed)]
        return QuantizerOutput(
            z_q=straight_through(carrier, jnp.where(self.is_warming_up(), z_e, value)),
            token_ids=token_ids,
            z_e=z_e,
            parts=tuple(outputs),
            **summed,
        )

    def quantize(self, z_e: Array) -> Array:
        """Latents ``[..., D]`` to ids ``[..., Q]`` int32."""
        return self(z_e).token_ids

    def dequantize(self, token_ids: Array) -> Array:
        """The sum ``[..., D]`` float32 of the codes of ids ``[..., n]``, the first n <= Q of each latent's."""
        self._check_depths(token_ids)
        codes = jnp.zeros((*token_ids.shape[:-1], self.embedding_dim))
        for depth in range(token_ids.shape[-1]):
            codes = codes + self._code(depth, token_ids[..., depth])
        return codes

    def dequantize_written(self, token_ids: Array, written: Array) -> Array:
        """Quantized latents ``[..., D]`` where only some tokens are there: of the first depth the mean code stands for the
        others, of the further ones nothing.

        Args:
          token_ids: ``[..., n]``, n <= Q.
          written: bool, of the same shape.
        """
        self._check_depths(token_ids)
        codes = self.quantizers[0].dequantize_written(token_ids[..., 0], written[..., 0])
        for depth in range(1, token_ids.shape[-1]):
            codes = codes + jnp.where(written[..., depth, None], self._code(depth, token_ids[..., depth]), 0.0)
        return codes

    def token_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """``(h, w, Q)``."""
        return (*grid, self.num_quantizers)

    def _quantizer(self, depth: int) -> Quantizer:
        return self.quantizers[0 if self.shared_codebook else depth]

    def _code(self, depth: int, token_ids: Array) -> Array:
        """What ids ``[...]`` of one depth add to the sum, ``[..., D]``."""
        return self.depth_scale**depth * self._quantizer(depth).dequantize(token_ids)

    def _draw_lengths(self, key: Array, z_e: Array) -> Array:
        """How many codes each example's ``z_q`` sums, int32 of shape ``[B, 1, ..., 1]`` for latents ``[B, ..., D]``."""
        examples = z_e.shape[:1] if z_e.ndim > 1 else ()
        share_key, length_key = jax.random.split(jax.random.fold_in(key, self.num_quantizers))
        shortened = jax.random.bernoulli(share_key, self.quantizer_dropout, examples)
        lengths = jax.random.randint(length_key, examples, 1, self.num_quantizers + 1)
        lengths = jnp.where(shortened, lengths, self.num_quantizers)
        return lengths.reshape(examples + (1,) * (z_e.ndim - 1))

    def _check_depths(self, token_ids: Array) -> None:
        depths = token_ids.shape[-1] if token_ids.ndim else 0
        if not 1 <= depths <= self.num_quantizers:
            raise UserError(
                f"ResidualQuantize: there are {depths} ids a latent, but there must be 1 to {self.num_quantizers}: "
                "the last axis is that of the depths"
            )
