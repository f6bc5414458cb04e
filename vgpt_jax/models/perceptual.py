"""Perceptual distances: how far apart two pictures are in the features of a network trained on photographs.

Both normalise the features of every position to length one and compare them by weighted squares; they differ in the network
and in the weights. Their values are not comparable with each other. How they come by their weights is no concern of this
file (``pretrained/load.py``).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import check_range
from vgpt_jax.models.efficientnet_lite0 import EfficientNetLite0
from vgpt_jax.models.vgg16 import STAGES as VGG16_STAGES
from vgpt_jax.models.vgg16 import VGG16

NORM_EPSILON = 1e-10


class FeatureDistance(nnx.Module):
    """The sum over feature maps of the mean over positions of the weighted squared difference of unit feature vectors.

    Gradients flow to ``images`` alone: neither to the references nor to the weights. The weights are variables like any
    other; give them to a compiled function as its argument, for as constants they would be compiled into it.

    Args:
      network: has ``features(x) -> maps [B, h, w, C]``, of ``x [B, H, W, 3]`` in a range of its own.
      heads: the weights of the squares of each map: ``[C]``, or a number for all channels.
      scale: of images in 0..1, for each colour, to the network's range.
      shift: added to them then.
      value_range: the least and the greatest value of the images it is given. They are not clipped.

    Raises:
      UserError: the value range is empty.
    """

    def __init__(
        self,
        network: nnx.Module,
        heads: Sequence[nnx.Param | float],
        scale: Sequence[float],
        shift: Sequence[float],
        value_range: Sequence[float],
    ):
        low, high = (float(value) for value in value_range)
        check_range("the greatest value of value_range", high, above=low)
        self.network = network
        self.heads = nnx.List(heads)
        self.scale, self.shift = tuple(scale), tuple(shift)
        self.value_range = (low, high)

    def features(self, images: Array) -> tuple[Array, ...]:
        """Unit feature vectors of images ``[B, H, W, 3]`` in the value range: maps ``[B, h, w, C]`` float32."""
        low, high = self.value_range
        x = (images.astype(jnp.float32) - low) / (high - low)
        x = x * jnp.array(self.scale) + jnp.array(self.shift)
        graph, state = nnx.split(self.network)
        return tuple(unit_vectors(y) for y in nnx.merge(graph, jax.lax.stop_gradient(state)).features(x))

    def distance_to(self, images: Array, reference_features: Sequence[Array]) -> Array:
        """`distance` to references whose `features` are known: ``[B]`` float32."""
        total = jnp.zeros(len(images), jnp.float32)
        for ours, theirs, head in zip(self.features(images), reference_features, self.heads, strict=True):
            squares = jnp.square(ours - jax.lax.stop_gradient(theirs))
            weight = jax.lax.stop_gradient(head[...]) if isinstance(head, nnx.Param) else head
            total = total + jnp.mean(jnp.sum(weight * squares, axis=-1), axis=(1, 2))
        return total

    def distance(self, images: Array, references: Array) -> Array:
        """Distances of each image to its reference, both ``[B, H, W, 3]`` in the value range: ``[B]`` float32, from 0."""
        return self.distance_to(images, self.features(jax.lax.stop_gradient(references)))

    def __call__(self, images: Array, references: Array) -> Array:
        """`distance`."""
        return self.distance(images, references)


class LPIPS(FeatureDistance):
    """LPIPS over VGG16 (Zhang et al. 2018, arXiv 1801.03924, equation 1), in version 0.1, which scales its input.

    Pictures are of at least 16 pixels.

    Args:
      value_range: of the images, as in `FeatureDistance`.
      rngs: ``params``.
    """

    def __init__(self, *, value_range: Sequence[float] = (0.0, 1.0), rngs: nnx.Rngs):
        heads = [nnx.Param(jnp.full(channels[-1], 1 / channels[-1])) for channels in VGG16_STAGES]
        # The authors' scaling layer, (x - mean) / deviation, is for images in -1..1.
        means, deviations = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
        scale = [2.0 / deviation for deviation in deviations]
        shift = [(-1.0 - mean) / deviation for mean, deviation in zip(means, deviations, strict=True)]
        super().__init__(VGG16(rngs=rngs), heads, scale, shift, value_range)


class EfficientNetDistance(FeatureDistance):
    """The mean over EfficientNet-Lite0's five feature maps of the mean squared distance of unit vectors: from 0 to 4.

    Built like LPIPS, without weights learned from people's judgements.

    Args:
      value_range: of the images, as in `FeatureDistance`.
      rngs: ``params``.
    """

    def __init__(self, *, value_range: Sequence[float] = (0.0, 1.0), rngs: nnx.Rngs):
        scale, shift = [255.0 / 128.0] * 3, [-127.0 / 128.0] * 3
        super().__init__(EfficientNetLite0(rngs=rngs), [1 / 5] * 5, scale, shift, value_range)


PERCEPTUAL = {"efficientnet": EfficientNetDistance, "lpips": LPIPS}


def unit_vectors(x: Array) -> Array:
    """``x`` divided by its length along the last axis; a vector of zeros stays, and its gradient is zero.

    Differs from lpips: there the root of zero makes the gradient NaN, which a picture with one colour can cause.
    """
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    there = squares > NORM_EPSILON**2
    length = jnp.sqrt(jnp.where(there, squares, 1.0))
    return jnp.where(there, x / (length + NORM_EPSILON), 0.0)
