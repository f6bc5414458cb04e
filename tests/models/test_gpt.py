"""The generator in its variants: cache, causality, orders, dropouts, adaptive norm, sizes. Its peers: `test_gpt_parity`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import BLOCKS, GPT, SIZES

TOKENS, CODES, CLASSES = 6, 12, 3
TINY = {"num_codes": CODES, "num_classes": CLASSES, "num_tokens": TOKENS, "grid": (2, 3)}
TINY |= {"d_model": 32, "num_layers": 2, "num_heads": 4}
LLAMA = BLOCKS["llama"] | {"tie_weights": False}
VARIANTS = {
    "gpt2": {},
    "gpt2_untied": {"tie_weights": False},
    "llama": LLAMA,
    "llama_tied": BLOCKS["llama"],
    "grouped_queries": LLAMA | {"num_kv_heads": 2},
    "multi_query": LLAMA | {"num_kv_heads": 1},
    "qk_norm": LLAMA | {"qk_norm": True},
    "rotary": LLAMA | {"positions": "rotary"},
    "rotary_llamagen": LLAMA | {"positions": "rotary_llamagen"},
    "adaptive_norm": {"conditioning": "adaptive_norm"},
    "both": LLAMA | {"conditioning": "both"},
    "random_order": {"random_order": True},
    "random_order_llama": LLAMA | {"random_order": True, "conditioning": "adaptive_norm", "num_kv_heads": 2},
    "bfloat16": LLAMA | {"dtype": "bfloat16", "num_kv_heads": 2},
}

logits_of = jit(lambda gpt, ids, key=None, orders=None: gpt(ids, key, orders))


def make(**changed) -> GPT:
    """A model whose parameters are all moved, so that zeros and ones hide nothing; without dropout unless told."""
    off = {"embedding_dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0}
    gpt, rng = GPT(**TINY | off | changed, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    move = lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    nnx.update(gpt, jax.tree.map(move, nnx.state(gpt, nnx.Param)))
    return gpt


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """``[3, N]``: a class, another, none; then codes, no two of a row the same."""
    rng = np.random.default_rng(1)
    codes = [rng.permutation(CODES)[: TOKENS - 1] for _ in range(3)]
    return np.concatenate([[[CODES], [CODES + 2], [CODES + CLASSES]], codes], axis=1).astype(np.int32)


@pytest.fixture(scope="module")
def orders() -> np.ndarray:
    rng = np.random.default_rng(2)
    return np.array([rng.permutation(TOKENS) for _ in range(3)], np.int32)


def test_vocabulary_is_codes_then_classes_then_begin_then_padding():
    gpt = GPT(**TINY, rngs=nnx.Rngs(0))
    assert (gpt.vocab_size, gpt.begin_id, gpt.hidden_id) == (12 + 3 + 2, 15, 16)
    np.testing.assert_array_equal(gpt.condition_ids(jnp.array([0, 2]), 2), [12, 14])
    np.testing.assert_array_equal(gpt.condition_ids(None, 2), [15, 15])


@jit
def uncached_and_cached(gpt: GPT, ids: jax.Array, orders: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Logits over the codes ``[B, N, K]``: at once; and with a growing cache, twice two inputs, then one by one."""

    def extend(cache, begin, count):
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, count, axis=1)  # noqa: E731
        places = {}
        if orders is not None:
            places = {"positions": cut(jnp.pad(orders + 1, ((0, 0), (1, 0)))), "targets": cut(orders)}
        x, cache = gpt.extend(cut(ids), cache, begin, **places)
        return cache, gpt.code_logits(x, cache)

    cache, first = extend(gpt.init_cache(ids[:, 0], 2), 0, 2)
    cache, second = extend(cache.grown(5), 2, 2)
    _, rest = jax.lax.scan(lambda cache, index: extend(cache, index, 1), cache.grown(9), jnp.arange(4, TOKENS))
    cached = jnp.concatenate([first, second, jnp.swapaxes(rest[:, :, 0], 0, 1)], axis=1)
    return gpt(ids, orders=orders)[..., : gpt.num_codes], cached


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_logits_equal_uncached(name, ids, orders):
    ids = ids.copy()
    ids[1, 2] = CODES + CLASSES + 1  # the padding id is an input as others
    gpt = make(**VARIANTS[name])
    expected, cached = uncached_and_cached(gpt, ids, orders if gpt.random_order else None)
    assert expected.dtype == cached.dtype == jnp.float32 and np.std(expected) > 0.5
    tolerance = 0.1 if name == "bfloat16" else 1e-5  # 8 bits of each activation, rounded where the other does not
    np.testing.assert_allclose(cached, expected, atol=tolerance, rtol=1e-5)


@jit
def reach(gpt: GPT, ids: jax.Array, orders: jax.Array | None) -> jax.Array:
    """How far the logits after input i depend on the embedding of input j, ``[N, N]``; ids ``[1, N]``, all different."""
    graph, table, rest = nnx.split(gpt, nnx.PathContains("token_embedding"), ...)
    weights = jax.random.normal(jax.random.key(0), (gpt.vocab_size,))
    outputs = lambda table: nnx.merge(graph, table, rest)(ids, orders=orders)[0] @ weights  # noqa: E731
    (gradients,) = jax.tree.leaves(jax.jacrev(outputs)(table))  # [N, V, D]
    return jnp.sum(jnp.abs(gradients), axis=-1)[:, ids[0]]


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "grouped_queries",
        "rotary",
        "rotary_llamagen",
        "adaptive_norm",
        "both",
        "random_order",
        "random_order_llama",
    ],
)
def test_logits_depend_on_every_input_before_and_on_none_after(name, ids, orders):
    gpt = make(**VARIANTS[name] | {"tie_weights": False})  # or the table is also the output's
    table = np.asarray(reach(gpt, ids[:1], orders[:1] if gpt.random_order else None))
    assert (table[np.tril_indices(TOKENS)] > 1e-4).all()
    np.testing.assert_array_equal(table[np.triu_indices(TOKENS, 1)], 0.0)


@pytest.fixture(scope="module")
def any_order() -> GPT:
    return make(random_order=True)


def test_raster_order_is_the_default(any_order, ids):
    raster = np.tile(np.arange(TOKENS), (3, 1))
    np.testing.assert_allclose(logits_of(any_order, ids, None, raster), logits_of(any_order, ids), atol=1e-6)


def test_in_raster_order_it_is_a_plain_model_with_the_sum_of_both_position_tables(any_order, ids):
    plain = make()
    own, target = any_order.position_embedding[...], any_order.target_embedding[...]
    assert own.shape == (TOKENS + 1, 32) and target.shape == (TOKENS, 32)
    shared = nnx.state(any_order, nnx.Param)
    del shared["target_embedding"]
    shared["position_embedding"] = nnx.Param(own[:TOKENS] + target)
    nnx.update(plain, shared)
    np.testing.assert_allclose(logits_of(plain, ids), logits_of(any_order, ids), atol=1e-5)


def test_places_that_are_written_later_are_not_told(any_order, ids, orders):
    logits = logits_of(any_order, ids, None, orders)
    for i in range(TOKENS - 1):  # the input i is told the place i of the order, and knows none after
        other = np.concatenate([orders[:, : i + 1], np.roll(orders[:, i + 1 :], 1, axis=1)], axis=1)
        changed = logits_of(any_order, ids, None, other)
        np.testing.assert_array_equal(changed[:, : i + 1], logits[:, : i + 1])
        if i < TOKENS - 2:
            assert np.abs(changed[:, i + 1] - logits[:, i + 1]).max(axis=-1).min() > 0.1


@pytest.mark.parametrize("blocks", BLOCKS)
def test_the_probabilities_of_all_pictures_add_up_to_one_in_every_order(blocks):
    gpt = make(num_codes=2, num_tokens=4, grid=(2, 2), random_order=True, **BLOCKS[blocks])
    orders = np.repeat(list(itertools.permutations(range(4))), 16, axis=0)  # [24 * 16, N]
    pictures = np.tile(list(itertools.product(range(2), repeat=4)), (24, 1))
    written = np.take_along_axis(pictures, orders, axis=1)
    inputs = np.concatenate([np.full((len(written), 1), 2), written[:, :-1]], axis=1)
    logits = np.asarray(logits_of(gpt, inputs, None, orders), np.float64)[..., :2]
    chances = np.take_along_axis(np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True), written[..., None], -1)
    chances = np.prod(chances[..., 0], axis=1).reshape(24, 16)
    np.testing.assert_allclose(chances.sum(axis=1), 1.0, atol=1e-5)
    assert (np.ptp(chances, axis=0) > 1e-3).all()  # it is told one order from another


DROPOUTS = ("embedding_dropout", "residual_dropout", "attention_dropout", "token_dropout", "class_dropout", "drop_path")


@pytest.mark.parametrize("name", DROPOUTS)
def test_every_dropout_does_something_with_a_key(name, ids):
    gpt = make(**{name: 0.5})
    first, again, *others = (logits_of(gpt, ids, jax.random.key(seed)) for seed in (0, 0, 1, 2, 3))
    np.testing.assert_array_equal(first, again)
    assert max(np.abs(first - other).max() for other in others) > 0.1


def test_dropouts_do_nothing_without_a_key_and_a_key_nothing_without_rates(ids):
    gpt, plain = make(**dict.fromkeys(DROPOUTS, 0.5)), make()
    np.testing.assert_allclose(logits_of(gpt, ids), logits_of(plain, ids), atol=1e-6)
    np.testing.assert_allclose(logits_of(plain, ids, jax.random.key(0)), logits_of(plain, ids), atol=1e-6)


def test_tokens_are_hidden_by_the_padding_id_and_classes_by_the_begin_token():
    """Before training, blocks with adaptive norm are the identity: each logit shows its own input and no other."""
    rates = {"embedding_dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0}
    rates |= {"token_dropout": 0.3, "class_dropout": 0.2}
    gpt = GPT(**TINY | rates, conditioning="both", rngs=nnx.Rngs(0))
    ids = np.tile(np.array([CODES + 1, 0, 1, 2, 3, 4], np.int32), (2000, 1))
    hidden = np.full_like(ids, gpt.hidden_id)
    hidden[:, 0] = gpt.begin_id
    seen, hidden = np.asarray(logits_of(gpt, ids)), np.asarray(logits_of(gpt, hidden))
    dropped = np.asarray(logits_of(gpt, ids, jax.random.key(0)))
    is_seen, is_hidden = (np.isclose(dropped, each, atol=1e-6).all(axis=-1) for each in (seen, hidden))
    np.testing.assert_array_equal(is_seen, ~is_hidden)
    np.testing.assert_allclose(is_hidden.mean(axis=0), [0.2] + [0.3] * 5, atol=0.045)  # 4 standard deviations


@pytest.mark.parametrize("conditioning", ["token", "adaptive_norm", "both"])
def test_with_every_class_hidden_it_is_the_unconditional_model(conditioning, ids):
    gpt = make(conditioning=conditioning, class_dropout=1.0)
    blank = ids.copy()
    blank[:, 0] = gpt.begin_id
    np.testing.assert_allclose(logits_of(gpt, ids, jax.random.key(0)), logits_of(gpt, blank), atol=1e-6)
    assert np.abs(logits_of(gpt, ids) - logits_of(gpt, blank))[:2].max() > 0.1


def test_drop_path_rises_with_the_depth():
    gpt = nnx.eval_shape(lambda: GPT(**TINY | {"num_layers": 4, "drop_path": 0.3}, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose([block.drop_path for block in gpt.blocks], [0, 0.1, 0.2, 0.3])


def test_adaptive_norm_alone_reads_no_class_token_and_starts_without_the_class(ids):
    gpt = GPT(**TINY, conditioning="adaptive_norm", rngs=nnx.Rngs(0))
    table = np.asarray(gpt.token_embedding[...])
    inputs = ids.copy()
    inputs[:, 0] = gpt.begin_id
    x = table[inputs] + np.asarray(gpt.position_embedding[...])  # all that the blocks leave, before training
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(logits_of(gpt, ids), x @ table.T, atol=1e-5)
    both = logits_of(GPT(**TINY, conditioning="both", rngs=nnx.Rngs(0)), ids)
    assert np.abs(both - x @ table.T)[:, 0].max() > 0.01


def test_modulation_of_blocks_and_of_the_last_norm_equals_numpy(ids):
    gpt = make(conditioning="adaptive_norm")
    vectors = np.asarray(gpt.token_embedding[...])[ids[:, 0]]
    vectors = vectors / (1 + np.exp(-vectors))
    *blocks, last = gpt.modulation(ids[:, 0])
    for module, parts in zip([*gpt.blocks, gpt], [*blocks, last], strict=True):
        expected = vectors @ np.asarray(module.modulate.kernel[...]) + np.asarray(module.modulate.bias[...])
        np.testing.assert_allclose(np.concatenate(parts, axis=-1)[:, 0], expected, atol=1e-5)
    shift, scale = np.asarray(last)
    x = np.random.default_rng(0).normal(size=(3, 2, 32)).astype(np.float32)
    expected = (np.asarray(gpt.norm(x)) * (1 + scale) + shift) @ np.asarray(gpt.token_embedding[...]).T
    np.testing.assert_allclose(gpt.logits(x, last), expected, atol=1e-4)  # products of 32 numbers of up to 10


def test_bfloat16_stays_near_float32(ids):
    low, high = (GPT(**TINY, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in ("bfloat16", "float32"))
    logits = logits_of(low, ids)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, logits_of(high, ids), atol=0.02)
    assert {x.dtype for x in jax.tree.leaves(low.init_cache(ids[:, 0], 4).layers)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(nnx.state(low, nnx.Param))} == {jnp.dtype("float32")}


def count(module: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize(
    ("size", "parameters"), [("S", 34.6e6), ("B", 111e6), ("L", 343e6), ("XL", 775e6), ("XXL", 1.4e9), ("3B", 3.1e9)]
)
def test_numbers_of_parameters_are_those_of_llamagen(size, parameters):
    """B to 3B: arXiv 2406.06525, table 1. S: 21.2M in the blocks, and two tables of 17,386 rows."""
    arguments = {"num_codes": 16384, "num_classes": 1000, "num_tokens": 256, "grid": (16, 16)} | SIZES[size] | LLAMA
    gpt = nnx.eval_shape(lambda: GPT(**arguments, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(count(gpt), parameters, rtol=0.02)


def test_the_default_blocks_with_gpt2s_vocabulary_have_as_many_parameters_as_gpt2():
    arguments = {"num_codes": 50255, "num_classes": 0, "num_tokens": 1024} | SIZES["B"] | BLOCKS["gpt2"]
    assert count(nnx.eval_shape(lambda: GPT(**arguments, rngs=nnx.Rngs(0)))) == 124_439_808


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"num_codes": 0}, "gpt.num_codes is 0"),
        ({"num_classes": -1}, "gpt.num_classes is -1"),
        ({"num_tokens": 0}, "gpt.num_tokens is 0"),
        ({"d_model": 0}, "gpt.d_model is 0"),
        ({"num_layers": 0}, "gpt.num_layers is 0"),
        ({"num_heads": 0}, "gpt.num_heads is 0"),
        ({"num_heads": 5}, "d_model is 32, which num_heads 5 does not divide"),
        ({"num_kv_heads": 3}, "num_heads is 4, which num_kv_heads 3 does not divide"),
        ({"num_kv_heads": -1}, "num_kv_heads -1"),
        ({"num_positions": 5}, "num_positions is 5, but there are 6"),
        ({"num_positions": 6, "random_order": True}, "num_positions is 6, but there are 7"),
        ({"grid": (2, 2)}, r"a grid of \(2, 2\) does not have 6 tokens"),
        ({"grid": (2, 5, 3)}, r"a grid of \(2, 5, 3\) does not have 6 tokens"),
        ({"norm": "batch_norm"}, "gpt.norm is 'batch_norm'"),
        ({"norm_epsilon": 0.0}, "gpt.norm_epsilon is 0"),
        ({"mlp": "relu"}, "gpt.mlp is 'relu'"),
        ({"mlp_width": -1}, "gpt.mlp_width is -1"),
        ({"positions": "none"}, "gpt.positions is 'none'"),
        ({"positions": "rotary_2d", "grid": ()}, "gpt.positions: .*two sides"),
        ({"positions": "rotary", "d_model": 36}, "gpt.positions: .*even width, not 9"),
        ({"positions": "rotary_2d", "d_model": 24}, "gpt.positions: .*multiple of 4 wide, not 6"),
        ({"rotary_base": 1.0}, "gpt.rotary_base is 1"),
        ({"conditioning": "cross"}, "gpt.conditioning is 'cross'"),
        ({"class_dropout": 1.1}, "gpt.class_dropout is 1.1"),
        ({"token_dropout": float("nan")}, "gpt.token_dropout is nan"),
        *(({name: 1.0}, f"gpt.{name} is 1") for name in DROPOUTS if name != "class_dropout"),
        *(({name: -0.1}, f"gpt.{name} is -0.1") for name in DROPOUTS),
        ({"dtype": "float8"}, "gpt.dtype is 'float8'"),
    ],
)
def test_what_does_not_fit_is_refused(changed, named):
    with pytest.raises(UserError, match=named):
        GPT(**TINY | changed, rngs=nnx.Rngs(0))
