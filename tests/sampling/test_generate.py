"""The scanned, cached generation against one token at a time without a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.models.gpt import BLOCKS, GPT
from vgpt_jax.sampling.generate import Given, Options, generate
from vgpt_jax.sampling.logits import draw

TOKENS, CODES = 6, 12
SIZES = {"num_codes": CODES, "num_classes": 2, "num_tokens": TOKENS, "grid": (2, 3)}
SIZES |= {"d_model": 16, "num_layers": 1, "num_heads": 2}
SCHEDULE = np.linspace(0.5, 3, TOKENS, dtype=np.float32)


def make(**blocks) -> GPT:
    """A model far from uniform and far from its start, so that a wrong position, mask or class shows."""
    gpt, rng = GPT(**SIZES, **blocks, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    move = lambda x: x + 0.4 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    nnx.update(gpt, jax.tree.map(move, nnx.state(gpt, nnx.Param)))
    return gpt


@pytest.fixture(scope="module")
def raster() -> GPT:
    return make(conditioning="both")


@pytest.fixture(scope="module")
def any_order() -> GPT:
    return make(random_order=True, **BLOCKS["llama"])


@pytest.fixture(scope="module")
def conditions(raster) -> jax.Array:
    return raster.condition_ids(jnp.array([0, 1, 1]), 3)


@pytest.fixture(scope="module")
def uniforms() -> np.ndarray:
    return np.random.default_rng(1).random((3, TOKENS), np.float32)


@pytest.fixture(scope="module")
def orders() -> np.ndarray:
    rng = np.random.default_rng(2)
    return np.array([rng.permutation(TOKENS) for _ in range(3)], np.int32)


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch):
    monkeypatch.setattr("vgpt_jax.sampling.generate.SEGMENT", 3)


@nnx.jit
def scanned(gpt, conditions, uniforms, options, orders=None, given=None):
    return generate(gpt, conditions, uniforms, options, orders=orders, given=given)


logits_of = nnx.jit(lambda gpt, ids, orders: gpt(ids, orders=orders)[..., : gpt.num_codes])
draw_jitted = jax.jit(draw, static_argnames="top_k")


def one_by_one(gpt, conditions, uniforms, options, orders=None, given=None) -> np.ndarray:
    """What `generate` is to give: without a cache, and with all in the order of writing. Inputs to come are codes 0."""
    rows, order = np.arange(3), np.tile(np.arange(TOKENS), (3, 1)) if orders is None else orders
    ids = np.concatenate([np.asarray(conditions)[:, None], np.zeros((3, TOKENS), np.int32)], axis=1)
    for i in range(TOKENS):
        logits = np.asarray(logits_of(gpt, ids[:, :-1], orders)[:, i])
        if options.guidance is not None:
            blank = np.concatenate([np.full((3, 1), gpt.begin_id, np.int32), ids[:, 1:-1]], axis=1)
            unconditional = np.asarray(logits_of(gpt, blank, orders)[:, i])
            scale = np.broadcast_to(options.guidance, TOKENS)[i]
            logits = unconditional + scale * (logits - unconditional)
        filters = {"temperature": options.temperature, "top_p": options.top_p, "min_p": options.min_p}
        places = order[:, i]
        token = np.asarray(draw_jitted(logits, uniforms[rows, places], top_k=options.top_k, **filters))
        if given is not None:
            token = np.where(given.kept[rows, places], given.token_ids[rows, places], token)
        ids[:, i + 1] = token
    return np.take_along_axis(ids[:, 1:], np.argsort(order, axis=1), axis=1)


@pytest.mark.parametrize(
    "options", [Options(), Options(top_k=1), Options(temperature=1.5, top_p=0.8), Options(guidance=SCHEDULE, top_k=6)]
)
def test_generation_equals_a_loop_without_cache(raster, conditions, uniforms, options):
    written = scanned(raster, conditions, uniforms, options)
    np.testing.assert_array_equal(written, one_by_one(raster, conditions, uniforms, options))
    assert written.dtype == jnp.int32 and len(np.unique(written)) > 1


def test_generation_in_other_orders_equals_a_loop_without_cache(any_order, conditions, uniforms, orders):
    options = Options(guidance=SCHEDULE, top_k=6)
    written = scanned(any_order, conditions, uniforms, options, orders)
    np.testing.assert_array_equal(written, one_by_one(any_order, conditions, uniforms, options, orders))


def test_in_raster_order_orders_change_nothing(any_order, conditions, uniforms):
    in_turn = np.tile(np.arange(TOKENS, dtype=np.int32), (3, 1))
    written = scanned(any_order, conditions, uniforms, Options(), in_turn)
    np.testing.assert_array_equal(written, scanned(any_order, conditions, uniforms, Options()))


def keep(places: list[int], num_first: int = 0, orders: np.ndarray | None = None) -> Given:
    """Tokens at some places in the order of writing; what stands at the others, no code, would show if it were used."""
    token_ids = np.random.default_rng(3).integers(0, CODES, (3, TOKENS)).astype(np.int32)
    order = np.tile(np.arange(TOKENS), (3, 1)) if orders is None else orders
    kept = np.zeros((3, TOKENS), bool)
    np.put_along_axis(kept, order[:, places], True, axis=1)
    return Given(np.where(kept, token_ids, CODES + 1), kept, num_first)


@pytest.mark.parametrize(
    ("places", "num_first"),
    [
        ([0], 1),
        ([0, 1, 3, 5], 2),  # with the condition, as many first ones as a segment holds
        ([0, 1, 2, 3, 4], 5),
        ([1, 2, 4], 0),
    ],
)
def test_given_tokens_stay_and_the_others_see_them(raster, conditions, uniforms, places, num_first):
    given, options = keep(places, num_first), Options(guidance=2.0 if num_first == 2 else None)
    written = scanned(raster, conditions, uniforms, options, None, given)
    np.testing.assert_array_equal(written[:, places], given.token_ids[:, places])
    np.testing.assert_array_equal(written, one_by_one(raster, conditions, uniforms, options, given=given))
    if num_first < 5:
        assert not np.array_equal(written, scanned(raster, conditions, uniforms, options))


@pytest.mark.parametrize(("places", "num_first"), [([0, 1, 2], 3), ([1, 2, 4], 0)])
def test_given_tokens_in_other_orders(any_order, conditions, uniforms, orders, places, num_first):
    given, options = keep(places, num_first, orders), Options(guidance=SCHEDULE)
    written = scanned(any_order, conditions, uniforms, options, orders, given)
    np.testing.assert_array_equal(np.asarray(written)[given.kept], given.token_ids[given.kept])
    np.testing.assert_array_equal(written, one_by_one(any_order, conditions, uniforms, options, orders, given))


def test_where_everything_is_given_nothing_is_drawn(raster, conditions, uniforms):
    given = keep(list(range(TOKENS)), TOKENS)
    np.testing.assert_array_equal(scanned(raster, conditions, uniforms, Options(), None, given), given.token_ids)


@pytest.mark.parametrize("segment", [4, 64])
def test_segments_of_any_length_write_the_same(raster, conditions, uniforms, segment, monkeypatch):
    expected = scanned(raster, conditions, uniforms, Options())
    monkeypatch.setattr("vgpt_jax.sampling.generate.SEGMENT", segment)
    again = nnx.jit(lambda gpt, conditions, uniforms: generate(gpt, conditions, uniforms, Options()))
    np.testing.assert_array_equal(again(raster, conditions, uniforms), expected)


def test_guidance_of_1_is_none_and_of_0_the_unconditional_model(raster, conditions, uniforms):
    plain = scanned(raster, conditions, uniforms, Options())
    np.testing.assert_array_equal(scanned(raster, conditions, uniforms, Options(guidance=1.0)), plain)
    unconditional = scanned(raster, raster.condition_ids(None, 3), uniforms, Options())
    np.testing.assert_array_equal(scanned(raster, conditions, uniforms, Options(guidance=0.0)), unconditional)
    assert not np.array_equal(plain, unconditional)


def test_one_program_for_each_batch_and_top_k_whatever_the_traced_options(raster, conditions, uniforms):
    graph, state = nnx.split(raster)
    traces = []

    @jax.jit
    def run(state, conditions, uniforms, options):
        traces.append(options.top_k)
        return generate(nnx.merge(graph, state), conditions, uniforms, options)

    one = Options(temperature=0.8, top_p=0.9, min_p=0.1, guidance=1.5, top_k=4)
    other = Options(temperature=1.7, top_p=0.5, min_p=0.02, guidance=3.0, top_k=4)
    for options in (one, other):
        written = run(state, conditions, uniforms, options)
        np.testing.assert_array_equal(written, one_by_one(raster, conditions, uniforms, options))
    assert traces == [4]
    run.lower(state, conditions, uniforms, other.replace(top_k=5))
    assert traces == [4, 5]
