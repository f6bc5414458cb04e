"""The scanned, cached generation against one token at a time without a cache."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vgpt_jax.errors import UserError
from vgpt_jax.models.gpt import GPT
from vgpt_jax.sampling.generate import bucket, check_sampling_options, generate, sample_uniforms
from vgpt_jax.sampling.logits import draw


@pytest.fixture(scope="module")
def gpt() -> GPT:
    gpt = GPT(num_codes=12, num_classes=2, num_tokens=6, d_model=16, num_layers=2, num_heads=2, rngs=nnx.Rngs(3))
    gpt.token_embedding[...] *= 30  # far from uniform, so that a wrong position or mask shows
    gpt.position_embedding[...] *= 30
    return gpt


@pytest.mark.parametrize(
    "options", [{"top_k": 0, "top_p": None}, {"top_k": 1, "top_p": None}, {"top_k": 5, "top_p": 0.8}]
)
def test_generation_equals_a_loop_without_cache(gpt, options):
    conditions = gpt.condition_ids(jnp.array([0, 1, 1]), 3)
    uniforms = sample_uniforms(7, jnp.arange(3), 6)
    written = nnx.jit(lambda m, c, u: generate(m, c, u, 1.1, options["top_p"], top_k=options["top_k"]))(
        gpt, conditions, uniforms
    )

    ids = conditions[:, None]
    for position in range(6):
        logits = gpt(ids)[:, -1, : gpt.num_codes]
        token = draw(logits, uniforms[:, position], temperature=1.1, **options)
        ids = jnp.concatenate([ids, token[:, None]], axis=1)
    np.testing.assert_array_equal(written, ids[:, 1:])


def test_a_pictures_randomness_depends_on_its_number_alone():
    four = sample_uniforms(5, jnp.arange(4), 8)
    np.testing.assert_array_equal(sample_uniforms(5, jnp.array([2]), 8)[0], four[2])
    assert not np.allclose(sample_uniforms(6, jnp.arange(4), 8), four)
    assert len(np.unique(np.asarray(four))) == 32


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 7, 10, 64, 65, 1000)] == [1, 2, 4, 8, 16, 64, 64, 64]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 13}, "12 codes"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, named):
    with pytest.raises(UserError, match=named):
        check_sampling_options(**({"temperature": 1.0, "top_k": 0, "top_p": None, "num_codes": 12} | options))
