"""How codes follow their latents, by hand: moving averages, alternating steps, the synchronized update, and losses. What
k-means and replacement do within the quantizer is in test_surgery.py, and affine codes are in test_affine.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quick_compile import jit
from vgpt_jax import UserError, VectorQuantize

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def make(codes=None, **options):
    """A quantizer that starts at once, without penalty and with ``codes`` if given, unless ``options`` say otherwise."""
    defaults = {"num_codewords": 8, "embedding_dim": 4, "pretrain_steps": 0, "penalty_weight": 0.0}
    if codes is not None:
        defaults |= {"num_codewords": len(codes), "embedding_dim": len(codes[0]), "init_method": "kaiming"}
    quantizer = VectorQuantize(**(defaults | options), rngs=nnx.Rngs(0))
    if codes is not None:
        quantizer.codebook[...] = jnp.asarray(codes, jnp.float32)
        if quantizer.learning == "ema":
            quantizer.ema_sums[...] = quantizer.codebook[...]
    return quantizer


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nearest(z, codes):
    """Ids of the nearest codes in float64."""
    z, codes = np.asarray(z, np.float64), np.asarray(codes, np.float64)
    return np.argmin(np.sum((z[..., None, :] - codes) ** 2, axis=-1), axis=-1)


def error(z, codes):
    return np.mean((z - np.asarray(codes)[nearest(z, codes)]) ** 2)


def training_step(quantizer):
    """One jitted step without an optimizer, forward pass then surgery: ``(state, z, key) -> (state, output)``."""
    graph, state = nnx.split(quantizer)

    def step(state, z, key):
        quantizer = nnx.merge(graph, state)
        output = quantizer(z)
        quantizer.surgery(output, key)
        return nnx.state(quantizer), output

    return jit(step), state


def train(quantizer, z, seed=0):
    """The quantizer after one step on ``z``."""
    step, state = training_step(quantizer)
    return nnx.merge(nnx.graphdef(quantizer), step(state, jnp.asarray(z, jnp.float32), jax.random.key(seed))[0])


def forward(quantizer, z):
    graph, state = nnx.split(quantizer)
    return jit(lambda state, z: nnx.merge(graph, state)(z))(state, z)


def gradients(quantizer, z, scalar):
    """Gradients of ``scalar(output)`` with respect to the parameters and the latents."""
    graph, params, buffers = nnx.split(quantizer, nnx.Param, ...)
    return jit(jax.grad(lambda p, z: scalar(nnx.merge(graph, p, buffers)(z)), argnums=(0, 1)))(params, z)


def descend(quantizer, z, scalar, rate, steps):
    """The quantizer and the latents after gradient descent of ``scalar(output)`` on both."""
    graph, params, buffers = nnx.split(quantizer, nnx.Param, ...)
    gradient = jit(jax.grad(lambda p, z: scalar(nnx.merge(graph, p, buffers)(z)), argnums=(0, 1)))
    for _ in range(steps):
        params, z = jax.tree.map(lambda x, g: x - rate * g, (params, z), gradient(params, z))
    return nnx.merge(graph, params, buffers), z


# Moving averages


def test_moving_averages_by_hand():
    quantizer = train(make([[0.0], [10.0]], learning="ema", ema_decay=0.75, ema_epsilon=0.5), [[1.0], [3.0], [12.0]])
    close(quantizer.ema_counts[...], [0.75 + 0.5, 0.75 + 0.25])
    close(quantizer.ema_sums[...], [[0.25 * 4.0], [7.5 + 3.0]])
    smoothed = np.array([1.75, 1.5]) / 3.25 * 2.25
    close(quantizer.codebook[...], np.array([[1.0], [10.5]]) / smoothed[:, None])


def test_moving_averages_of_unit_vectors_by_hand():
    """One latent straight up halfway turns the code that points right; the code that points left has none."""
    quantizer = train(make([[1.0, 0.0], [-1.0, 0.0]], learning="ema", ema_decay=0.5, l2_norm=True), [[0.1, 5.0]])
    turned = 0.5 * np.array([1.0, 0.0]) + 0.5 * unit(np.array([0.1, 5.0]))
    close(quantizer.ema_sums[...], [turned, [-0.5, 0.0]])
    close(quantizer.codebook[...], [unit(turned), [-1.0, 0.0]])


@pytest.mark.parametrize("learning", ["ema", "alternating"])
def test_codes_that_follow_in_surgery_have_no_gradient_and_no_codebook_loss(learning):
    quantizer, z = make(normal(0, 8, 4), learning=learning), normal(1, 20, 4)
    params, to_z = gradients(quantizer, z, lambda output: output.loss)
    assert len(jax.tree.leaves(params)) == 0
    codes = np.asarray(quantizer.codebook[...])
    close(to_z, 2.0 * (z - codes[nearest(z, codes)]) / z.size)


@pytest.mark.parametrize("learning", ["ema", "alternating"])
@pytest.mark.parametrize("l2_norm", [False, True])
def test_codes_come_to_their_clusters(learning, l2_norm):
    centres = np.repeat(2.0 * np.eye(4) + 1.0, 16, axis=0).astype(np.float32)
    quantizer = make(normal(0, 8, 4), learning=learning, ema_decay=0.8, l2_norm=l2_norm)
    first = unit if l2_norm else (lambda x: x)
    step, state = training_step(quantizer)
    errors = []
    for i in range(40):
        z = centres + 0.1 * normal(i, 64, 4)
        errors.append(error(first(z), first(np.asarray(state["codebook"][...]))))
        state, output = step(state, z, jax.random.key(i))
        assert set(output.losses) == {"commitment"}
    assert errors[-1] < 0.3 * errors[0]
    if l2_norm:
        close(np.linalg.norm(state["codebook"][...], axis=1), 1.0)


@pytest.mark.parametrize("init_method", ["latent_random", "kmeans"])
def test_moving_averages_wait_for_the_warm_start_and_start_from_the_drawn_codes(init_method):
    quantizer = make(num_codewords=4, pretrain_steps=2, init_method=init_method, learning="ema", ema_decay=0.9)
    step, state = training_step(quantizer)
    before, z = np.asarray(state["codebook"][...]), normal(0, 40, 4)
    state, _ = step(state, normal(5, 40, 4), jax.random.key(0))
    for name, expected in (("ema_counts", 1.0), ("ema_sums", before), ("codebook", before)):
        np.testing.assert_array_equal(state[name][...], expected)

    state, _ = step(state, z, jax.random.key(1))
    codes, counts = np.asarray(state["codebook"][...]), np.asarray(state["ema_counts"][...])
    if init_method == "kmeans":
        assert counts.sum() == 40.0  # of the clusters
        assert counts.max() > counts.min()
    else:
        np.testing.assert_array_equal(counts, 1.0)
    close(state["ema_sums"][...], codes * counts[:, None])

    state, output = step(state, z, jax.random.key(2))
    used = np.bincount(nearest(z, codes), minlength=4)
    close(state["ema_counts"][...], 0.9 * counts + 0.1 * used)


def test_a_code_unused_for_long_stays_on_the_unit_sphere():
    """After some 4600 steps without a latent the averages are as small as these. A code that leaves the sphere is nearer
    to latents than its angle says, and `dequantize` returns no unit vector."""
    quantizer = make(np.eye(3), learning="ema", l2_norm=True)
    quantizer.ema_counts[...] = jnp.array([1.0, 1.0, 1e-20])
    quantizer.ema_sums[...] *= jnp.array([[1.0], [1.0], [1e-20]])
    quantizer = train(quantizer, np.eye(3)[:2])
    close(quantizer.dequantize(jnp.arange(3)), np.eye(3))


# Alternating steps


def test_an_alternating_step_by_hand():
    quantizer = make([[0.0, 0.0], [10.0, 0.0], [0.0, 50.0]], learning="alternating", alternating_rate=0.25)
    quantizer = train(quantizer, [[1.0, 2.0], [3.0, 2.0], [14.0, 8.0]])
    close(quantizer.codebook[...], [[0.5, 0.5], [11.0, 2.0], [0.0, 50.0]])


SCALE, SHIFT = np.array([3.0, 1.0, 0.3, 1.0], np.float32), np.array([1.0, -1.0, 0.0, 2.0], np.float32)


def same(x):
    return x


ROUNDS = [  # options; what the search does to both sides, what it does to codes before, what surgery does to latents
    ({}, same, same, same),
    ({"l2_norm": True}, unit, same, unit),
    ({"cos_dist": True}, unit, same, same),
    ({"proj_dim": 2}, lambda x: x @ np.asarray(make(proj_dim=2).z_proj[...]), same, same),
    ({"affine": "learned"}, same, lambda codes: codes * SCALE + SHIFT, lambda z: (z - SHIFT) / SCALE),
    ({"affine": "statistics"}, same, lambda codes: codes * SCALE + SHIFT, lambda z: (z - SHIFT) / SCALE),
]


@pytest.mark.parametrize(("options", "search", "transform", "latents_of"), ROUNDS, ids=[str(r[0]) for r in ROUNDS])
def test_every_round_assigns_as_the_search_does(options, search, transform, latents_of):
    codes, z = 2.0 * normal(0, 8, 4), normal(1, 200, 4) + 0.5
    quantizer = make(codes, learning="alternating", alternating_steps=3, alternating_rate=1.0, **options)
    if options.get("affine") == "learned":
        quantizer.affine.scale[...], quantizer.affine.shift[...] = jnp.asarray(SCALE - 1.0), jnp.asarray(SHIFT)
    elif options.get("affine"):
        quantizer.affine.latents_variance[...] = jnp.asarray(SCALE**2)
        quantizer.affine.latents_mean[...] = jnp.asarray(SHIFT)
    latents, expected = latents_of(z), codes.astype(np.float64)
    for _ in range(3):
        ids = nearest(search(z), search(transform(expected)))
        for k in np.unique(ids):
            expected[k] = latents[ids == k].mean(axis=0)
    close(train(quantizer, z).codebook[...], unit(expected) if "l2_norm" in options else expected)


# The synchronized update, and the losses


@pytest.mark.parametrize("options", [{"estimator": "rotation"}, {"l2_norm": True}, {"affine": "learned"}], ids=str)
def test_synchronized_share_by_hand(options):
    codes, z, weights = normal(0, 8, 4), normal(1, 20, 4), normal(2, 20, 4)
    with_share, without = (make(codes, sync_nu=nu, **options) for nu in (0.3, 0.0))
    (params, to_z), (unshared, unshared_to_z) = (
        gradients(quantizer, z, lambda output: jnp.sum(weights * output.z_q)) for quantizer in (with_share, without)
    )
    ids, expected = nearest(*(unit(x) if "l2_norm" in options else x for x in (z, codes))), np.zeros((8, 4))
    np.add.at(expected, ids, 0.3 * weights)
    if "l2_norm" in options:  # through the division by the norm
        directions = unit(codes)
        expected -= directions * np.sum(expected * directions, axis=1, keepdims=True)
        expected /= np.linalg.norm(codes, axis=1, keepdims=True)
    close(params["codebook"][...], expected)
    assert all((leaf == 0.0).all() for leaf in jax.tree.leaves(unshared))
    np.testing.assert_array_equal(to_z, unshared_to_z)


def test_the_task_alone_moves_codes_by_the_synchronized_update():
    codes, z, target = normal(0, 8, 4), normal(1, 60, 4), normal(2, 60, 4)
    gradient, _ = gradients(make(codes, sync_nu=1.0), z, lambda output: jnp.mean((output.z_q - target) ** 2))
    moved, ids = codes - 0.5 * np.asarray(gradient["codebook"][...]), nearest(z, codes)
    assert np.mean((moved[ids] - target) ** 2) < np.mean((codes[ids] - target) ** 2) - 1e-2
    gradient, _ = gradients(make(codes, sync_nu=1.0, pretrain_steps=1), z, lambda output: jnp.sum(output.z_q))
    assert (gradient["codebook"][...] == 0.0).all()


def entropies(z, codes, temperature):
    """Mean entropy of the soft assignments, and the entropy of their mean, in float64."""
    scores = -np.sum((np.asarray(z, np.float64)[:, None] - np.asarray(codes, np.float64)) ** 2, axis=-1) / temperature
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    of_each, of_mean = (-np.sum(q * np.log(np.maximum(q, 1e-300)), axis=-1) for q in (p, p.mean(axis=0)))
    return of_each.mean(), of_mean


def test_entropy_loss_by_hand_and_what_it_moves():
    codes, z = normal(0, 8, 4), normal(1, 100, 4)
    codes[1:, 0] += 2.5  # all codes but one lie aside
    weights = {"entropy_weight": 0.5, "entropy_temperature": 1.5, "commitment_weight": 0.0, "codebook_weight": 0.0}
    quantizer = make(codes, **weights)
    sample, usage = entropies(z, codes, 1.5)
    output = forward(quantizer, z)
    close(output.losses["entropy"], sample - usage)
    close(output.loss, 0.5 * (sample - usage))
    params, to_z = gradients(quantizer, z, lambda output: output.loss)
    assert (params["codebook"][...] != 0.0).all()
    assert (to_z != 0.0).all()
    params, to_z = gradients(make(codes, learning="ema", **weights), z, lambda output: output.loss)
    assert len(jax.tree.leaves(params)) == 0
    assert (to_z != 0.0).all()

    after, moved = descend(quantizer, z, lambda output: output.loss, rate=2.0, steps=100)
    sample_after, usage_after = entropies(moved, after.codes(), 1.5)
    assert sample_after < sample - 0.2
    assert usage_after > usage + 0.2


@pytest.mark.parametrize("options", [{}, {"l2_norm": True}, {"affine": "statistics"}], ids=str)
def test_orthogonality_moves_codes_only_and_apart(options):
    codes, z = 1.0 + 0.5 * normal(0, 8, 4), normal(1, 20, 4)
    quantizer = make(codes, orthogonality_weight=10.0, **options)
    output = forward(quantizer, z)
    cosines = unit(codes) @ unit(codes).T
    close(output.losses["orthogonality"], np.mean(cosines**2) - 1.0 / 8.0)
    close(output.loss - 10.0 * output.losses["orthogonality"], 2.0 * output.losses["commitment"])
    params, to_z = gradients(quantizer, z, lambda output: output.losses["orthogonality"])
    assert (params["codebook"][...] != 0.0).any()
    assert (to_z == 0.0).all()
    after, _ = descend(quantizer, z, lambda output: output.losses["orthogonality"], rate=5.0, steps=60)
    assert forward(after, z).losses["orthogonality"] < 0.5 * output.losses["orthogonality"]


# What holds for every variant


def test_the_warm_start_returns_normalised_latents():
    z = 5.0 * normal(1, 20, 4)
    output = forward(make(l2_norm=True, pretrain_steps=1), z)
    close(output.z_q, unit(z))
    close(output.z_e, unit(z))


VARIANTS = [
    {"l2_norm": True},
    {"estimator": "rotation", "sync_nu": 0.5},
    {"affine": "learned"},
    {"affine": "statistics"},
    {"entropy_weight": 1.0, "orthogonality_weight": 1.0, "l2_norm": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_ids_give_the_output_to_the_bit_and_low_precision_is_computed_on_in_float32(options):
    quantizer, low = make(num_codewords=50, embedding_dim=6, **options), jnp.asarray(normal(1, 200, 6), jnp.bfloat16)
    if quantizer.affine is not None:
        quantizer = train(quantizer, 3.0 * normal(2, 100, 6) + 1.0)
    graph, state = nnx.split(quantizer)
    call = jax.jit(lambda state, z: nnx.merge(graph, state)(z))  # optimised, as in training
    output, expected = call(state, low), call(state, low.astype(jnp.float32))
    for ours, theirs in zip(jax.tree.leaves(output), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype != jnp.bfloat16
        np.testing.assert_array_equal(ours, theirs)
    ids = jax.jit(lambda state, z: nnx.merge(graph, state).quantize(z))(state, low)
    np.testing.assert_array_equal(ids, output.token_ids)
    codes = jax.jit(lambda state, ids: nnx.merge(graph, state).dequantize(ids))(state, ids)
    np.testing.assert_array_equal(codes, output.z_q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning": "sgd"}, "learning is 'sgd'.*gradient, ema, alternating"),
        ({"estimator": "reinmax"}, "estimator is 'reinmax'.*rotation, straight_through"),
        ({"affine": "yes"}, "affine is 'yes'.*learned, none, statistics"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"ema_epsilon": 0.0}, "ema_epsilon is 0.0"),
        ({"kmeans_iterations": 0}, "kmeans_iterations is 0"),
        ({"alternating_steps": 0}, "alternating_steps is 0"),
        ({"alternating_rate": 1.1}, "alternating_rate is 1.1"),
        ({"sync_nu": 1.5}, "sync_nu is 1.5"),
        ({"entropy_weight": -1.0}, "entropy_weight is -1.0"),
        ({"entropy_temperature": 0.0}, "entropy_temperature is 0.0"),
        ({"orthogonality_weight": -1.0}, "orthogonality_weight is -1.0"),
        ({"init_method": "fixed", "learning": "ema"}, "fixed.*learning='ema'"),
        ({"learning": "ema", "sync_nu": 0.5}, "sync_nu moves codes by gradient"),
        ({"init_method": "fixed", "orthogonality_weight": 1.0}, "orthogonality_weight moves codes by gradient"),
        ({"affine": "learned", "l2_norm": True}, "affine is for Euclidean search"),
        ({"affine": "statistics", "cos_dist": True}, "affine is for Euclidean search"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)
