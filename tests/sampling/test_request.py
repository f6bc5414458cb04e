"""What may be asked of the sampler, the batches that a request becomes, and the randomness of each picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgpt_jax.errors import UserError
from vgpt_jax.sampling.request import BATCHES, MAX_BATCH, Drawing, bucket, picture_keys, uniforms_of


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 5, 10, 11, 17, 33, 64, 65, 1000)] == [1, 2, 4, 10, 10, 16, 32, 64, 64, 64, 64]
    assert [bucket(n, 8) for n in (1, 10, 16, 33)] == [8, 16, 16, 64]
    assert [bucket(n, 3) for n in (1, 4, 64)] == [3, 6, 66]
    assert max(BATCHES) == MAX_BATCH


def test_a_pictures_randomness_depends_on_its_number_and_the_seed_alone():
    draw = jax.jit(lambda seed, indices: uniforms_of(picture_keys(seed, indices), 8))
    four = np.asarray(draw(jnp.uint32(5), jnp.arange(4)))
    by_hand = jax.random.uniform(jax.random.fold_in(jax.random.key(5), 2), (8,))
    np.testing.assert_array_equal(four[2], by_hand)
    np.testing.assert_array_equal(draw(jnp.uint32(5), jnp.array([3, 2, 9, 0]))[:2], four[[3, 2]])
    assert (np.asarray(draw(jnp.uint32(6), jnp.arange(4))) != four).all()
    assert len(np.unique(four)) == 32
    greatest = np.asarray(draw(jnp.uint32(2**32 - 1), jnp.arange(4)))
    assert (greatest != np.asarray(draw(jnp.uint32(2**31 - 1), jnp.arange(4)))).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 33}, "the 32 codes"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": 2.0, "guidance_schedule": "square"}, "guidance_schedule is 'square'"),
        ({"guidance": 2.0, "guidance_power": 0.0}, "guidance_power is 0"),
        ({"guidance": 2.0, "guidance_schedule": "cut_off", "guidance_power": 1.5}, "guidance_power is 1.5"),
        ({"order": "spiral"}, "order is 'spiral'"),
        ({"num_steps": 17}, "num_steps is 17"),
        ({"num_steps": -1}, "num_steps is -1"),
    ],
)
def test_options_that_mean_nothing_are_refused(random_toy, options, named):
    with pytest.raises(UserError, match=named):
        Drawing(**options).check(random_toy.gpt)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.01, "top_k": 32, "top_p": 1.0, "min_p": 1.0, "seed": 2**32 - 1},
        {"guidance": 0.0},
        {"guidance": 4.0, "guidance_schedule": "cut_off", "guidance_power": 1.0},
        {"order": "random"},
        {"num_steps": 1},
        {"num_steps": 16, "guidance": 2.0, "guidance_schedule": "power_cosine", "guidance_power": 3.0},
    ],
)
def test_options_at_the_ends_of_their_ranges_are_taken(random_toy, options):
    Drawing(**options).check(random_toy.gpt)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"guidance": 2.0}, "guidance is 2.0, but the generator never saw a picture without its class"),
        ({"guidance": 0.5, "guidance_schedule": "linear"}, "class_dropout"),
        ({"order": "random"}, "order is random, but the generator writes in raster order only"),
        ({"num_steps": 4}, "num_steps is 4, but the generator writes in raster order only"),
    ],
)
def test_what_a_generator_was_not_trained_for_is_refused(raster_toy, options, named):
    Drawing(guidance=1.0, order="raster").check(raster_toy.gpt)
    with pytest.raises(UserError, match=named):
        Drawing(**options).check(raster_toy.gpt)


def test_an_unknown_option_is_named_with_its_likeness():
    with pytest.raises(UserError, match="no sampling option 'temprature': did you mean 'temperature'"):
        Drawing.of(temprature=1.0)
    assert Drawing.of(top_k=3, order="random") == Drawing(top_k=3, order="random")


def test_what_is_off_is_left_out_of_the_program(random_toy):
    off = Drawing(temperature=0.7).options(random_toy.gpt)
    assert (off.temperature, off.top_k, off.top_p, off.min_p, off.guidance) == (0.7, 0, None, None, None)
    on = Drawing(top_k=5, top_p=0.9, min_p=0.1, guidance=3.0, guidance_schedule="linear").options(random_toy.gpt)
    assert (on.top_k, on.top_p, on.min_p) == (5, 0.9, 0.1)
    np.testing.assert_allclose(on.guidance, 1 + 2 * np.arange(16) / 15, rtol=1e-6)
