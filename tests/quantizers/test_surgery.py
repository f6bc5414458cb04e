import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax import VectorQuantize
from vgpt_jax.quantizers.surgery import (
    add_relative_noise,
    assigned_means,
    count_down,
    ema_update,
    init_from_latents,
    kmeans,
    replace_stale,
    step_to_means,
)

INIT = jit(init_from_latents)
COUNT_DOWN = jit(count_down, static_argnames="replace_freq")
REPLACE = jit(replace_stale, static_argnames=("replace_freq", "noise"))
ASSIGNED_MEANS = jit(assigned_means, static_argnums=2)
STEP = jit(step_to_means)
KMEANS = jit(kmeans, static_argnames=("iterations", "spherical"))
EMA = jit(ema_update)


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


def test_assigned_means_by_hand():
    latents = jnp.array([[1.0, 2.0], [3.0, 4.0], [-5.0, 0.0], [5.0, 6.0]])
    counts, means = ASSIGNED_MEANS(latents, jnp.array([2, 2, 0, 2]), 4)
    np.testing.assert_array_equal(counts, [1.0, 0.0, 3.0, 0.0])
    np.testing.assert_allclose(means, [[-5.0, 0.0], [0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], rtol=1e-6)
    assert counts.dtype == means.dtype == jnp.float32


def test_assigned_means_match_numpy():
    latents, ids = normal(0, 300, 5), np.random.default_rng(1).integers(0, 7, 300)
    counts, means = ASSIGNED_MEANS(latents, ids, 9)
    np.testing.assert_array_equal(counts, np.bincount(ids, minlength=9))
    np.testing.assert_allclose(means[:7], [latents[ids == k].mean(axis=0) for k in range(7)], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(means[7:], 0.0)


def test_a_step_to_means_by_hand():
    codes = jnp.array([[0.0, 0.0], [10.0, 10.0], [7.0, -7.0]])
    latents = jnp.array([[1.0, 2.0], [3.0, 2.0], [20.0, 0.0]])
    moved, counts = STEP(codes, latents, jnp.array([0, 0, 1]), rate=0.25)
    np.testing.assert_allclose(moved, [[0.5, 0.5], [12.5, 7.5], [7.0, -7.0]], rtol=1e-6)
    np.testing.assert_array_equal(counts, [2.0, 1.0, 0.0])
    moved, _ = STEP(codes, latents, jnp.array([0, 0, 1]), rate=1.0)
    np.testing.assert_array_equal(moved, [[2.0, 2.0], [20.0, 0.0], [7.0, -7.0]])


def test_a_step_to_means_is_gradient_descent_with_a_step_for_each_code():
    codes, latents, ids = normal(0, 6, 3), normal(1, 40, 3), np.random.default_rng(2).integers(0, 5, 40)
    moved, counts = STEP(codes, latents, ids, rate=0.3)
    gradient = jit(jax.grad(lambda codes: 0.5 * jnp.sum((latents - codes[ids]) ** 2)))(codes)
    step = 0.3 / np.maximum(counts, 1.0)[:, None]
    np.testing.assert_allclose(moved, codes - step * np.asarray(gradient), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(moved[5], codes[5])


def numpy_kmeans(means, latents, iterations, spherical):
    """Lloyd's algorithm in float64, a cluster at a time."""
    means, latents = means.astype(np.float64), latents.astype(np.float64)
    for _ in range(iterations):
        ids = np.argmin(np.sum((latents[:, None] - means[None]) ** 2, axis=-1), axis=1)
        for k in np.unique(ids):
            means[k] = latents[ids == k].mean(axis=0)
            if spherical:
                means[k] /= np.linalg.norm(means[k])
    return means, np.bincount(ids, minlength=len(means))


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_matches_numpy(spherical, iterations):
    latents, start = np.abs(normal(0, 100, 3)), np.abs(normal(1, 6, 3))
    start[2] = -4.0  # has no latents
    if spherical:
        latents, start = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (latents, start))
    means, counts = KMEANS(start, latents, iterations=iterations, spherical=spherical)
    expected, expected_counts = numpy_kmeans(start, latents, iterations, spherical)
    np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_array_equal(means[2], start[2])
    if spherical:
        np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1.0, rtol=1e-6)


def test_kmeans_finds_clusters_and_stays_there():
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], np.float32)
    latents = (centres[:, None] + normal(0, 3, 50, 2)).reshape(-1, 2)
    expected = latents.reshape(3, 50, 2).mean(axis=1)
    means, counts = KMEANS(jnp.array([[2.0, 2.0], [7.0, 1.0], [1.0, 8.0]]), latents, iterations=5)
    np.testing.assert_allclose(means, expected, atol=1e-5)
    np.testing.assert_array_equal(counts, 50.0)
    np.testing.assert_allclose(KMEANS(means, latents, iterations=5)[0], means, atol=1e-5)


def test_every_iteration_of_kmeans_lowers_the_error():
    latents, means = normal(0, 300, 4), normal(1, 16, 4)
    errors = []
    for _ in range(6):
        errors.append(np.mean(np.min(np.sum((latents[:, None] - np.asarray(means)[None]) ** 2, axis=-1), axis=1)))
        means, _ = KMEANS(means, latents, iterations=1)
    assert (np.diff(errors) < 0.0).all()


def test_a_moving_average_by_hand():
    """Two codes; the first has the latents 1 and 3, the second none."""
    counts, sums = jnp.array([2.0, 1.0]), jnp.array([[8.0], [-3.0]])
    codes, counts, sums = EMA(counts, sums, jnp.array([[1.0], [3.0]]), jnp.array([0, 0]), decay=0.75, epsilon=0.5)
    np.testing.assert_allclose(counts, [2.0, 0.75], rtol=1e-6)  # 0.75 * 2 + 0.25 * 2, 0.75 * 1
    np.testing.assert_allclose(sums, [[7.0], [-2.25]], rtol=1e-6)  # 0.75 * 8 + 0.25 * 4, 0.75 * -3
    smoothed = np.array([2.5, 1.25]) / 3.75 * 2.75  # each with epsilon, of the same total
    np.testing.assert_allclose(codes, np.array([[7.0], [-2.25]]) / smoothed[:, None], rtol=1e-6)
    assert codes.dtype == counts.dtype == sums.dtype == jnp.float32


def test_smoothing_keeps_the_total_and_a_small_one_changes_nothing():
    counts, latents, ids = np.array([3.0, 1.0, 6.0], np.float32), normal(0, 30, 2), np.repeat([0, 1, 2], 10)
    sums = normal(1, 3, 2)
    codes, after, total = EMA(counts, sums, latents, ids, decay=0.9, epsilon=1.0)
    np.testing.assert_allclose(np.sum(np.asarray(total)[:, 0] / np.asarray(codes)[:, 0]), np.sum(after), rtol=1e-5)
    codes, after, total = EMA(counts, sums, latents, ids, decay=0.9, epsilon=1e-9)
    np.testing.assert_allclose(codes, np.asarray(total) / np.asarray(after)[:, None], rtol=1e-5)


def test_moving_averages_come_to_the_means():
    codes, counts, sums = jnp.zeros((2, 3)), jnp.ones(2), jnp.zeros((2, 3))
    latents, ids = normal(0, 50, 3), np.arange(50) % 2
    for _ in range(80):
        codes, counts, sums = EMA(counts, sums, latents, ids, decay=0.8, epsilon=1e-5)
    np.testing.assert_allclose(codes, [latents[::2].mean(axis=0), latents[1::2].mean(axis=0)], atol=1e-5)
    np.testing.assert_allclose(counts, 25.0, rtol=1e-5)


def test_no_decay_keeps_only_the_batch():
    codes, counts, sums = EMA(
        jnp.ones(2), normal(0, 2, 3), normal(1, 4, 3), np.array([0, 1, 1, 0]), decay=0.0, epsilon=1e-5
    )
    latents = normal(1, 4, 3)
    np.testing.assert_allclose(codes, [latents[[0, 3]].mean(axis=0), latents[[1, 2]].mean(axis=0)], rtol=1e-5)
    np.testing.assert_array_equal(counts, 2.0)
    np.testing.assert_allclose(sums, 2.0 * np.asarray(codes), rtol=1e-5)


# Within the quantizer


def training_step(**options):
    """One jitted step of a quantizer without an optimizer, ``(state, z, key) -> (state, output)``, and its state."""
    defaults = {"num_codewords": 8, "embedding_dim": 4, "pretrain_steps": 0, "penalty_weight": 0.0}
    graph, state = nnx.split(VectorQuantize(**(defaults | options), rngs=nnx.Rngs(0)))

    def step(state, z, key):
        quantizer = nnx.merge(graph, state)
        output = quantizer(z)
        quantizer.surgery(output, key)
        return nnx.state(quantizer), output

    return jit(step), state


@pytest.mark.parametrize(("pretrain_steps", "l2_norm"), [(0, False), (2, False), (0, True)])
def test_kmeans_refines_the_drawn_latents_once(pretrain_steps, l2_norm):
    ends = {}
    for init_method in ("latent_random", "kmeans"):
        step, state = training_step(
            init_method=init_method, pretrain_steps=pretrain_steps, l2_norm=l2_norm, kmeans_iterations=3
        )
        before = np.asarray(state["codebook"][...])
        for i in range(max(pretrain_steps, 1)):
            np.testing.assert_array_equal(state["codebook"][...], before)
            state, output = step(state, normal(i, 100, 4) + 0.5, jax.random.key(i))
        ends[init_method], latents = np.asarray(state["codebook"][...]), np.asarray(output.z_e)
        state, _ = step(state, normal(7, 100, 4), jax.random.key(7))
        np.testing.assert_array_equal(state["codebook"][...], ends[init_method])
    expected, _ = numpy_kmeans(ends["latent_random"], latents, 3, spherical=l2_norm)
    np.testing.assert_allclose(ends["kmeans"], expected, rtol=1e-5, atol=1e-5)


def test_replaced_codes_start_new_averages():
    step, state = training_step(init_method="kaiming", learning="ema", replace_freq=1, replace_noise=0.0)
    before, latents = np.array(state["codebook"][...]), normal(2, 60, 4)
    before[6:] += 100.0
    state["codebook"][...] = state["ema_sums"][...] = jnp.asarray(before)
    state, output = step(state, latents, jax.random.key(0))
    unused = np.bincount(output.token_ids, minlength=8) == 0
    assert unused[6:].all()
    assert not unused.all()
    codes, counts, sums = (np.asarray(state[name][...]) for name in ("codebook", "ema_counts", "ema_sums"))
    assert all(matches(codes[unused], latents))
    np.testing.assert_array_equal(counts[unused], 1.0)
    np.testing.assert_array_equal(sums[unused], codes[unused])
    assert (counts[~unused] != 1.0).all()
