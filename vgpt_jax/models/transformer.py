"""The blocks of a decoder-only transformer: attention with rotary positions, grouped queries and a cache; two MLPs; the residual
block around them, with or without adaptive norm. `models.gpt` puts them together."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.models.layers import block_output, dropout
from vgpt_jax.models.rotary import rotate

Rotation = tuple[Array, Array] | None
"""Cosines and sines ``[B or 1, T, D/heads/2]`` of the positions at hand (`models.rotary`), or None."""

LayerCache = tuple[Array, Array]
"""Keys ``[B * kv heads, D/heads, T]`` and values ``[B * kv heads, T, D/heads]`` of one layer. So laid out, a step of one token
is products and sums along the last axis of both, which XLA reads once; in any other layout it copies them, every step."""


def split_key(key: Array | None, count: int) -> list[Array | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))


def linear(in_features: int, out_features: int, stddev: float, bias: bool, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(stddev)
    return nnx.Linear(in_features, out_features, use_bias=bias, kernel_init=init, dtype=dtype, rngs=rngs)


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


def rms_norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


NORMS = {"layer_norm": layer_norm, "rms_norm": rms_norm}


class Attention(nnx.Module):
    """Multi-head self-attention, ``[B, T, D] -> [B, T, D]``, with or without a cache.

    Args:
      d_model: width D.
      num_heads: heads of the queries.
      num_kv_heads: heads of keys and values, each shared by ``num_heads / num_kv_heads`` queries (arXiv 2305.13245).
      qk_norm: RMSNorm over each head of queries and keys before they are rotated (arXiv 2010.04245).
      bias: of the linear maps.
      dropout_rate: of the attention weights.
      residual_stddev: of the output projection's initial weights.
      epsilon: of the norms.
      dtype: of the computation.
      rngs: ``params``.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        qk_norm: bool,
        bias: bool,
        dropout_rate: float,
        residual_stddev: float,
        epsilon: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, d_model // num_heads
        self.qkv = linear(d_model, (num_heads + 2 * num_kv_heads) * self.head_dim, 0.02, bias, dtype, rngs)
        self.out = linear(d_model, d_model, residual_stddev, bias, dtype, rngs)
        self.query_norm = rms_norm(self.head_dim, epsilon, rngs) if qk_norm else None
        self.key_norm = rms_norm(self.head_dim, epsilon, rngs) if qk_norm else None
        self.dropout_rate = dropout_rate

    def __call__(self, x: Array, rotation: Rotation, key: Array | None) -> Array:
        """Every position sees itself and those before it."""
        query, keys, values = self.project(x, rotation)
        scores = jnp.einsum("mqd,mkd->mqk", query, keys, preferred_element_type=jnp.float32)
        weights = self.weigh(scores, jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))).astype(values.dtype)
        weights = dropout(weights, self.dropout_rate, key)
        return self.merge(jnp.einsum("mqk,mkd->mqd", weights, values), x)

    def extend(
        self, x: Array, cache: LayerCache, index: Array, mask: Array, rotation: Rotation
    ) -> tuple[Array, LayerCache]:
        """The positions of ``x`` beside those in the cache, where they are written from ``index`` on.

        Args:
          x: ``[B, T, D]``.
          cache: of the layer.
          index: int32 scalar.
          mask: ``[T, cached T]``, which of the cache each position sees, after it is written.
          rotation: of the positions of ``x``.
        """
        query, new_keys, new_values = self.project(x, rotation)
        keys = jax.lax.dynamic_update_slice(cache[0], jnp.swapaxes(new_keys, 1, 2), (0, 0, index))
        values = jax.lax.dynamic_update_slice(cache[1], new_values, (0, index, 0))
        if x.shape[1] == 1:
            query = query.astype(jnp.float32)  # or scores, and the softmax of them, would have the dtype of the keys
            scores = jnp.stack([jnp.sum(q[:, :, None] * keys, axis=1) for q in jnp.unstack(query, axis=1)], axis=1)
            weights = self.weigh(scores, mask)
            y = jnp.stack([jnp.sum(w[:, :, None] * values, axis=1) for w in jnp.unstack(weights, axis=1)], axis=1)
        else:
            scores = jnp.einsum("mqd,mdk->mqk", query, keys, preferred_element_type=jnp.float32)
            y = jnp.einsum("mqk,mkd->mqd", self.weigh(scores, mask).astype(values.dtype), values)
        return self.merge(y, x), (keys, values)

    def project(self, x: Array, rotation: Rotation) -> tuple[Array, Array, Array]:
        """Queries ``[B * kv heads, shared * T, D/heads]``, scaled by ``(D/heads) ** -0.5``, those that share keys one after the
        other; keys and values ``[B * kv heads, T, D/heads]``.

        Batch and heads are one axis: with two, attention takes more than twice as long under XLA on a CPU.
        """
        batch, length, _ = x.shape
        heads = self.qkv(x).reshape(batch, length, -1, self.head_dim)
        query, keys, values = jnp.split(
            jnp.swapaxes(heads, 1, 2), (self.num_heads, self.num_heads + self.num_kv_heads), axis=1
        )
        if self.query_norm is not None:
            query, keys = self.query_norm(query).astype(values.dtype), self.key_norm(keys).astype(values.dtype)
        query, keys = rotate(query, rotation) * self.head_dim**-0.5, rotate(keys, rotation)
        shared = self.num_heads // self.num_kv_heads
        query = query.reshape(-1, shared * length, self.head_dim)
        return query, *(x.reshape(-1, length, self.head_dim) for x in (keys, values))

    def weigh(self, scores: Array, mask: Array) -> Array:
        """Attention weights of scores ``[B * kv heads, shared * T, keys]``, float32; ``mask`` ``[T, keys]`` says what is seen."""
        mask = jnp.tile(mask, (self.num_heads // self.num_kv_heads, 1))
        return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)

    def merge(self, y: Array, x: Array) -> Array:
        """What the heads found, ``[B * kv heads, shared * T, D/heads]``, for the inputs ``x`` ``[B, T, D]``: ``[B, T, D]``."""
        batch, length, width = x.shape
        y = y.reshape(batch, self.num_heads, length, self.head_dim)
        return self.out(jnp.swapaxes(y, 1, 2).reshape(batch, length, width))


class GELU(nnx.Module):
    """``[B, T, D] -> [B, T, width] -> [B, T, D]`` with GELU in the tanh approximation of GPT-2."""

    def __init__(self, d_model: int, width: int, residual_stddev: float, bias: bool, dtype, rngs: nnx.Rngs):
        self.fc = linear(d_model, width, 0.02, bias, dtype, rngs)
        self.out = linear(width, d_model, residual_stddev, bias, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        return self.out(jax.nn.gelu(self.fc(x), approximate=True))

    @staticmethod
    def default_width(d_model: int) -> int:
        return 4 * d_model


class ExactGELU(GELU):
    """`GELU` with the function itself, ``x * (1 + erf(x / sqrt(2))) / 2``, as in minGPT and taming-transformers."""

    def __call__(self, x: Array) -> Array:
        return self.out(jax.nn.gelu(self.fc(x), approximate=False))


class SwiGLU(nnx.Module):
    """``out(silu(gate(x)) * up(x))`` (arXiv 2002.05202), the gate and the value as one matrix."""

    def __init__(self, d_model: int, width: int, residual_stddev: float, bias: bool, dtype, rngs: nnx.Rngs):
        self.gate_and_up = linear(d_model, 2 * width, 0.02, bias, dtype, rngs)
        self.out = linear(width, d_model, residual_stddev, bias, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        gate, up = jnp.split(self.gate_and_up(x), 2, axis=-1)
        return self.out(jax.nn.silu(gate) * up)

    @staticmethod
    def default_width(d_model: int) -> int:
        """Two thirds of GELU's, for as many parameters, up to a multiple of 256, as in Llama."""
        return -(-8 * d_model // (3 * 256)) * 256


MLPS = {"gelu": GELU, "gelu_exact": ExactGELU, "swiglu": SwiGLU}


class Block(nnx.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
      norm: a name in ``NORMS``.
      mlp: a name in ``MLPS``.
      mlp_width: inner width of the MLP.
      adaptive: the class shifts and scales what the norms give and scales the residuals, from zero on (DiT's adaLN-Zero,
        arXiv 2212.09748, section 3.2). The modulation is given at the call.
      residual_dropout: of what is added to the residual stream.
      drop_path: share of the examples for which a residual branch is left out while training (arXiv 1603.09382).
      **attention: arguments of `Attention`.
    """

    def __init__(
        self,
        *,
        norm: str,
        mlp: str,
        mlp_width: int,
        adaptive: bool,
        residual_dropout: float,
        drop_path: float,
        rngs: nnx.Rngs,
        **attention,
    ):
        d_model, epsilon, dtype = attention["d_model"], attention["epsilon"], attention["dtype"]
        self.norm1 = NORMS[norm](d_model, epsilon, rngs)
        self.attention = Attention(**attention, rngs=rngs)
        self.norm2 = NORMS[norm](d_model, epsilon, rngs)
        self.mlp = MLPS[mlp](d_model, mlp_width, attention["residual_stddev"], attention["bias"], dtype, rngs)
        self.modulate = modulation(d_model, 6, rngs) if adaptive else None
        self.residual_dropout, self.drop_path = residual_dropout, drop_path

    def modulation(self, condition: Array) -> tuple[Array, ...]:
        """Shift, scale and gate of both branches for a class's vector ``[B, D]``: six of ``[B, 1, D]``, or none."""
        return () if self.modulate is None else tuple(jnp.split(self.modulate(condition)[:, None], 6, axis=-1))

    def __call__(self, x: Array, modulation: Sequence[Array], rotation: Rotation, key: Array | None) -> Array:
        """``[B, T, D] -> [B, T, D]``; ``key`` turns dropout on."""
        weights_key, attention_key, mlp_key = split_key(key, 3)
        attend = lambda y: self.attention(y, rotation, weights_key)  # noqa: E731
        x = self._add(x, self.norm1, attend, modulation[:3], attention_key)
        return block_output(self._add(x, self.norm2, self.mlp, modulation[3:], mlp_key))

    def extend(
        self, x: Array, cache: LayerCache, modulation: Sequence[Array], index: Array, mask: Array, rotation: Rotation
    ) -> tuple[Array, LayerCache]:
        """As `Attention.extend`."""
        written = cache

        def attend(y):
            nonlocal written
            y, written = self.attention.extend(y, cache, index, mask, rotation)
            return y

        x = self._add(x, self.norm1, attend, modulation[:3], None)
        return self._add(x, self.norm2, self.mlp, modulation[3:], None), written

    def _add(self, x: Array, norm: nnx.Module, branch, modulation: Sequence[Array], key: Array | None) -> Array:
        """``x + gate * branch(norm(x) * (1 + scale) + shift)``."""
        path_key, dropout_key = split_key(key, 2)
        y = norm(x)
        if modulation:
            shift, scale, gate = modulation
            y = branch(y * (1 + scale) + shift)
            y = y * gate.astype(y.dtype)
        else:
            y = branch(y)
        y = dropout(y, self.residual_dropout, dropout_key)
        if path_key is not None and self.drop_path:
            kept = jax.random.bernoulli(path_key, 1 - self.drop_path, (len(x), 1, 1))
            y = jnp.where(kept, y / (1 - self.drop_path), 0).astype(y.dtype)
        return x + y


def modulation(d_model: int, parts: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A map from SiLU of a class's vector to ``parts`` vectors, all zero at first; float32."""
    zeros = nnx.initializers.zeros_init()
    return nnx.Linear(d_model, parts * d_model, kernel_init=zeros, dtype=jnp.float32, rngs=rngs)
