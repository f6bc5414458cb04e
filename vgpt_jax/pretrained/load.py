"""Networks with their weights, by name."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from vgpt_jax.errors import choose
from vgpt_jax.models.perceptual import PERCEPTUAL, FeatureDistance
from vgpt_jax.pretrained.efficientnet_lite0 import load_efficientnet_lite0
from vgpt_jax.pretrained.vgg16 import cached_file, load_lpips_heads, load_vgg16


def load_perceptual(name: str, value_range: Sequence[float], vgg_file: str = "") -> FeatureDistance:
    """A perceptual distance with its weights.

    Args:
      name: "efficientnet", which needs nothing but what is installed, or "lpips".
      value_range: the least and the greatest value of the images that it will be given.
      vgg_file: of LPIPS: torchvision's ``vgg16-397923af.pth``. "": from the cache folder, or else fetched.

    Raises:
      UserError: an unknown name, an empty range, or weights that are not there and cannot be fetched.
    """
    kind = choose("perceptual.name", name, PERCEPTUAL)
    distance = nnx.eval_shape(lambda: kind(value_range=value_range, rngs=nnx.Rngs(0)))
    if name == "lpips":
        distance.network = load_vgg16(vgg_file)
        distance.heads = nnx.List([nnx.Param(jnp.asarray(head)) for head in load_lpips_heads()])
    else:
        distance.network = load_efficientnet_lite0()
    return distance


def vgg16_is_here(vgg_file: str = "") -> bool:
    """Whether LPIPS can be loaded without fetching anything: its file is named, or in the cache folder."""
    return bool(vgg_file) or cached_file().is_file()
