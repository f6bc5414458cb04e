"""Schedules by hand, weight decay where it belongs, clipping."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vgpt_jax.errors import UserError
from vgpt_jax.training.optimizer import make_optimizer, make_schedule


def test_cosine_schedule_by_hand():
    rate = make_schedule(learning_rate=2.0, schedule="cosine", warmup_steps=10, num_steps=110)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0.0, 1.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rate(60), 0.02 + (2.0 - 0.02) / 2, rtol=1e-5)
    np.testing.assert_allclose(rate(110), 0.02, rtol=1e-5)


def test_constant_schedule_by_hand():
    rate = make_schedule(learning_rate=2.0, schedule="constant", warmup_steps=4, num_steps=100)
    np.testing.assert_allclose([rate(0), rate(1), rate(4), rate(99)], [0.0, 0.5, 2.0, 2.0])
    assert make_schedule(learning_rate=2.0, schedule="constant", warmup_steps=0, num_steps=100)(0) == 2.0


def test_without_warm_up_the_first_step_of_a_cosine_is_the_greatest():
    assert make_schedule(learning_rate=2.0, schedule="cosine", warmup_steps=0, num_steps=10)(0) == 2.0


def test_weight_decay_leaves_vectors_alone():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = make_optimizer(learning_rate=0.1, num_steps=10, weight_decay=0.5)
    gradients = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)


def test_clipping_is_by_global_norm():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    optimizer = make_optimizer(learning_rate=1.0, num_steps=10, grad_clip=1.0)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    first_moment = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose([first_moment["a"][0], first_moment["b"][0]], [0.1 * 0.6, 0.1 * 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"schedule": "linear"}, "schedule"),
        ({"warmup_steps": 11}, "warmup_steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(UserError, match=named):
        make_optimizer(**({"learning_rate": 1.0, "num_steps": 10} | options))
