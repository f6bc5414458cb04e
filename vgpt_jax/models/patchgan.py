"""The patch discriminator of pix2pix (Isola et al. 2017, arXiv 1611.07004, section 3.2 and appendix 6.1.2), as VQ-GAN uses
it (Esser et al. 2021, arXiv 2012.09841): 4x4 convolutions that judge overlapping patches of an image.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import check_range, choose
from vgpt_jax.models.layers import drawn_as_matrix
from vgpt_jax.models.spectral_norm import SpectralConv


def scale_init(key: Array, shape, dtype=jnp.float32) -> Array:
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


class BatchNorm(nnx.Module):
    """Normalises each channel over the batch and all positions, by the statistics of the batch at hand, always.

    There are no running averages: a discriminator is only ever used in training. Under ``jit`` with a sharded batch the
    statistics are those of the global batch.

    Args:
      channels: C.
      rngs: ``params``.
    """

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.scale = nnx.Param(scale_init(rngs.params(), (channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: Array) -> Array:
        """``[B, h, w, C]`` of any float dtype to float32."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=(0, 1, 2))
        variance = jnp.mean(x**2, axis=(0, 1, 2))
        return x * (self.scale[...] * jax.lax.rsqrt(variance + 1e-5)) + self.bias[...]


def group_norm(channels: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """GroupNorm over 32 groups, or over as many of them as divide ``channels``. Statistics are float32."""
    groups = math.gcd(32, channels)
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=1e-5, dtype=jnp.float32, scale_init=scale_init, rngs=rngs)


NORMS = {"batch": BatchNorm, "group": group_norm, "none": None}


class PatchGAN(nnx.Module):
    """Images to one logit a patch.

    ``num_layers`` convolutions of stride 2, then two of stride 1, all 4x4 with a padding of 1; LeakyReLU of slope 0.2 after
    each but the last, normalisation before it after each but the first and the last. A convolution that is normalised has
    no bias. `convs` and `norms` hold them in the order of the computation.

    Args:
      ndf: channels after the first convolution; the n-th after it has ``min(2^n, 8)`` times as many.
      num_layers: convolutions of stride 2; one more makes patches about twice as wide (3: 70 pixels) and logits half as
        many each way.
      norm: "batch" (as published; the logits of an image then depend on the others of its batch, so real and fake images
        are to be judged in batches of their own), "group" (each image by itself) or "none".
      spectral_norm: divides every kernel by an estimate of its spectral norm (arXiv 1802.05957); a training step then has
        to call `update_spectral_norm`.
      dtype: of the computation; parameters, statistics of norms and logits are float32.
      rngs: ``params``.

    Raises:
      UserError: an argument is out of its range, or an unknown norm.

    Differs from taming-transformers: biases of convolutions start at 0 as in pix2pix, not as PyTorch draws them; "group"
    is none of its options.
    """

    def __init__(
        self,
        *,
        ndf: int = 64,
        num_layers: int = 3,
        norm: str = "batch",
        spectral_norm: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_range("patchgan.ndf", ndf, least=1)
        check_range("patchgan.num_layers", num_layers, least=1)
        make_norm = choose("patchgan.norm", norm, NORMS)
        make_conv = SpectralConv if spectral_norm else nnx.Conv

        def conv(in_channels: int, out_channels: int, stride: int, use_bias: bool) -> nnx.Conv:
            return make_conv(
                in_channels,
                out_channels,
                (4, 4),
                strides=(stride, stride),
                padding=((1, 1), (1, 1)),
                use_bias=use_bias,
                dtype=dtype,
                kernel_init=drawn_as_matrix(jax.nn.initializers.normal(0.02)),
                rngs=rngs,
            )

        widths = [ndf * min(2**n, 8) for n in range(num_layers + 1)]
        strides = [2] * (num_layers - 1) + [1]
        inner = zip(widths[:-1], widths[1:], strides, strict=True)
        self.convs = nnx.List(
            [
                conv(3, ndf, 2, True),
                *(conv(i, o, stride, make_norm is None) for i, o, stride in inner),
                conv(widths[-1], 1, 1, True),
            ]
        )
        self.norms = nnx.List([make_norm(width, rngs=rngs) for width in widths[1:]] if make_norm else [])
        self.num_layers = num_layers
        self.spectral_norm = spectral_norm

    def __call__(self, images: Array) -> Array:
        """Images ``[B, H, W, 3]`` in the value range that they are trained in to logits ``[B, h', w', 1]`` float32, greater
        for what looks real; ``h' = H // 2^num_layers - 2``.

        Raises:
          UserError: the images are too small for a single logit.
        """
        least = 3 * 2**self.num_layers
        check_range(f"the height of images for patchgan.num_layers {self.num_layers}", images.shape[1], least=least)
        check_range(f"the width of images for patchgan.num_layers {self.num_layers}", images.shape[2], least=least)
        first, *inner, last = self.convs
        x = jax.nn.leaky_relu(first(images), 0.2)
        for i, conv in enumerate(inner):
            x = conv(x)
            if self.norms:
                x = self.norms[i](x).astype(x.dtype)
            x = jax.nn.leaky_relu(x, 0.2)
        return last(x).astype(jnp.float32)

    def update_spectral_norm(self) -> None:
        """Brings the estimates of the spectral norms one iteration nearer to the kernels, in place; nothing without
        ``spectral_norm``. A training step calls it once, after the optimizer's update; under ``jit`` it belongs between
        ``nnx.merge`` and ``nnx.split``.
        """
        if self.spectral_norm:
            for conv in self.convs:
                conv.update()
