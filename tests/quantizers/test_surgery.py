from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgpt_jax.quantizers.surgery import add_relative_noise, count_down, init_from_latents, replace_stale

# Compiling is nearly all of these tests' time, so the compiler is asked not to optimise.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

INIT = jit(init_from_latents)
COUNT_DOWN = jit(count_down, static_argnames="replace_freq")
REPLACE = jit(replace_stale, static_argnames=("replace_freq", "noise"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def matches(codes, latents):
    """For each code the ids of the latents that equal it."""
    return [np.flatnonzero((np.asarray(latents) == code).all(axis=1)).tolist() for code in np.asarray(codes)]


@pytest.mark.parametrize("num_latents", [8, 9, 40])
def test_codes_are_drawn_from_latents_without_replacement(num_latents):
    latents = normal(0, num_latents, 3)
    drawn = matches(INIT(jax.random.key(1), normal(2, 8, 3), latents, when=True), latents)
    assert all(len(ids) == 1 for ids in drawn)
    assert len({ids[0] for ids in drawn}) == 8


def test_the_draw_is_random_and_determined_by_the_key():
    latents, codes = normal(0, 40, 3), normal(1, 8, 3)
    first, again, other = (INIT(jax.random.key(seed), codes, latents, when=True) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("num_latents", [1, 3, 7])
def test_fewer_latents_than_codes_give_distinct_codes_near_latents(num_latents):
    latents = normal(0, num_latents, 16)
    codes = np.asarray(INIT(jax.random.key(1), normal(2, 8, 16), latents, when=True))
    assert len(np.unique(codes, axis=0)) == 8
    distances = np.linalg.norm(codes[:, None] - np.asarray(latents)[None], axis=-1)
    relative = distances.min(axis=1) / np.linalg.norm(latents, axis=-1)[distances.argmin(axis=1)]
    assert (relative < 0.03).all()
    uses = np.bincount(distances.argmin(axis=1), minlength=num_latents)
    assert uses.max() - uses.min() <= 1


def test_codes_stay_when_it_is_not_the_time():
    codes = normal(2, 8, 3)
    np.testing.assert_array_equal(INIT(jax.random.key(1), codes, normal(0, 40, 3), when=False), codes)


def test_count_down_by_hand():
    countdown = jnp.array([3, 1, 2, 5, 1], jnp.int32)
    token_ids = jnp.array([[0, 2], [2, 4]], jnp.int32)
    counted = COUNT_DOWN(countdown, token_ids, replace_freq=5, when=True)
    np.testing.assert_array_equal(counted, [5, 0, 5, 4, 5])
    assert counted.dtype == jnp.int32
    np.testing.assert_array_equal(COUNT_DOWN(countdown, token_ids, replace_freq=5, when=False), countdown)


def test_exactly_the_stale_codes_are_replaced():
    codes, latents = normal(0, 6, 4), normal(1, 50, 4)
    countdown = jnp.array([0, 2, 1, 0, 3, -1], jnp.int32)
    replaced, restarted = REPLACE(jax.random.key(2), codes, countdown, latents, replace_freq=7, noise=0.01)
    np.testing.assert_array_equal((replaced != codes).all(axis=1), [True, False, False, True, False, True])
    np.testing.assert_array_equal(replaced[jnp.array([1, 2, 4])], codes[jnp.array([1, 2, 4])])
    np.testing.assert_array_equal(restarted, [7, 2, 1, 7, 3, 7])
    assert restarted.dtype == jnp.int32


def test_nothing_stale_changes_nothing():
    codes, countdown = normal(0, 6, 4), jnp.arange(1, 7, dtype=jnp.int32)
    replaced, restarted = REPLACE(jax.random.key(2), codes, countdown, normal(1, 5, 4), replace_freq=7, noise=0.5)
    np.testing.assert_array_equal(replaced, codes)
    np.testing.assert_array_equal(restarted, countdown)


def test_new_codes_are_latents_but_for_the_noise():
    codes, countdown, latents = normal(0, 64, 16), jnp.zeros(64, jnp.int32), normal(1, 20, 16)
    exact, _ = REPLACE(jax.random.key(2), codes, countdown, latents, replace_freq=3, noise=0.0)
    drawn = matches(exact, latents)
    assert all(drawn)
    assert len({ids[0] for ids in drawn}) > 10  # not one latent for all
    noisy, _ = REPLACE(jax.random.key(2), codes, countdown, latents, replace_freq=3, noise=0.01)
    relative = np.linalg.norm(noisy - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert (relative > 0.003).all()
    assert (relative < 0.02).all()


def test_noise_has_the_stated_norm():
    vectors = jnp.array([[100.0, 0.0, 0.0, 0.0], [0.0, 1e-3, 0.0, 0.0]]).repeat(4000, axis=0)
    noise = jit(add_relative_noise)(jax.random.key(0), vectors, 0.1) - vectors
    mean_square = jnp.mean(jnp.sum(noise**2, axis=-1).reshape(2, 4000), axis=1)
    np.testing.assert_allclose(mean_square, [10.0**2, 1e-4**2], rtol=0.06)
