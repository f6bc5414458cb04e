import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vgpt_jax.quantizers.search import l2_normalize, orthogonality_loss, squared_distances, uniformity_penalty

PENALTY = jax.jit(lambda z, codes: uniformity_penalty(squared_distances(z, codes), 0.05))
PENALTY_GRADIENTS = jax.jit(jax.grad(lambda z, codes: uniformity_penalty(squared_distances(z, codes), 0.05), (0, 1)))
ORTHOGONALITY = jax.jit(orthogonality_loss)
ORTHOGONALITY_GRADIENT = jax.jit(jax.grad(orthogonality_loss))


def numpy_penalty(distances, temperature):
    """The docstring's formula, in float64."""
    d = np.asarray(distances, np.float64)
    scores = -d / (temperature * np.ptp(d, axis=1, keepdims=True))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    usage = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
    return np.log(d.shape[1]) + (usage * np.log(np.maximum(usage, 1e-300))).sum()


def hard_entropy(z, codes):
    """Entropy in nats of which codes are nearest."""
    nearest = np.argmin(np.sum((np.asarray(z)[:, None] - np.asarray(codes)[None]) ** 2, axis=-1), axis=1)
    shares = np.bincount(nearest, minlength=len(codes)) / len(nearest)
    return -np.sum(shares[shares > 0] * np.log(shares[shares > 0]))


def test_l2_normalize_divides_by_the_norm():
    x = jnp.array([[3.0, 4.0], [0.0, -2.0], [3e4, 4e4]])
    np.testing.assert_allclose(jax.jit(l2_normalize)(x), [[0.6, 0.8], [0.0, -1.0], [0.6, 0.8]], rtol=1e-6)


def test_l2_normalize_keeps_a_zero_vector_and_a_finite_gradient():
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(l2_normalize(x))))(jnp.zeros((2, 3)))
    assert value == 0.0
    assert np.isfinite(gradient).all()


def test_squared_distances_are_exact_on_small_integers():
    z = jnp.array([[0.0, 0.0], [3.0, -1.0], [2.0, 5.0]])
    codes = jnp.array([[3.0, 4.0], [0.0, -1.0]])
    np.testing.assert_array_equal(jax.jit(squared_distances)(z, codes), [[25.0, 1.0], [25.0, 9.0], [2.0, 40.0]])


def test_squared_distances_match_float64():
    rng = np.random.default_rng(0)
    z, codes = rng.normal(size=(50, 12)).astype(np.float32), rng.normal(size=(30, 12)).astype(np.float32)
    expected = np.sum((z[:, None].astype(np.float64) - codes[None].astype(np.float64)) ** 2, axis=-1)
    np.testing.assert_allclose(jax.jit(squared_distances)(z, codes), expected, atol=2e-5)


def test_distances_are_taken_at_the_highest_precision():
    # A CPU computes the same at every precision, an accelerator does not: so this reads what is asked for.
    jaxpr = jax.make_jaxpr(squared_distances)(jnp.zeros((3, 4)), jnp.zeros((5, 4)))
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 1
    assert set(products[0].params["precision"]) == {jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize("temperature", [0.03, 0.1, 1.0])
def test_penalty_matches_numpy(temperature):
    distances = np.random.default_rng(1).uniform(0.0, 4.0, size=(6, 9)).astype(np.float32)
    penalty = jax.jit(uniformity_penalty, static_argnums=1)(distances, temperature)
    np.testing.assert_allclose(penalty, numpy_penalty(distances, temperature), atol=1e-3)


def test_penalty_is_zero_where_codes_are_used_alike():
    np.testing.assert_allclose(PENALTY(jnp.eye(8), jnp.eye(8)), 0.0, atol=1e-6)


def test_penalty_is_log_k_where_one_code_takes_everything():
    latents = jnp.tile(jnp.eye(8)[3], (20, 1))
    np.testing.assert_allclose(PENALTY(latents, jnp.eye(8)), np.log(8.0), atol=1e-4)


def test_penalty_does_not_change_with_the_scale_or_an_offset_of_distances():
    distances = np.random.default_rng(0).uniform(size=(6, 9)).astype(np.float32)
    penalty = jax.jit(uniformity_penalty)
    np.testing.assert_allclose(penalty(100 * distances, 0.1), penalty(distances, 0.1), atol=1e-5)
    np.testing.assert_allclose(penalty(distances + 5, 0.1), penalty(distances, 0.1), atol=1e-3)


@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize(("moved", "rate"), [("latents", 5.0), ("codes", 0.3)])
def test_minimising_the_penalty_raises_the_entropy_of_code_use(moved, rate, seed):
    rng = np.random.default_rng(seed)
    latents, codes = rng.normal(size=(128, 4)).astype(np.float32), rng.normal(size=(8, 4)).astype(np.float32)
    codes[1:, 0] += 3.0  # all codes but one lie aside, so that one is nearest to most latents
    entropy, penalty = hard_entropy(latents, codes), PENALTY(latents, codes)
    for _ in range(60):
        gradients = PENALTY_GRADIENTS(latents, codes)
        if moved == "latents":
            latents = latents - rate * gradients[0]
        else:
            codes = codes - rate * gradients[1]
    assert PENALTY(latents, codes) < penalty - 0.2
    assert hard_entropy(latents, codes) > entropy + 0.2


@pytest.mark.parametrize(
    ("latents", "codes"),
    [
        (jnp.zeros((4, 3)), jnp.zeros((5, 3))),
        (jnp.zeros((4, 3)), jnp.eye(3)),
        (jnp.arange(12.0).reshape(4, 3), jnp.ones((5, 3))),
        (np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), jnp.full((5, 3), 0.3)),
    ],
    ids=["everything is zero", "a latent amid the codes", "one code five times", "one odd code five times"],
)
def test_penalty_and_its_gradient_are_finite_at_ties(latents, codes):
    np.testing.assert_allclose(PENALTY(latents, codes), 0.0, atol=1e-5)
    for gradient in PENALTY_GRADIENTS(latents, codes):
        assert np.isfinite(gradient).all()


def test_penalty_of_equal_distances_is_zero_at_every_magnitude():
    distances = jnp.tile(jnp.array([[1e-6], [1e-3], [0.7], [29.0], [245.0], [1e6]]), (1, 7))
    value, gradient = jax.jit(jax.value_and_grad(lambda d: uniformity_penalty(d, 0.1)))(distances)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    assert np.isfinite(gradient).all()


def test_minimising_the_penalty_revives_a_collapsed_codebook():
    rng = np.random.default_rng(0)
    params = {
        "z": rng.normal(size=(256, 4)),
        "codes": np.concatenate([np.zeros((1, 4)), 10 + rng.normal(size=(31, 4))]),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    optimizer = optax.adam(0.03)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = optimizer.update(
            dict(zip(("z", "codes"), PENALTY_GRADIENTS(params["z"], params["codes"]), strict=True)), opt_state
        )
        return optax.apply_updates(params, updates), opt_state

    assert hard_entropy(**params) == 0.0
    for _ in range(150):
        params, opt_state = step(params, opt_state)
    assert hard_entropy(**params) > 1.0


@pytest.mark.parametrize("shape", [(2, 2), (3, 8), (20, 5)], ids=str)
def test_orthogonality_is_over_all_pairs(shape):
    codes = np.random.default_rng(0).normal(size=shape)
    unit = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    squares = [np.dot(unit[i], unit[j]) ** 2 for i in range(shape[0]) for j in range(shape[0]) if i != j]
    loss = ORTHOGONALITY(codes.astype(np.float32))
    np.testing.assert_allclose(loss, np.sum(squares) / shape[0] ** 2, rtol=1e-5)
    assert loss.dtype == jnp.float32


ANGLES = 2.0 * np.pi * np.arange(12) / 12


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        (np.eye(4, 6) * np.array([[1.0], [-20.0], [0.1], [3.0]]), 0.0),
        (np.tile([[1.0, 2.0, 3.0]], (5, 1)), 1.0 - 1.0 / 5.0),
        (np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1), 1.0 / 2.0 - 1.0 / 12.0),
    ],
    ids=["orthogonal", "all alike", "spread as far as can be"],
)
def test_orthogonality_of_special_codebooks(codes, expected):
    np.testing.assert_allclose(ORTHOGONALITY(codes.astype(np.float32)), expected, atol=1e-6)


def test_orthogonality_does_not_change_with_norms_and_its_gradient_is_across():
    codes = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    scales = np.linspace(0.1, 30.0, 9, dtype=np.float32)[:, None]
    np.testing.assert_allclose(ORTHOGONALITY(codes * scales), ORTHOGONALITY(codes), rtol=1e-5)
    gradient = ORTHOGONALITY_GRADIENT(codes)
    assert (np.abs(gradient).max(axis=1) > 1e-4).all()
    np.testing.assert_allclose(np.sum(gradient * codes, axis=1), 0.0, atol=1e-6)


def test_orthogonality_has_a_finite_gradient_at_a_zero_code():
    codes = jnp.array([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(ORTHOGONALITY(codes), (2.0 + 2.0 / 9.0) / 9.0 - 1.0 / 3.0, rtol=1e-5)
    assert np.isfinite(ORTHOGONALITY_GRADIENT(codes)).all()


def test_minimising_orthogonality_makes_codes_orthogonal():
    codes = 1.0 + np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)  # in about one direction
    assert ORTHOGONALITY(codes) > 0.1
    for _ in range(200):
        codes = codes - 3.0 * ORTHOGONALITY_GRADIENT(codes)
    unit = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    np.testing.assert_allclose(unit @ unit.T, np.eye(4), atol=1e-2)
