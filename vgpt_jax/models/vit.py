"""The vision transformer as a classifier (Dosovitskiy et al. 2020, arXiv 2010.11929), as Hugging Face publishes it.

Where weights and names come from, and what is done to a picture before, is no concern of this file (`models.preprocessed`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range, choose
from vgpt_jax.models.transformer import layer_norm, linear

ACTIVATIONS = {  # by the names that Hugging Face gives them
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class ViTAttention(nnx.Module):
    """Multi-head self-attention in which every position sees all, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, d_model: int, num_heads: int, qkv_bias: bool, rngs: nnx.Rngs):
        self.query = linear(d_model, d_model, 0.02, qkv_bias, jnp.float32, rngs)
        self.key = linear(d_model, d_model, 0.02, qkv_bias, jnp.float32, rngs)
        self.value = linear(d_model, d_model, 0.02, qkv_bias, jnp.float32, rngs)
        self.out = linear(d_model, d_model, 0.02, True, jnp.float32, rngs)
        self.num_heads = num_heads

    def __call__(self, x: Array) -> Array:
        batch, length, width = x.shape
        query, key, value = (
            m(x).reshape(batch, length, self.num_heads, -1) for m in (self.query, self.key, self.value)
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (width // self.num_heads) ** -0.5
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)
        return self.out(y.reshape(batch, length, width))


class ViTBlock(nnx.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        mlp_width: int,
        norm_epsilon: float,
        qkv_bias: bool,
        activation: str,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(d_model, norm_epsilon, rngs)
        self.attention = ViTAttention(d_model, num_heads, qkv_bias, rngs)
        self.norm2 = layer_norm(d_model, norm_epsilon, rngs)
        self.fc = linear(d_model, mlp_width, 0.02, True, jnp.float32, rngs)
        self.out = linear(mlp_width, d_model, 0.02, True, jnp.float32, rngs)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.norm1(x))
        return x + self.out(self.activation(self.fc(self.norm2(x))))


class ViT(nnx.Module):
    """Pictures to logits, in float32, for inference: there is no dropout.

    Args:
      image_size: H and W in pixels.
      patch_size: side of the squares that become positions; divides ``image_size``. Half of it, four times the positions.
      d_model: width D.
      num_layers: blocks.
      num_heads: divides ``d_model``.
      mlp_width: inner width of the MLPs.
      num_classes: logits.
      norm_epsilon: of the LayerNorms.
      qkv_bias: whether queries, keys and values have biases.
      activation: of the MLPs, a name in ``ACTIVATIONS``; "gelu" is the exact one.
      rngs: ``params``.

    Raises:
      UserError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        d_model: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_width: int = 3072,
        num_classes: int = 1000,
        norm_epsilon: float = 1e-12,
        qkv_bias: bool = True,
        activation: str = "gelu",
        rngs: nnx.Rngs,
    ):
        sizes = {"image_size": image_size, "patch_size": patch_size, "d_model": d_model, "num_heads": num_heads}
        for name, size in (sizes | {"mlp_width": mlp_width, "num_classes": num_classes}).items():
            check_range(f"vit.{name}", size, least=1)
        check_range("vit.num_layers", num_layers, least=0)
        check_range("vit.norm_epsilon", norm_epsilon, least=0)
        choose("vit.activation", activation, ACTIVATIONS)
        for whole, part in (("image_size", "patch_size"), ("d_model", "num_heads")):
            if sizes[whole] % sizes[part]:
                raise UserError(f"vit.{whole} is {sizes[whole]}, but must be a multiple of {part} = {sizes[part]}")
        self.image_size = image_size
        patch = (patch_size, patch_size)
        self.patches = nnx.Conv(3, d_model, patch, strides=patch, padding="VALID", rngs=rngs)
        num_positions = (image_size // patch_size) ** 2 + 1
        self.cls = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d_model,)))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (num_positions, d_model)))
        block = (d_model, num_heads, mlp_width, norm_epsilon, qkv_bias, activation, rngs)
        self.blocks = nnx.List([ViTBlock(*block) for _ in range(num_layers)])
        self.norm = layer_norm(d_model, norm_epsilon, rngs)
        self.classifier = linear(d_model, num_classes, 0.02, True, jnp.float32, rngs)

    def __call__(self, x: Array) -> Array:
        """``[B, H, W, 3]`` float32, normalised as the weights want it, to logits ``[B, classes]`` float32.

        Raises:
          UserError: the pictures are of another size.
        """
        if x.shape[1:] != (self.image_size, self.image_size, 3):
            raise UserError(
                f"the ViT takes pictures of {self.image_size} px with 3 channels, but was given {x.shape[1:]}"
            )
        tokens = self.patches(x).reshape(len(x), -1, self.cls.shape[0])  # [B, N, D]
        cls = jnp.broadcast_to(self.cls[...], (len(x), 1, self.cls.shape[0]))
        x = jnp.concatenate([cls, tokens], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x)[:, 0])
