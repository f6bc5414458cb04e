"""The classifier that reranks samples: a small residual convolutional network."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range
from vgpt_jax.models.layers import block_output, dropout, lecun_normal
from vgpt_jax.models.vqgan import conv3x3, group_norm


class ConvClassifier(nnx.Module):
    """Residual convolutions over halving resolutions, mean and maximum over positions, a linear layer.

    Args:
      num_classes: classes of the data.
      value_range: the least and the greatest value of the images it is given; it converts to -1..1 itself.
      widths: channels of each level; every level halves the resolution.
      dropout: rate before the linear layer, while training.
      rngs: ``params``.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        value_range: Sequence[float] = (0.0, 1.0),
        widths: Sequence[int] = (32, 64, 128, 256),
        dropout: float = 0.3,
        rngs: nnx.Rngs,
    ):
        if not widths:
            raise UserError("classifier.widths is empty: give the channels of at least one level")
        for width in widths:
            check_range("an entry of classifier.widths", width, least=1)
        check_range("num_classes", num_classes, least=1)
        check_range("classifier.dropout", dropout, least=0, most=0.99)
        check_range("the greatest value of value_range", value_range[1], above=value_range[0])
        self.value_range = tuple(float(v) for v in value_range)
        self.dropout = dropout
        pairs = list(zip([3, *widths[:-1]], widths, strict=True))
        options = {"strides": 2, "padding": 1, "kernel_init": lecun_normal}
        self.strided = nnx.List([nnx.Conv(i, o, (4, 4), **options, rngs=rngs) for i, o in pairs])
        self.norms = nnx.List([group_norm(o, rngs) for _, o in pairs])
        self.convs = nnx.List([conv3x3(o, o, jnp.float32, rngs) for _, o in pairs])
        self.head = nnx.Linear(2 * widths[-1], num_classes, rngs=rngs)

    def __call__(self, images: Array, dropout_key: Array | None = None) -> Array:
        """Images ``[B, H, W, 3]`` in ``value_range`` to logits ``[B, classes]`` float32.

        Raises:
          UserError: the images are too small to be halved at every level.
        """
        if min(images.shape[1:3]) < 2 ** len(self.convs):
            raise UserError(
                f"classifier.widths has {len(self.convs)} levels, too many for images of {images.shape[1:3]} pixels"
            )
        low, high = self.value_range
        x = (images - low) * (2.0 / (high - low)) - 1.0
        for strided, norm, conv in zip(self.strided, self.norms, self.convs, strict=True):
            x = strided(x)
            x = block_output(x + conv(jax.nn.swish(norm(x))))
        x = jax.nn.swish(x)
        x = jnp.concatenate([jnp.mean(x, axis=(1, 2)), jnp.max(x, axis=(1, 2))], axis=-1)  # [B, 2 C]
        return self.head(dropout(x, self.dropout, dropout_key))
