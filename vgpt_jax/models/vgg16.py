"""The convolutions of VGG16 (Simonyan and Zisserman 2014, arXiv 1409.1556, configuration D): the network behind LPIPS.

Its classifier is left out. Where the weights come from is no concern of this file.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels of each convolution
LEAST_SIZE = 2 ** (len(STAGES) - 1)


class VGG16(nnx.Module):
    """Pictures to five feature maps.

    Args:
      rngs: ``params``.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        stages, width = [], 3
        for channels in STAGES:
            convs = []
            for out in channels:
                convs.append(nnx.Conv(width, out, (3, 3), padding=1, rngs=rngs))
                width = out
            stages.append(nnx.List(convs))
        self.stages = nnx.List(stages)

    def features(self, x: Array) -> tuple[Array, ...]:
        """The maps relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.

        Args:
          x: ``[B, H, W, 3]`` float32, normalised as the weights want it (torchvision's: by ImageNet's mean and deviation).

        Returns:
          ``[B, H // stride, W // stride, C]`` float32, not negative, at strides 1, 2, 4, 8, 16 with C = 64, 128, 256, 512, 512.

        Raises:
          UserError: the pictures are smaller than 16 pixels.
        """
        if min(x.shape[1:3]) < LEAST_SIZE:
            raise UserError(f"VGG16 needs pictures of at least {LEAST_SIZE} pixels, but was given {x.shape[1:3]}")
        maps = []
        for stage in self.stages:
            x = max_pool(maps[-1]) if maps else x
            for conv in stage:
                x = jax.nn.relu(conv(x))
            maps.append(x)
        return tuple(maps)


def max_pool(x: Array) -> Array:
    """The maximum of each 2x2 square, ``[B, H, W, C] -> [B, H // 2, W // 2, C]``.

    Comparisons of slices, whose gradient is comparisons again; that of XLA's window reduction is a scatter, and slower on a
    CPU. Where elements are equal they share the gradient; PyTorch gives it to the first.
    """
    batch, height, width, channels = x.shape
    height, width = height // 2, width // 2
    squares = x[:, : 2 * height, : 2 * width].reshape(batch, height, 2, width, 2, channels)
    rows = jnp.maximum(squares[:, :, 0], squares[:, :, 1])  # [B, H/2, W/2, 2, C]
    return jnp.maximum(rows[..., 0, :], rows[..., 1, :])
