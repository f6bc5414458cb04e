"""The generator: a GPT-2 (Radford et al. 2019) over a picture's token ids, conditioned on a class by its first token.

The vocabulary is that of visual-gpt: ids ``0..K-1`` are codes, ``K..K+classes-1`` classes, then the begin token of
unconditional use, then a padding id that is never used.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from vgpt_jax.errors import UserError, check_range, choose
from vgpt_jax.models.layers import DTYPES, dropout

Cache = tuple[tuple[Array, Array], ...]
"""For each layer keys and values ``[B, heads, T, D/heads]``; positions that are not written yet are masked."""


def split_key(key: Array | None, count: int) -> list[Array | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))


class Attention(nnx.Module):
    """Causal multi-head self-attention, ``[B, T, D] -> [B, T, D]``, with or without a cache."""

    def __init__(self, d_model: int, num_heads: int, dropout_rate: float, num_layers: int, dtype, rngs: nnx.Rngs):
        self.qkv = linear(d_model, 3 * d_model, 0.02, dtype, rngs)
        self.out = linear(d_model, d_model, 0.02 / (2 * num_layers) ** 0.5, dtype, rngs)
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate

    def __call__(self, x: Array, key: Array | None) -> Array:
        query, keys, values = self.project(x)
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        return self.attend(query, keys, values, mask, key)

    def step(self, x: Array, position: Array, cache: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        """Positions ``position..position+T-1`` given those before them, whose keys and values the cache holds."""
        query, new_keys, new_values = self.project(x)
        start = (0, 0, position, 0)
        keys = jax.lax.dynamic_update_slice(cache[0], new_keys, start)
        values = jax.lax.dynamic_update_slice(cache[1], new_values, start)
        mask = jnp.arange(keys.shape[2])[None, :] <= position + jnp.arange(x.shape[1])[:, None]  # [T, cached T]
        return self.attend(query, keys, values, mask, None), (keys, values)

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, ``[B, heads, T, D/heads]`` each."""
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, keys, values = jnp.transpose(qkv, (2, 0, 3, 1, 4))
        return query, keys, values

    def attend(self, query: Array, keys: Array, values: Array, mask: Array, key: Array | None) -> Array:
        batch, heads, length, head_dim = query.shape
        # Batch and heads as one axis: with two, the forward pass takes more than twice as long under XLA on a CPU.
        query, keys, values = (x.reshape(batch * heads, -1, head_dim) for x in (query, keys, values))
        scores = jnp.einsum("mqd,mkd->mqk", query, keys, preferred_element_type=jnp.float32) / head_dim**0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(values.dtype)
        weights = dropout(weights, self.dropout_rate, key)
        y = jnp.einsum("mqk,mkd->mqd", weights, values).reshape(batch, heads, length, head_dim)
        return self.out(jnp.swapaxes(y, 1, 2).reshape(batch, length, heads * head_dim))


class MLP(nnx.Module):
    """``[B, T, D] -> [B, T, 4 D] -> [B, T, D]`` with GELU in the tanh approximation of GPT-2."""

    def __init__(self, d_model: int, num_layers: int, dtype, rngs: nnx.Rngs):
        self.fc = linear(d_model, 4 * d_model, 0.02, dtype, rngs)
        self.out = linear(4 * d_model, d_model, 0.02 / (2 * num_layers) ** 0.5, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        return self.out(jax.nn.gelu(self.fc(x), approximate=True))


class Block(nnx.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, d_model: int, num_heads: int, num_layers: int, resid: float, attn: float, dtype, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(d_model, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.attention = Attention(d_model, num_heads, attn, num_layers, dtype, rngs)
        self.norm2 = nnx.LayerNorm(d_model, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.mlp = MLP(d_model, num_layers, dtype, rngs)
        self.residual_dropout = resid

    def __call__(self, x: Array, key: Array | None) -> Array:
        weights_key, attention_key, mlp_key = split_key(key, 3)
        x = x + dropout(self.attention(self.norm1(x), weights_key), self.residual_dropout, attention_key)
        return x + dropout(self.mlp(self.norm2(x)), self.residual_dropout, mlp_key)

    def step(self, x: Array, position: Array, cache: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        y, cache = self.attention.step(self.norm1(x), position, cache)
        x = x + y
        return x + self.mlp(self.norm2(x)), cache


def linear(in_features: int, out_features: int, stddev: float, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(stddev)
    return nnx.Linear(in_features, out_features, kernel_init=init, dtype=dtype, rngs=rngs)


class GPT(nnx.Module):
    """A decoder-only transformer over ``[condition, token_1, ..., token_N]``.

    Args:
      num_codes: K of the tokenizer.
      num_classes: classes of the data; 0 leaves only the unconditional mode.
      num_tokens: N, the tokens of a picture.
      d_model: width D. Parameters and arithmetic grow with its square.
      num_layers: blocks.
      num_heads: attention heads; must divide ``d_model``.
      num_positions: length of the table of learned positions, at least N. 0: N.
      embedding_dropout, residual_dropout, attention_dropout: rates while training; small data wants 0.1 and more.
      tie_weights: the output projection is the token embedding, as in GPT-2; otherwise a matrix of its own.
      dtype: "float32" or "bfloat16", of the computation; parameters, normalisation and softmax are float32.
      rngs: ``params``.

    Raises:
      UserError: sizes that do not fit.
    """

    def __init__(
        self,
        *,
        num_codes: int,
        num_classes: int,
        num_tokens: int,
        d_model: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        num_positions: int = 0,
        embedding_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        tie_weights: bool = True,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        for name, size in (
            ("num_codes", num_codes),
            ("num_tokens", num_tokens),
            ("d_model", d_model),
            ("num_layers", num_layers),
            ("num_heads", num_heads),
        ):
            check_range(f"gpt.{name}", size, least=1)
        for name, rate in (
            ("embedding", embedding_dropout),
            ("residual", residual_dropout),
            ("attention", attention_dropout),
        ):
            check_range(f"gpt.{name}_dropout", rate, least=0, most=0.99)
        if d_model % num_heads:
            raise UserError(f"gpt: d_model is {d_model}, which num_heads {num_heads} does not divide")
        num_positions = num_positions or num_tokens
        if num_positions < num_tokens:
            raise UserError(f"gpt: num_positions is {num_positions}, but a picture has {num_tokens} tokens")
        self.compute_dtype = choose("gpt.dtype", dtype, DTYPES)
        self.num_codes, self.num_classes, self.num_tokens = num_codes, num_classes, num_tokens
        self.vocab_size = num_codes + num_classes + 2
        self.begin_id = num_codes + num_classes
        self.d_model, self.num_heads = d_model, num_heads
        self.embedding_dropout = embedding_dropout

        init = nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Param(init(rngs.params(), (self.vocab_size, d_model)))
        self.position_embedding = nnx.Param(nnx.initializers.normal(0.01)(rngs.params(), (num_positions, d_model)))
        self.blocks = nnx.List(
            [
                Block(d_model, num_heads, num_layers, residual_dropout, attention_dropout, self.compute_dtype, rngs)
                for _ in range(num_layers)
            ]
        )
        self.norm = nnx.LayerNorm(d_model, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.head = None if tie_weights else nnx.Param(init(rngs.params(), (self.vocab_size, d_model)))

    def condition_ids(self, labels: Array | None, batch: int) -> Array:
        """The ids ``[B]`` of the first position: the classes ``labels`` ``[B]``, or the begin token where None."""
        if labels is None:
            return jnp.full((batch,), self.begin_id, jnp.int32)
        return self.num_codes + labels.astype(jnp.int32)

    def __call__(self, ids: Array, dropout_key: Array | None = None) -> Array:
        """Logits for the token after each position.

        Args:
          ids: ``[B, T]`` int32: the condition's id, then token ids; T at most N.
          dropout_key: PRNG key that turns dropout on.

        Returns:
          ``[B, T, V]`` float32.
        """
        embedding_key, *keys = split_key(dropout_key, 1 + len(self.blocks))
        x = dropout(self.embed(ids, 0), self.embedding_dropout, embedding_key)
        for block, key in zip(self.blocks, keys, strict=True):
            x = block(x, key)
        return self.logits(x, self.vocab_size)

    def init_cache(self, batch: int) -> Cache:
        """An empty cache for N positions."""
        shape = (batch, self.num_heads, self.num_tokens, self.d_model // self.num_heads)
        return tuple((jnp.zeros(shape, self.compute_dtype), jnp.zeros(shape, self.compute_dtype)) for _ in self.blocks)

    def step(self, ids: Array, position: Array, cache: Cache) -> tuple[Array, Cache]:
        """Logits ``[B, K]`` float32 over the codes for the token after the last of ``ids``.

        Args:
          ids: ``[B, T]`` int32, for positions ``position..position+T-1``: one token, or a prefix to start from.
          position: int32 scalar.
          cache: of the positions before.

        Returns:
          Logits, and the cache with these positions written.
        """
        x = self.embed(ids, position)
        written = []
        for block, layer in zip(self.blocks, cache, strict=True):
            x, layer = block.step(x, position, layer)
            written.append(layer)
        return self.logits(x[:, -1], self.num_codes), tuple(written)

    def embed(self, ids: Array, position: Array | int) -> Array:
        positions = jax.lax.dynamic_slice_in_dim(self.position_embedding[...], position, ids.shape[1])
        return (self.token_embedding[...][ids] + positions).astype(self.compute_dtype)  # [B, T, D]

    def logits(self, x: Array, size: int) -> Array:
        """Logits over the first ``size`` ids of the vocabulary, float32: ``[..., D] -> [..., size]``."""
        table = (self.token_embedding if self.head is None else self.head)[...][:size].astype(self.compute_dtype)
        x = self.norm(x).astype(self.compute_dtype)
        return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
