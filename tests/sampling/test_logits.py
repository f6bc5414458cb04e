"""Filters against NumPy by hand, and what is drawn against the filters by chi-square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from vgpt_jax.sampling.logits import draw, filter_logits

LOGITS = np.array([0.3, 2.0, -1.0, 1.2, 1.1, 0.0, -3.0, 1.9], np.float32)
OPTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 3},
    {"top_p": 0.7},
    {"top_p": 1.0},
    {"temperature": 1.3, "top_k": 5, "top_p": 0.8},
    {"top_k": 8, "top_p": 0.05},
]


def expected_distribution(
    logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float | None = None
) -> np.ndarray:
    """Temperature, then the k largest, then the smallest set that reaches top_p: one token after the other, float64."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")[: top_k or len(scaled)]
    probabilities = np.exp(scaled[order] - scaled[order[0]])
    probabilities /= probabilities.sum()
    kept, total = [], 0.0
    for index, probability in zip(order, probabilities, strict=True):
        kept.append((index, probability))
        total += probability
        if top_p is not None and total >= top_p:
            break
    result = np.zeros(len(logits))
    for index, probability in kept:
        result[index] = probability / total
    return result


@pytest.mark.parametrize("options", OPTIONS)
def test_filtered_softmax_equals_numpy(options):
    traced = {name: value for name, value in options.items() if name != "top_k"}
    top_k = options.get("top_k", 0)
    filtered = jax.jit(lambda x, o: filter_logits(x, top_k=top_k, **o))(jnp.stack([LOGITS, LOGITS[::-1]]), traced)
    np.testing.assert_allclose(jax.nn.softmax(filtered)[0], expected_distribution(LOGITS, **options), atol=1e-6)
    np.testing.assert_allclose(jax.nn.softmax(filtered)[1], expected_distribution(LOGITS[::-1], **options), atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_draws_follow_the_filtered_distribution(options):
    count = 40_000
    uniforms = jax.random.uniform(jax.random.key(1), (count,))
    tokens = jax.jit(lambda u: draw(jnp.broadcast_to(LOGITS, (count, 8)), u, **options))(uniforms)
    observed = np.bincount(tokens, minlength=8)
    expected = expected_distribution(LOGITS, **options)
    np.testing.assert_array_equal(observed[expected == 0], 0)
    possible = expected > 0
    if possible.sum() > 1:
        assert stats.chisquare(observed[possible], expected[possible] * count).pvalue > 1e-3


def test_top_1_is_greedy_whatever_the_uniform():
    logits = jax.random.normal(jax.random.key(0), (1000, 50))
    for uniform in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        np.testing.assert_array_equal(draw(logits, jnp.full(1000, uniform), top_k=1), jnp.argmax(logits, axis=-1))


def test_a_tie_goes_to_the_lower_id():
    assert draw(jnp.array([[1.0, 3.0, 3.0]]), jnp.array([0.99]), top_k=1)[0] == 1


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.9}])
def test_impossible_tokens_are_never_drawn(options):
    logits = jnp.tile(jnp.array([[0.0, -jnp.inf, 1.0, -jnp.inf]]), (3, 1))
    uniforms = jnp.array([0.0, 0.6, np.nextafter(np.float32(1), np.float32(0))])
    assert set(np.asarray(draw(logits, uniforms, **options)).tolist()) <= {0, 2}


def test_top_p_and_temperature_are_traced():
    traces = []

    @jax.jit
    def run(uniforms, temperature, top_p):
        traces.append(1)
        return draw(jnp.tile(LOGITS, (4, 1)), uniforms, temperature=temperature, top_k=5, top_p=top_p)

    for temperature, top_p in ((1.0, 0.5), (0.7, 0.9)):
        run(jnp.linspace(0, 0.9, 4), temperature, top_p)
    assert len(traces) == 1
