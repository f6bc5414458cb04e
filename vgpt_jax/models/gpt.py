"""The generator: a decoder-only transformer over a picture's token ids, conditioned on a class.

Its blocks are chosen by plain arguments: GPT-2's (Radford et al. 2019: LayerNorm, GELU, learned positions) by default, Llama's
(arXiv 2302.13971; for pictures LlamaGen, 2406.06525: RMSNorm, SwiGLU, rotary positions over rows and columns), or a mixture.

The vocabulary is that of visual-gpt: ids ``0..K-1`` are codes, ``K..K+classes-1`` classes, then the begin token of unconditional
use, then a padding id, which stands for tokens that dropout hides.

Positions are counted in inputs: 0 is the condition, ``1 + p`` the token at place ``p`` of the grid in raster order. A model with
``random_order`` is told with each input which place it is to write next (target-aware positions, RAR, arXiv 2411.00776, section
3.2), and so can write in any order; the others write in raster order.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from vgpt_jax.errors import UserError, check_range, choose
from vgpt_jax.models.layers import DTYPES, dropout
from vgpt_jax.models.rotary import ROTATIONS, rotary_table
from vgpt_jax.models.transformer import MLPS, NORMS, Block, LayerCache, Rotation, modulation, split_key

SIZES: dict[str, dict[str, int]] = {  # parameters of the blocks: GPT-2's, or Llama's, which are alike
    "S": {"d_model": 384, "num_layers": 12, "num_heads": 6},  # 21M
    "B": {"d_model": 768, "num_layers": 12, "num_heads": 12},  # 85M; LlamaGen-B, with 16,384 codes, is 111M
    "L": {"d_model": 1024, "num_layers": 24, "num_heads": 16},  # 302M; LlamaGen-L 343M
    "XL": {"d_model": 1280, "num_layers": 36, "num_heads": 20},  # 708M; LlamaGen-XL 775M
    "XXL": {"d_model": 1536, "num_layers": 48, "num_heads": 24},  # LlamaGen-XXL 1.4B
    "3B": {"d_model": 3200, "num_layers": 24, "num_heads": 32},  # LlamaGen-3B
}

BLOCKS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layer_norm", "mlp": "gelu", "positions": "learned", "bias": True},
    "llama": {"norm": "rms_norm", "mlp": "swiglu", "positions": "rotary_2d", "bias": False},
}

POSITIONS = ("learned", *ROTATIONS)
CONDITIONINGS = ("token", "adaptive_norm", "both")


@struct.dataclass
class Cache:
    """What the positions so far leave for those to come.

    Attributes:
      layers: keys and values of each layer; those of positions that are not written yet are masked.
      modulation: of each block and of the last norm by the condition; empty tuples without adaptive norm.
    """

    layers: tuple[LayerCache, ...]
    modulation: tuple[tuple[Array, ...], ...]

    @property
    def length(self) -> int:
        """The positions it has room for."""
        return self.layers[0][1].shape[1]

    def grown(self, length: int) -> "Cache":
        """The cache with room for ``length`` positions, at least as many as it has."""
        more = (0, length - self.length)
        pad = lambda keys, values: (jnp.pad(keys, ((0, 0), (0, 0), more)), jnp.pad(values, ((0, 0), more, (0, 0))))  # noqa: E731
        return self.replace(layers=tuple(pad(*layer) for layer in self.layers))


class GPT(nnx.Module):
    """A decoder-only transformer over ``[condition, token_1, ..., token_N]``.

    Args:
      num_codes: K of the tokenizer.
      num_classes: classes of the data; 0 leaves only the unconditional mode.
      num_tokens: N, the tokens of a picture.
      grid: ``(h, w)`` of the tokens, for rotary positions over rows and columns; empty where they have another shape.
      d_model: width D. Parameters and arithmetic grow with its square.
      num_layers: blocks.
      num_heads: attention heads; must divide ``d_model``.
      num_kv_heads: heads of keys and values, a divisor of ``num_heads``; fewer make the cache smaller. 0: ``num_heads``.
      norm: "layer_norm" or "rms_norm".
      norm_epsilon: added to the variance or the mean square.
      mlp: "gelu" (the approximation by tanh of GPT-2), "gelu_exact" or "swiglu".
      mlp_width: its inner width. 0: 4 D, or for "swiglu" 8/3 D up to a multiple of 256.
      positions: "learned", or rotary: "rotary" along the sequence, "rotary_2d" over rows and columns, "rotary_llamagen" for
        LlamaGen's weights.
      rotary_base: of the rotation's wavelengths, in positions.
      num_positions: rows of the table of learned positions, at least as many as there are. 0: just as many.
      qk_norm: RMSNorm over queries and keys of each head; keeps large models stable.
      bias: of the linear maps in the blocks.
      conditioning: how the class comes in: "token", as the first input; "adaptive_norm", by scaling and shifting in every block,
        for half as many parameters again; "both".
      random_order: targets are told, and the tokens can be written in any order.
      embedding_dropout, residual_dropout, attention_dropout: rates while training; small data wants 0.1 and more.
      token_dropout: share of the input tokens that are hidden while training.
      class_dropout: share of the examples whose class is hidden while training, without which there is no guidance.
      drop_path: share of the examples for which the last block's branches are left out while training; earlier ones' less, the
        first block's never.
      tie_weights: the output projection is the token embedding, as in GPT-2; otherwise a matrix of its own.
      dtype: "float32" or "bfloat16", of the computation; parameters, normalisation and softmax are float32.
      rngs: ``params``.

    Raises:
      UserError: an unknown name, or sizes that do not fit.
    """

    def __init__(
        self,
        *,
        num_codes: int,
        num_classes: int,
        num_tokens: int,
        grid: Sequence[int] = (),
        d_model: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        num_kv_heads: int = 0,
        norm: str = "layer_norm",
        norm_epsilon: float = 1e-5,
        mlp: str = "gelu",
        mlp_width: int = 0,
        positions: str = "learned",
        rotary_base: float = 10_000.0,
        num_positions: int = 0,
        qk_norm: bool = False,
        bias: bool = True,
        conditioning: str = "token",
        random_order: bool = False,
        embedding_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        token_dropout: float = 0.0,
        class_dropout: float = 0.0,
        drop_path: float = 0.0,
        tie_weights: bool = True,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        sizes = {"num_codes": num_codes, "num_tokens": num_tokens, "d_model": d_model, "num_layers": num_layers}
        for name, size in (sizes | {"num_heads": num_heads}).items():
            check_range(f"gpt.{name}", size, least=1)
        check_range("gpt.num_classes", num_classes, least=0)
        rates = {"embedding_dropout": embedding_dropout, "residual_dropout": residual_dropout}
        rates |= {"attention_dropout": attention_dropout, "token_dropout": token_dropout, "drop_path": drop_path}
        for name, rate in rates.items():
            check_range(f"gpt.{name}", rate, least=0, most=0.99)
        check_range("gpt.class_dropout", class_dropout, least=0, most=1)
        for name, value, known in (
            ("norm", norm, NORMS),
            ("mlp", mlp, MLPS),
            ("positions", positions, POSITIONS),
            ("conditioning", conditioning, CONDITIONINGS),
        ):
            choose(f"gpt.{name}", value, dict.fromkeys(known))
        check_range("gpt.norm_epsilon", norm_epsilon, above=0)
        check_range("gpt.mlp_width", mlp_width, least=0)
        check_range("gpt.rotary_base", rotary_base, above=1)
        num_kv_heads = num_kv_heads or num_heads
        for what, whole, part in (("d_model", d_model, num_heads), ("num_heads", num_heads, num_kv_heads)):
            if part < 1 or whole % part:
                divisor = "num_heads" if what == "d_model" else "num_kv_heads"
                raise UserError(f"gpt: {what} is {whole}, which {divisor} {part} does not divide")
        inputs = num_tokens + int(random_order)  # in raster order the last token is never an input
        num_positions = num_positions or inputs
        if num_positions < inputs:
            raise UserError(f"gpt: num_positions is {num_positions}, but there are {inputs} positions")
        if grid and math.prod(grid) != num_tokens:
            raise UserError(f"gpt: a grid of {tuple(grid)} does not have {num_tokens} tokens")

        self.compute_dtype = choose("gpt.dtype", dtype, DTYPES)
        self.num_codes, self.num_classes, self.num_tokens = num_codes, num_classes, num_tokens
        self.vocab_size = num_codes + num_classes + 2
        self.begin_id, self.hidden_id = num_codes + num_classes, num_codes + num_classes + 1
        self.num_kv_heads, self.head_dim = num_kv_heads, d_model // num_heads
        self.positions, self.rotary_base, self.grid = positions, float(rotary_base), tuple(grid)
        self.class_token, self.adaptive = conditioning != "adaptive_norm", conditioning != "token"
        self.random_order = random_order
        self.embedding_dropout, self.token_dropout = embedding_dropout, token_dropout
        self.class_dropout = class_dropout
        if positions != "learned":
            self.rotary_table()  # raises what does not fit

        init = nnx.initializers.normal(0.02)
        self.token_embedding = nnx.Param(init(rngs.params(), (self.vocab_size, d_model)))
        if positions == "learned":
            self.position_embedding = nnx.Param(nnx.initializers.normal(0.01)(rngs.params(), (num_positions, d_model)))
        if random_order:
            self.target_embedding = nnx.Param(init(rngs.params(), (num_tokens, d_model)))
        self.blocks = nnx.List(
            [
                Block(
                    d_model=d_model,
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    qk_norm=qk_norm,
                    bias=bias,
                    norm=norm,
                    epsilon=norm_epsilon,
                    mlp=mlp,
                    mlp_width=mlp_width or MLPS[mlp].default_width(d_model),
                    adaptive=self.adaptive,
                    dropout_rate=attention_dropout,
                    residual_dropout=residual_dropout,
                    drop_path=drop_path * layer / max(num_layers - 1, 1),
                    residual_stddev=0.02 / (2 * num_layers) ** 0.5,
                    dtype=self.compute_dtype,
                    rngs=rngs,
                )
                for layer in range(num_layers)
            ]
        )
        self.norm = NORMS[norm](d_model, norm_epsilon, rngs)
        self.modulate = modulation(d_model, 2, rngs) if self.adaptive else None
        self.head = None if tie_weights else nnx.Param(init(rngs.params(), (self.vocab_size, d_model)))

    def condition_ids(self, labels: Array | None, batch: int) -> Array:
        """The ids ``[B]`` of the first position: the classes ``labels`` ``[B]``, or the begin token where None."""
        if labels is None:
            return jnp.full((batch,), self.begin_id, jnp.int32)
        return self.num_codes + labels.astype(jnp.int32)

    def __call__(self, ids: Array, dropout_key: Array | None = None, orders: Array | None = None) -> Array:
        """Logits for the token after each position.

        Args:
          ids: ``[B, T]`` int32: the condition's id, then token ids in the order of writing; T at most N.
          dropout_key: PRNG key that turns dropout on.
          orders: ``[B, N]`` int32, the place in the grid of each token, a permutation; for models of random order. None: raster.

        Returns:
          ``[B, T, V]`` float32; ``[:, i]`` is about the i-th token that is written.
        """
        class_key, token_key, embedding_key, *keys = split_key(dropout_key, 3 + len(self.blocks))
        if dropout_key is not None:
            ids = self._hide(ids, class_key, token_key)
        length = ids.shape[1]
        if orders is None:
            positions, targets = slice(length), slice(length)
        else:
            positions, targets = jnp.pad(orders[:, : length - 1] + 1, ((0, 0), (1, 0))), orders[:, :length]
        modulation = self.modulation(ids[:, 0])
        x = dropout(self._embed(ids, positions, targets), self.embedding_dropout, embedding_key)
        rotation = self._rotation(positions)
        for block, part, key in zip(self.blocks, modulation[:-1], keys, strict=True):
            x = block(x, part, rotation, key)
        return self.logits(x, modulation[-1])

    def init_cache(self, conditions: Array, length: int) -> Cache:
        """An empty cache with room for ``length`` positions after, and with, conditions ``[B]`` int32."""
        sequences, zeros = len(conditions) * self.num_kv_heads, lambda *shape: jnp.zeros(shape, self.compute_dtype)
        empty = lambda: (zeros(sequences, self.head_dim, length), zeros(sequences, length, self.head_dim))  # noqa: E731
        return Cache(tuple(empty() for _ in self.blocks), self.modulation(conditions))

    def extend(
        self,
        ids: Array,
        cache: Cache,
        index: Array | int,
        *,
        positions: Array | None = None,
        targets: Array | None = None,
        mask: Array | None = None,
    ) -> tuple[Array, Cache]:
        """Runs further inputs beside those in the cache.

        Args:
          ids: ``[B, T]`` int32.
          cache: of the inputs before.
          index: int32 scalar, where in the cache the first of these is written.
          positions: ``[B or 1, T]`` int32 of each input. None: ``index..index+T-1``, as in raster order.
          targets: ``[B or 1, T]`` int32, the place each input is to write; for models of random order. None: as in raster order.
          mask: ``[T, cached T]`` bool, which entries of the cache each input sees once all are written. None: itself and those
            before.

        Returns:
          ``[B, T, D]``, for `code_logits`, and the cache with these written.
        """
        place = index + jnp.arange(ids.shape[1])
        if mask is None:
            mask = jnp.arange(cache.length)[None, :] <= place[:, None]  # [T, cached T]
        positions = place[None] if positions is None else positions
        x = self._embed(ids, positions, place[None] if targets is None else targets)
        rotation = self._rotation(positions)
        written = []
        for block, part, layer in zip(self.blocks, cache.modulation[:-1], cache.layers, strict=True):
            x, layer = block.extend(x, layer, part, index, mask, rotation)
            written.append(layer)
        return x, cache.replace(layers=tuple(written))

    def code_logits(self, x: Array, cache: Cache) -> Array:
        """Logits over the codes, float32, of what `extend` gave: ``[B, T, D] -> [B, T, K]``."""
        # The other rows of the table are few: to leave them out would copy it, every step.
        return self.logits(x, cache.modulation[-1])[..., : self.num_codes]

    def logits(self, x: Array, modulation: tuple[Array, ...]) -> Array:
        """Logits over the vocabulary, float32: ``[B, T, D] -> [B, T, V]``."""
        table = (self.token_embedding if self.head is None else self.head)[...].astype(self.compute_dtype)
        x = self.norm(x)
        if modulation:
            shift, scale = modulation
            x = x * (1 + scale) + shift
        return jnp.einsum("btd,vd->btv", x.astype(self.compute_dtype), table, preferred_element_type=jnp.float32)

    def modulation(self, conditions: Array) -> tuple[tuple[Array, ...], ...]:
        """What adaptive norm makes of the conditions ``[B]``: a tuple for each block and one for the last norm."""
        if not self.adaptive:
            return ((),) * (len(self.blocks) + 1)
        vector = jax.nn.silu(self.token_embedding[...][conditions])  # [B, D]
        last = tuple(jnp.split(self.modulate(vector)[:, None], 2, axis=-1))
        return (*(block.modulation(vector) for block in self.blocks), last)

    def rotary_table(self):
        return rotary_table(self.positions, self.num_tokens, self.grid, self.head_dim, self.rotary_base)

    def _rotation(self, positions: Array | slice) -> Rotation:
        if self.positions == "learned":
            return None
        cos, sin = (jnp.asarray(table) for table in self.rotary_table())
        return (
            (cos[positions][None], sin[positions][None])
            if isinstance(positions, slice)
            else (cos[positions], sin[positions])
        )

    def _embed(self, ids: Array, positions: Array | slice, targets: Array | slice) -> Array:
        """``[B, T, D]``. Positions and targets as slices are those of raster order: a slice's gradient is no scattering."""
        if not self.class_token:
            ids = jnp.where(ids < self.num_codes, ids, jnp.where(ids == self.hidden_id, ids, self.begin_id))
        x = self.token_embedding[...][ids]
        if self.positions == "learned":
            x = x + self.position_embedding[...][positions]
        if self.random_order:
            x = x + self.target_embedding[...][targets]
        return x.astype(self.compute_dtype)

    def _hide(self, ids: Array, class_key: Array, token_key: Array) -> Array:
        """Replaces some conditions by the begin token and some tokens by the padding id."""
        if self.class_dropout:
            blank = jax.random.bernoulli(class_key, self.class_dropout, ids.shape[:1])
            ids = ids.at[:, 0].set(jnp.where(blank, self.begin_id, ids[:, 0]))
        if self.token_dropout:
            hidden = jax.random.bernoulli(token_key, self.token_dropout, ids.shape).at[:, 0].set(False)
            ids = jnp.where(hidden, self.hidden_id, ids)
        return ids
