"""Multi-scale residual quantization: a picture's latents as grids of ids, from one id for all of it to one for each place."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range, choose
from vgpt_jax.quantizers.output import QuantizerOutput
from vgpt_jax.quantizers.quantizer import straight_through
from vgpt_jax.quantizers.residual import SuccessiveQuantizer
from vgpt_jax.quantizers.single import SINGLE_QUANTIZERS

OWN_LOSSES = ("commitment", "codebook")


class MultiScaleQuantize(SuccessiveQuantizer):
    """The tokenizer of VAR: the latents are coded coarse to fine, each scale coding what the scales before left.

    At each scale the residual is resized down (area), every vector of it is replaced by a code of one codebook, the codes
    are resized up to the grid (bicubic), pass through a convolution phi, and are added to the reconstruction ``f_hat``. The
    ids of a scale do not depend on those of later ones, so a generator can predict all ids of a scale at once.

    The losses are of the reconstructions ``f_hat_k`` after each scale, mean over the scales: "codebook", ``mean |f_hat_k -
    sg(z_e)|^2``, from which codes and phi learn, and "commitment", ``mean |sg(f_hat_k) - z_e|^2``. They take the place of
    the inner quantizer's losses of these names. Its other losses (penalty, entropy) are kept, mean over the scales;
    through the residual ``z_e - sg(f_hat)`` they reach the encoder. ``z_q`` has the gradient of the identity to the latents
    and none to the parameters, whatever the inner quantizer's estimator.

    Args:
      scales: the sides of the grids of ids, increasing; the last is the side of the latents' grid. The sequence has the sum
        of their squares. VAR has 1, 2, 3, 4, 5, 6, 8, 10, 13, 16.
      phi_ratio: r in ``phi(h) = (1 - r) h + r conv(h)``, with a 3x3 convolution. 0: no convolutions.
      num_phi: convolutions that the scales share, neighbours the same one: 1 is one for all, ``len(scales)`` one for each.
      commitment_weight: weight of the commitment loss; beta in VAR.
      codebook_weight: weight of the codebook loss. Phi learns from nothing else.
      quantizer: the inner quantizer's name in ``SINGLE_QUANTIZERS``.
      quantizer_args: its arguments; of its weights for commitment and codebook loss nothing is read. A warm start of it
        lasts ``len(scales) - 1`` steps longer (`SuccessiveQuantizer`).
      rngs: ``params`` for the convolutions, and what the inner quantizer takes.

    Raises:
      UserError: an argument is out of its range, or there is no such quantizer; the message names it. Latents of another
        grid than the last scale's are refused when they come.

    Reference: Tian et al. 2024, arXiv 2404.02905, section 3.2 and algorithms 1 and 2; which convolution a scale has, the
    losses and the weight of the commitment are those of the authors' code.
    """

    def __init__(
        self,
        *,
        scales: Sequence[int] = (1, 2, 3, 4),
        phi_ratio: float = 0.5,
        num_phi: int = 4,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        quantizer: str = "vector_quantize",
        quantizer_args: dict[str, Any],
        rngs: nnx.Rngs,
    ):
        scales = tuple(scales)
        if not scales or scales[0] < 1 or any(fine <= coarse for coarse, fine in zip(scales, scales[1:], strict=False)):
            raise UserError(f"multi_scale_quantize.scales is {scales}, but must be sides from 1 up, increasing")
        check_range("multi_scale_quantize.phi_ratio", phi_ratio, least=0, most=1)
        check_range("multi_scale_quantize.num_phi", num_phi, least=1, most=len(scales))
        check_range("multi_scale_quantize.commitment_weight", commitment_weight, least=0)
        check_range("multi_scale_quantize.codebook_weight", codebook_weight, least=0)
        inner = choose("multi_scale_quantize.quantizer", quantizer, SINGLE_QUANTIZERS)
        known = inspect.signature(inner.__init__).parameters  # the class's own signature is that of NNX's metaclass
        weights = {f"{name}_weight": 0.0 for name in OWN_LOSSES if f"{name}_weight" in known}
        super().__init__([inner(rngs=rngs, **{**quantizer_args, **weights})], len(scales))
        self.scales = scales
        self.phi_ratio = phi_ratio
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        width = self.embedding_dim
        self.phis = nnx.List([Phi(width, phi_ratio, rngs) for _ in range(num_phi if phi_ratio else 0)])
        self._phi_of_scale = nearest_ticks(len(scales), num_phi)

    def __call__(self, z_e: Array, key: Array | None = None) -> QuantizerOutput:
        """Quantizes latents.

        Args:
          z_e: ``[..., s, s, D]`` of any float dtype, s the last of ``scales``; computed on in float32.
          key: PRNG key of a training step, for an inner quantizer that draws.

        Returns:
          `QuantizerOutput` with ids ``[..., L]``, scale by scale from coarse to fine, each row by row. During the warm start
          ``z_q`` is ``z_e`` and every loss is 0.
        """
        self.check_width(z_e)
        self._check_grid(z_e.shape[-3:-1])
        z_e = z_e.astype(jnp.float32)
        z = z_e.reshape(-1, *z_e.shape[-3:])  # [B, s, s, D]
        sg, inner = jax.lax.stop_gradient, self.quantizers[0]

        f_hat, outputs = jnp.zeros_like(z), []
        own_losses = dict.fromkeys(OWN_LOSSES, 0.0)
        for index, side in enumerate(self.scales):
            residual = resize(z - sg(f_hat), area_matrix(z.shape[1], side))
            output = inner(residual, None if key is None else jax.random.fold_in(key, index))
            f_hat = f_hat + self._increment(index, inner.dequantize(output.token_ids))
            own_losses["commitment"] += jnp.mean((sg(f_hat) - z) ** 2) / len(self.scales)
            own_losses["codebook"] += jnp.mean((f_hat - sg(z)) ** 2) / len(self.scales)
            outputs.append(output)

        warming = self.is_warming_up()
        losses = {name: jnp.where(warming, 0.0, value) for name, value in own_losses.items()}
        loss = self.commitment_weight * losses["commitment"] + self.codebook_weight * losses["codebook"]
        loss += sum(output.loss for output in outputs) / len(outputs)
        for name in outputs[0].losses:
            if name not in OWN_LOSSES:
                losses[name] = sum(output.losses[name] for output in outputs) / len(outputs)

        def joined(name: str, trailing: int) -> Array:
            """Of all scales, the ids ``[..., L]`` or the vectors ``[..., L, D]``."""
            arrays = [getattr(output, name) for output in outputs]
            flat = [a.reshape(len(z), -1, *a.shape[a.ndim - trailing :]) for a in arrays]
            return jnp.concatenate(flat, axis=1).reshape(*z_e.shape[:-3], -1, *flat[0].shape[2:])

        token_ids = joined("token_ids", 0)
        part = QuantizerOutput(
            z_q=joined("z_q", 1), token_ids=token_ids, z_e=joined("z_e", 1), losses=losses, loss=loss
        )
        return QuantizerOutput(
            z_q=straight_through(z, jnp.where(warming, z, f_hat)).reshape(z_e.shape),
            token_ids=token_ids,
            z_e=z_e,
            losses=losses,
            loss=loss,
            parts=(part,),
        )

    def quantize(self, z_e: Array) -> Array:
        """Latents ``[..., s, s, D]`` to ids ``[..., L]`` int32."""
        return self(z_e).token_ids

    def dequantize(self, token_ids: Array) -> Array:
        """The reconstruction ``[..., s, s, D]`` float32 of ids ``[..., L]``."""
        return self.dequantize_written(token_ids, jnp.ones(token_ids.shape, bool))

    def dequantize_written(self, token_ids: Array, written: Array) -> Array:
        """Quantized latents ``[..., s, s, D]`` where only some tokens are there: the codes of the others count as 0.

        Args:
          token_ids: ``[..., L]``.
          written: bool, of the same shape.
        """
        (length,) = self.token_shape(self.scales[-1:] * 2)
        if token_ids.shape[-1] != length:
            raise UserError(f"MultiScaleQuantize: there are {token_ids.shape[-1]} ids, but the scales have {length}")
        lead = token_ids.shape[:-1]
        token_ids, written = (x.reshape(-1, length) for x in (token_ids, written))
        f_hat, start = jnp.zeros((len(token_ids), *self.scales[-1:] * 2, self.embedding_dim)), 0
        for index, side in enumerate(self.scales):
            ids, there = (x[:, start : start + side**2].reshape(-1, side, side) for x in (token_ids, written))
            codes = jnp.where(there[..., None], self.quantizers[0].dequantize(ids), 0.0)
            f_hat = f_hat + self._increment(index, codes)
            start += side**2
        return f_hat.reshape(*lead, *f_hat.shape[1:])

    def token_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """``(L,)``, the sum of the squares of ``scales``."""
        self._check_grid(grid)
        return (sum(side**2 for side in self.scales),)

    def _increment(self, index: int, codes: Array) -> Array:
        """What the codes ``[B, k, k, D]`` of a scale add to the reconstruction, ``[B, s, s, D]``."""
        h = resize(codes, bicubic_matrix(codes.shape[1], self.scales[-1]))
        return self.phis[self._phi_of_scale[index]](h) if self.phi_ratio else h

    def _check_grid(self, grid: tuple[int, ...]) -> None:
        if tuple(grid) != self.scales[-1:] * 2:
            raise UserError(
                f"MultiScaleQuantize: the latents' grid is {' x '.join(map(str, grid))}, but the last of "
                f"multi_scale_quantize.scales is {self.scales[-1]}: it must be the side of the (square) grid"
            )


class Phi(nnx.Module):
    """``(1 - ratio) h + ratio conv(h)``, with a 3x3 convolution that keeps grid and width; weights drawn as PyTorch's are.

    Args:
      width: D.
      ratio: in 0..1.
      rngs: ``params``.
    """

    def __init__(self, width: int, ratio: float, rngs: nnx.Rngs):
        self.ratio = ratio
        bound = (9 * width) ** -0.5
        kernel, bias = (
            jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
            for shape in ((3, 3, width, width), (width,))
        )
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)

    def __call__(self, h: Array) -> Array:
        """``[B, s, s, D]`` float32 to the same, at full precision."""
        # One convolution does both terms. Were they added up after it, the compiler could round a product and a sum as one,
        # in one program and not in the next, and ids would not give back the bits of the forward pass.
        skip = np.zeros(self.kernel.shape, np.float32)
        skip[1, 1] = (1.0 - self.ratio) * np.eye(h.shape[-1])
        return self.ratio * self.bias[...] + jax.lax.conv_general_dilated(
            h,
            skip + self.ratio * self.kernel[...],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )


def nearest_ticks(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """Which convolution each scale has: the scales lie evenly on 0..1, the convolutions evenly inside, the nearest is taken."""
    inset = (1 / 3 if num_phi == 4 else 1 / 2) / num_phi  # the authors' choice: with 4 they lie nearer to the ends
    ticks = np.linspace(inset, 1 - inset, num_phi)
    return tuple(int(np.argmin(np.abs(ticks - i / max(num_scales - 1, 1)))) for i in range(num_scales))


def resize(x: Array, matrix: np.ndarray) -> Array:
    """Resizes ``[B, n, n, D]`` to ``[B, m, m, D]`` by a matrix ``[m, n]`` along rows and columns, at full precision."""
    if matrix.shape[0] == matrix.shape[1]:
        return x  # both kinds of matrices are then the identity
    precision = jax.lax.Precision.HIGHEST
    x = jnp.einsum("mh,bhwd->bmwd", matrix, x, precision=precision)
    return jnp.einsum("mw,bhwd->bhmd", matrix, x, precision=precision)


def area_matrix(source: int, target: int) -> np.ndarray:
    """``[target, source]`` float32: each row is the mean of the source places that its interval touches, all alike."""
    matrix = np.zeros((target, source), np.float32)
    for row in range(target):
        first, last = row * source // target, -(-(row + 1) * source // target)
        matrix[row, first:last] = 1.0 / (last - first)
    return matrix


def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """``[target, source]`` float32: cubic convolution with a = -0.75, pixel centres aligned, places outside as at the edge.

    Reference: Keys 1981, "Cubic convolution interpolation for digital image processing"; a as in PyTorch.
    """
    a = -0.75
    matrix = np.zeros((target, source), np.float64)
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        for place in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - place)
            near, far = ((a + 2) * x - (a + 3)) * x * x + 1, a * (((x - 5) * x + 8) * x - 4)
            matrix[row, min(max(place, 0), source - 1)] += near if x <= 1 else far
    return matrix.astype(np.float32)
