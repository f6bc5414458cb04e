"""The generator's training: its loss, orders of writing and when they are random, and what the config makes of it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import GPT
from vgpt_jax.training import generator_stage
from vgpt_jax.training.from_config import abstract_tokenizer, gpt_arguments
from vgpt_jax.training.generator_stage import annealed, draw_orders, phases, token_losses
from vgpt_jax.training.sharding import make_mesh
from vgpt_jax.training.state import create_state

BATCH = {
    "token_ids": np.random.default_rng(0).integers(0, 6, (4, 9)).astype(np.int32),
    "label": np.array([0, 1, 1, 0], np.int32),
}


def small_gpt(**arguments) -> GPT:
    sizes = {"num_codes": 6, "num_classes": 2, "num_tokens": 9, "d_model": 8, "num_layers": 1, "num_heads": 1}
    return GPT(**sizes | arguments, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def random_gpt(random_module) -> GPT:
    return random_module(lambda: small_gpt(random_order=True, attention_dropout=0.0), 2.0)


def cross_entropies(logits, targets) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def test_the_loss_is_over_image_tokens_given_condition_and_past(random_module):
    gpt = random_module(small_gpt, 2.0)
    inputs = np.concatenate([6 + BATCH["label"][:, None], BATCH["token_ids"][:, :-1]], axis=1)
    losses = jit(token_losses)(gpt, jnp.asarray(inputs[:, 0]), BATCH["token_ids"])
    np.testing.assert_allclose(losses, cross_entropies(gpt(inputs), BATCH["token_ids"]), rtol=1e-4)


def test_in_other_orders_tokens_are_told_in_these_and_targets_with_them(random_gpt):
    orders = np.stack([np.random.default_rng(i).permutation(9) for i in range(4)])
    targets = np.stack([ids[order] for ids, order in zip(BATCH["token_ids"], orders, strict=True)])
    inputs = np.concatenate([6 + BATCH["label"][:, None], targets[:, :-1]], axis=1)
    losses = jit(lambda g, c, ids, o: token_losses(g, c, ids, orders=o))(
        random_gpt, jnp.asarray(inputs[:, 0]), BATCH["token_ids"], orders
    )
    logits = random_gpt(jnp.asarray(inputs), None, jnp.asarray(orders))
    np.testing.assert_allclose(losses, cross_entropies(logits, targets), rtol=1e-4)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
def test_a_share_of_the_orders_is_random(share):
    orders = np.asarray(jit(draw_orders, static_argnums=1)(jax.random.key(3), (400, 9), share))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(9), (400, 1)))
    random = (orders != np.arange(9)).any(axis=1)
    assert random.mean() == share if share in (0, 1) else abs(random.mean() - share) < 0.1  # 4 standard deviations
    if share:
        assert len({tuple(order) for order in orders[random]}) > 0.99 * random.sum()  # of 9! each
        assert abs(orders[random].mean(axis=0) - 4).max() < 0.8  # every place as early as any other


def test_the_random_share_falls_evenly():
    share = jit(annealed(200, 0.5, 0.75))
    steps = [0, 99, 100, 110, 125, 149, 150, 199]
    np.testing.assert_allclose([share(s) for s in steps], [1, 1, 1, 0.8, 0.5, 0.02, 0, 0], atol=1e-6)
    at_once = jit(annealed(200, 0.5, 0.5))
    np.testing.assert_allclose([at_once(s) for s in (0, 99, 100, 199)], [1, 1, 0, 0])
    throughout = jit(annealed(200, 1.0, 1.0))
    np.testing.assert_allclose([throughout(s) for s in (0, 199)], [1, 1])
    from_the_start = jit(annealed(200, 0.0, 1.0))
    np.testing.assert_allclose([from_the_start(s) for s in (0, 50, 199)], [1, 0.75, 0.005], atol=1e-6)


@pytest.mark.parametrize(
    ("random_order", "random_until", "raster_from", "first_steps"),
    [
        (False, 0.5, 0.75, [(0, False)]),
        (True, 0.5, 0.75, [(0, True), (30, False)]),
        (True, 0.5, 0.76, [(0, True), (31, False)]),
        (True, 0.0, 0.0, [(0, False)]),
        (True, 1.0, 1.0, [(0, True)]),
        (True, 0.0, 1.0, [(0, True)]),
    ],
)
def test_phases(tiny_config, random_order, random_until, raster_from, first_steps):
    tiny_config.gpt.random_order = random_order
    tiny_config.generator_training.update(random_until=random_until, raster_from=raster_from)
    found = phases(tiny_config)  # of 40 steps
    assert [(first, share is not None) for first, share in found.items()] == first_steps
    if len(found) == 2:  # what comes before the raster phase has fallen to nearly nothing
        assert 0 < found[0](first_steps[1][0] - 1) < 0.15


def test_a_step_is_random_or_in_raster_order_by_its_number(random_gpt):
    graph, state = create_state(random_gpt, optax.sgd(0.0), 0)
    step = jit(generator_stage.make_train_step(graph, optax.sgd(0.0), random_share=annealed(10, 0.5, 0.5)))
    plain = jit(generator_stage.make_train_step(graph, optax.sgd(0.0)))
    for steps_done, random in ((4, True), (5, False)):
        here = state.replace(step=jnp.int32(steps_done))
        one, two = (train_step(here, BATCH)[1] for train_step in (step, plain))
        assert np.isfinite(one["nats_per_token"]) and one["gradient_norm"] > 0 and one["skipped"] == 0
        assert (abs(one["nats_per_token"] - two["nats_per_token"]) > 1e-3) == random


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_hidden_classes_are_read_as_the_begin_token(share):
    gpt = small_gpt(class_dropout=share, tie_weights=False)  # untied, so that only the rows that are read move
    graph, state = create_state(gpt, optax.sgd(1.0), 0)
    after, _ = jit(generator_stage.make_train_step(graph, optax.sgd(1.0)))(state, BATCH)
    change = after.params["token_embedding"][...] - state.params["token_embedding"][...]
    moved = np.abs(np.asarray(change)).sum(axis=1)
    assert (moved[gpt.begin_id] > 0) == (share == 1)
    assert (moved[6:8] > 0).all() == (share == 0)


def test_only_models_of_random_order_are_measured_in_it(random_gpt, random_module):
    found = jit(generator_stage.held_out_metrics)(random_gpt, BATCH)
    assert set(found) == {"nats_per_token", "random_order_nats_per_token"}
    orders = draw_orders(jax.random.key(0), (4, 9), 1.0)
    conditions = jnp.asarray(6 + BATCH["label"])
    for name, given in (("nats_per_token", None), ("random_order_nats_per_token", orders)):
        expected = token_losses(random_gpt, conditions, jnp.asarray(BATCH["token_ids"]), orders=given).mean(axis=1)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)
    assert set(jit(generator_stage.held_out_metrics)(random_module(small_gpt, 1.0), BATCH)) == {"nats_per_token"}


def test_a_size_chooses_widths_and_depth_and_an_unknown_one_is_refused(tiny_config):
    tokenizer = abstract_tokenizer(tiny_config)
    by_hand = gpt_arguments(tiny_config, tokenizer, 9)
    assert (by_hand["d_model"], by_hand["num_layers"], by_hand["num_heads"]) == (32, 2, 2)
    assert "size" not in by_hand
    tiny_config.gpt.size = "S"
    chosen = gpt_arguments(tiny_config, tokenizer, 9)
    assert (chosen["d_model"], chosen["num_layers"], chosen["num_heads"]) == (384, 12, 6)
    rest = by_hand.keys() - {"d_model", "num_layers", "num_heads"}
    assert {name: chosen[name] for name in rest} == {name: by_hand[name] for name in rest}
    tiny_config.gpt.size = "XS"
    with pytest.raises(UserError, match="gpt.size is 'XS', but must be one of 3B, B, L, S, XL, XXL"):
        gpt_arguments(tiny_config, tokenizer, 9)


def test_the_grid_is_told_where_every_token_has_its_place_in_it(tiny_config):
    assert gpt_arguments(tiny_config, abstract_tokenizer(tiny_config), 9)["grid"] == [4, 4]
    tiny_config.tokenizer.quantizer = "grouped_quantize"
    arguments = gpt_arguments(tiny_config, abstract_tokenizer(tiny_config), 9)
    assert (arguments["grid"], arguments["num_tokens"]) == ([], 32)
    tiny_config.gpt.positions = "rotary_2d"
    with pytest.raises(UserError, match="grid"):
        generator_stage.plan(tiny_config, make_mesh(), 9, Path("nowhere"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"generator_training.random_until": -0.1}, "random_until is -0.1"),
        ({"generator_training.random_until": 0.8}, "raster_from is 0.75, but must be at least 0.8"),
        ({"generator_training.raster_from": 1.1}, "raster_from is 1.1"),
        ({"generator_training.ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"gpt.class_dropout": 1.5}, "gpt.class_dropout is 1.5"),
        ({"sampling.num": 0}, "sampling.num is 0"),
        ({"sampling.num_steps": 4}, "in the config's sampling section, num_steps is 4"),
        (
            {"sampling.guidance": 2.0, "gpt.class_dropout": 0.0},
            "in the config's sampling section, guidance is 2.0, but the generator never saw",
        ),
        ({"sampling.top_k": 33}, "in the config's sampling section, top_k is 33"),
    ],
)
def test_configs_that_are_not_sound_are_refused(tiny_config, changes, named):
    tiny_config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=named):
        generator_stage.plan(tiny_config, make_mesh(), 9, Path("nowhere"))
